"""What is looked at before any work, and by `--dry-run`: what would else fail hours later, or on another machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lambda_hat.artifacts import found, steps
from lambda_hat.manifest import target_address
from lambda_hat.run import RunSpec
from lambda_hat.store import Store
from lambda_hat.target import TargetSpec


def check_runs(runs: Sequence[RunSpec], store: Store) -> None:
    """Checks the work on the runs that the store does not hold; see `check`."""
    there = found(store, runs)
    todo = [spec for spec in runs if not all(address in there for address in steps(spec))]
    check([spec.target for spec in todo], store)


def check(targets: Iterable[TargetSpec], store: Store) -> None:
    """Checks that the store can be written, and that there is what the targets are made of.

    Args:
      targets: on which there is work to do; where there are none nothing is checked, so that what is finished can be looked at
        in a store that others keep.

    Raises:
      InvalidInput: a file, a module or a function is not there or not what it must be; or the store is no folder.
      StoreUnavailable: nothing can be written to the store.
    """
    by_id = {spec.target_id: spec for spec in targets}
    if not by_id:
        return
    store.check_writable()
    built = {manifest.id for manifest in store.manifests(map(target_address, by_id))}
    for target_id, spec in by_id.items():
        spec.check_sources(target_id in built)
