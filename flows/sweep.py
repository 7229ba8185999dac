"""The main job: N targets x M samplers. `python flows/sweep.py --help`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from prefect import flow

from flows.ends import Stop
from flows.options import parse, parser
from flows.orchestration import Command, RunsFailed, command_line, publish_to_ui
from flows.runs import compute, show
from flows.tasks import Place, begin
from lambda_hat.batch_size.plan import with_stored
from lambda_hat.llc import artifacts, summary
from lambda_hat.llc.plan import check_own, describe, make_plan
from lambda_hat.llc.preflight import check_runs
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.settings import Settings
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.manifest import sweep_address
from lambda_hat.store.store import Store


@flow(name="sweep")
def sweep(
    experiment: str = "",
    overrides: Sequence[str] = (),
    from_run: str = "",
    store_uri: str = "",
    settings_file: str = "",
) -> list[dict[str, Any]]:
    """Builds targets, samples them and diagnoses the runs; computes only what the store does not hold.

    Args:
      experiment: A named experiment of the settings; "default" if none is named.
      overrides: KEY=VALUE each, as on the command line: "target=mlp-small,dln" or "sampler.sgld.step_size=1e-5,1e-6".
      from_run: The id of a finished run to repeat, in place of experiment and overrides.
      store_uri: Where artifacts go, a folder or s3://bucket/prefix, in place of the settings' store.
      settings_file: A settings file, in place of ./settings.toml.

    Returns:
      A row per run: its diagnosis, ids and status (computed, cached).

    Raises:
      InvalidInput: an argument is wrong; nothing has been computed.
      RunsFailed: some runs failed; the others are finished and stored.
    """
    settings, store, place = begin(store_uri, settings_file)
    specs = _plan(settings, store, experiment or None, list(overrides), from_run or None)
    return _publish(specs, compute(specs, store, place, settings.runtime), store, place)


def _plan(
    settings: Settings, store: Store, experiment: str | None, overrides: list[str], from_run: str | None
) -> list[RunSpec]:
    """The runs asked for, once it is clear that nothing is in their way."""
    specs = _asked(settings, store, experiment, overrides, from_run)
    check_runs(specs, store, settings.runtime)
    return specs


def _asked(
    settings: Settings, store: Store, experiment: str | None, overrides: list[str], from_run: str | None
) -> list[RunSpec]:
    if from_run is None:
        return make_plan(with_stored(settings, store, overrides), experiment, overrides)
    if experiment or overrides:
        raise InvalidInput(
            f"--from-run repeats a run as it was, without experiment or overrides; got {experiment or overrides}."
        )
    try:
        spec = artifacts.find_run_spec(store, from_run)
    except InvalidInput:  # repeated into another store than its own
        own = settings.store
        spec = artifacts.find_run_spec(Store(own.uri, own.options, own.cache), from_run)
    check_own(settings, spec.target)
    return [spec]


def _publish(specs: list[RunSpec], rows: list[dict[str, Any]], store: Store, place: Place) -> list[dict[str, Any]]:
    """The finished runs' plots to the store, and with the table to the UI; returns the rows or raises RunsFailed."""
    finished, table = _finished(specs, rows), summary.table(rows)
    label = f"{len(finished)} of {len(rows)} runs"
    if finished:
        publish = functools.partial(artifacts.publish_sweep, finished, store)
        show("sweep-results", table, label, sweep_address(artifacts.sweep_id(finished)), publish, store, place)
    else:
        publish_to_ui("sweep-results", table, {}, f"{label} finished", "")
    if failed := len(rows) - len(finished):
        raise RunsFailed(f"{failed} of {len(rows)} runs failed; the others are finished and kept.", rows)
    return rows


def _finished(specs: list[RunSpec], rows: list[dict[str, Any]]) -> list[RunSpec]:
    return [spec for spec, row in zip(specs, rows, strict=True) if row["status"] != "failed"]


EXAMPLES = """\
examples:
  python flows/sweep.py                                                  the default experiment
  python flows/sweep.py --list                                           what can be chosen by name
  python flows/sweep.py --dry-run sampler.sgld.step_size=1e-5,1e-6       what would be computed
  python flows/sweep.py target=mlp-small,dln 'target.seed=range(1,4)' sampler=sgld,hmc sampler.num_chains=8
  python flows/sweep.py target=dln 'target.widths=[10,5,10]' target.rank=2 --store s3://bucket/prefix
"""


def main() -> int:
    options = parser(sweep, EXAMPLES)
    options.add_argument("--from-run", metavar="ID", help="repeat a run from the spec saved with it")
    given = parse(options)
    arguments = (given.experiment, given.overrides, given.from_run)
    command = Command(
        sweep, plan=lambda settings, store, _: _plan(settings, store, *arguments), listing=describe,
        name=lambda specs: f"{len(specs)} runs of {len({spec.target_id for spec in specs})} targets",
        preview=summary.plan_table, arguments=lambda _: arguments, show=_shown,
    )  # fmt: skip
    return command_line(command, given, Stop())


def _shown(specs: list[RunSpec], rows: list[dict[str, Any]], store: Store) -> str:
    return f"{summary.text_table(rows)}\n{summary.plot_places(_finished(specs, rows), store)}"


if __name__ == "__main__":
    sys.exit(main())
