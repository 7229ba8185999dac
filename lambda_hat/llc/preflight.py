"""What is looked at before any work, and by `--dry-run`: what would else fail hours later, or on another machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from lambda_hat.llc.artifacts import found, steps
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.settings import Runtime
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.manifest import target_address
from lambda_hat.store.store import Store
from lambda_hat.targets.custom import CustomSpec
from lambda_hat.targets.selection import select
from lambda_hat.targets.target import OBSERVABLE_SIZE, Shapes, TargetSpec

#: Copies of the parameters that the simplest chain holds (position, gradient), and a training (with an optimizer's state).
CHAIN_COPIES, TRAINING_COPIES = 2, 2

#: Numbers that every sampler records at a draw.
NUMBERS_PER_DRAW = 6

#: Bytes that no machine has.
MAX_BYTES = 2**44


def check_runs(runs: Sequence[RunSpec], store: Store, runtime: Runtime) -> None:
    """Checks the work on the runs that the store does not hold: their targets, as `check` does, that they fit into memory, and
    that their targets have the parameters which they name.

    Raises:
      InvalidInput, StoreUnavailable: as `check`.
    """
    there = found(store, runs)
    todo = [spec for spec in runs if not all(address in there for address in steps(spec))]
    check([spec.target for spec in todo], store, runtime)
    check_samplings(todo, runtime)


def check(targets: Iterable[TargetSpec], store: Store, runtime: Runtime) -> None:
    """Checks that the store can be written, that there is what the targets are made of, and that they fit into memory.

    Args:
      targets: on which there is work to do; where there are none nothing is checked, so that what is finished can be looked at
        in a store that others keep.

    Raises:
      InvalidInput: a file, a module or a function is not there or not what it must be; a size is absurd; or the store is no
        folder.
      StoreUnavailable: nothing can be written to the store.
    """
    by_id = {spec.target_id: spec for spec in targets}
    if not by_id:
        return
    store.check_writable()
    built = {manifest.id for manifest in store.manifests(map(target_address, by_id))}
    memory = usable_memory(runtime)
    for target_id, spec in by_id.items():
        spec.check_sources(target_id in built)
        if target_id not in built:
            _check_size(spec, memory)


def check_samplings(runs: Iterable[RunSpec], runtime: Runtime) -> None:
    """Checks that runs fit into memory, and that their targets have the parameters which they name.

    Raises:
      InvalidInput: one does not, or has not.
    """
    memory, known = usable_memory(runtime), {}
    for spec in runs:
        # What a custom target is made of tells its function alone, which may take long: called where it is needed.
        if isinstance(spec.target, CustomSpec) and spec.posterior.parameters == ("*",):
            count = 1
        else:
            key = spec.target_id, spec.posterior.parameters
            if key not in known:
                shapes = spec.target.param_shapes()
                select(shapes, spec.posterior.parameters)
                known[key] = _count(shapes)
            count = known[key]
        check_chains(spec, count, memory)


def check_chains(spec: RunSpec, num_params: int, memory: int) -> None:
    """Refuses chains that do not fit into so many bytes.

    Raises:
      InvalidInput: they do not.
    """
    sampler = spec.sampler
    draws = sampler.num_burnin_draws + sampler.num_draws
    recorded = NUMBERS_PER_DRAW + OBSERVABLE_SIZE * len(sampler.observables)
    copies = CHAIN_COPIES * getattr(sampler, "num_particles", 1)
    _refuse(
        sampler.num_chains * (copies * num_params + draws * recorded), spec.target, memory,
        f"{sampler.num_chains} chains of {draws} draws, burn-in included, and {num_params} parameters",
        "Lower sampler.num_chains, sampler.num_draws or sampler.num_burnin_steps, or thin with sampler.num_steps_bw_draws.",
    )  # fmt: skip


def _check_size(spec: TargetSpec, memory: int) -> None:
    """Refuses a target that cannot be built here."""
    data, count = spec.num_data * spec.sample_size, 0
    _refuse(data, spec, memory, f"{spec.num_data} samples of {spec.sample_size} numbers", "Lower the number of samples.")
    if not isinstance(spec, CustomSpec):
        count = _count(spec.param_shapes())
    kept = len(spec.checkpoint_steps)
    _refuse(
        data + (TRAINING_COPIES + kept) * count, spec, memory,
        f"a network of {count} parameters, with {kept} checkpoints and its data", "Make it smaller, or keep fewer checkpoints.",
    )  # fmt: skip


def _refuse(numbers: int, spec: TargetSpec, memory: int, what: str, remedy: str) -> None:
    size = numbers * np.dtype(spec.precision).itemsize
    if size > memory:
        raise InvalidInput(f"Work must fit into memory, {_bytes(memory)} here; {what} take at least {_bytes(size)}. {remedy}")


def _count(shapes: Shapes) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def usable_memory(runtime: Runtime) -> int:
    """Bytes that work may take: this machine's, where it is done here."""
    if runtime.engine not in ("threads", "processes"):
        return MAX_BYTES
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return MAX_BYTES


def _bytes(size: int) -> str:
    """1.6e10 as "16 GB"."""
    number: Any = float(size)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"
