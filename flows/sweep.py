"""The main job: N targets x M samplers. `python flows/sweep.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture, as_completed
from prefect.logging import get_run_logger
from prefect.states import State

from flows.engines import engine, final_state, submit_ahead
from flows.orchestration import RunsFailed, command_line, found, plan, publish_to_ui, reason, steps
from flows.tasks import Place, build_target, diagnose, open_place, sample
from lambda_hat import artifacts, report
from lambda_hat.manifest import Address, Manifest, sweep_address, target_address
from lambda_hat.run import RunSpec, batches, labels
from lambda_hat.runtime import configure
from lambda_hat.settings import Runtime
from lambda_hat.store import Store


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
    settings, store = open_place({"store_uri": store_uri or None, "settings_file": settings_file or None})
    configure(settings.runtime, computes=settings.runtime.engine == "threads")
    specs = plan(settings, store, experiment or None, list(overrides), from_run or None)
    place: Place = {"store_uri": store.uri, "settings_file": str(Path(settings_file).absolute()) if settings_file else None}
    there = found(store, specs)
    names = labels(specs)
    rows = {
        index: report.row(names[index], spec, "cached", there[steps(spec)[-1]].summary)
        for index, spec in enumerate(specs)
        if all(address in there for address in steps(spec))
    }
    get_run_logger().info("%d of %d runs are in the store", len(rows), len(specs))
    # Whole batches, so that a run has the same numbers wherever its batch was interrupted.
    if todo := [batch for batch in batches(specs) if not all(index in rows for index in batch)]:
        workers = min(settings.runtime.max_workers, len(todo))  # none that would have nothing to do
        with engine(settings.runtime.model_copy(update={"max_workers": workers})):
            _compute(specs, names, todo, rows, there, place, settings.runtime)
    return _publish(specs, [rows[index] for index in range(len(specs))], store)


def _compute(
    specs: list[RunSpec], names: list[tuple[str, str]], todo: list[list[int]], rows: dict[int, dict[str, Any]],
    there: dict[Address, Manifest], place: Place, runtime: Runtime,
) -> None:  # fmt: skip
    """Adds the rows of the runs of these batches, as far as they are not there."""
    logger, content = get_run_logger(), [spec.model_dump(mode="json") for spec in specs]

    def options(*made: Address) -> dict[str, Any]:
        exists = all(address in there for address in made)
        return {"refresh_cache": not exists, "timeout_seconds": runtime.task_timeout_seconds or None}

    targets: dict[str, PrefectFuture[Any]] = {}
    for index in (index for batch in todo for index in batch[:1]):
        if (target_id := specs[index].target_id) not in targets:
            task = build_target.with_options(**options(target_address(target_id)))
            targets[target_id] = task.submit(target_id, names[index][0], content[index], place)
    samples: dict[PrefectFuture[Any], list[int]] = {}
    for batch in todo:
        runs = [specs[index] for index in batch]
        label = " by ".join(names[batch[0]]) + (f" and {len(batch) - 1} more" if len(batch) > 1 else "")
        task = sample.with_options(**options(*(steps(run)[1] for run in runs)))
        made = artifacts.sweep_id(runs), label, [content[index] for index in batch], place
        samples[task.submit(*made, wait_for=[targets[runs[0].target_id]])] = batch
    diagnoses: dict[PrefectFuture[Any], int] = {}

    def finish(index: int, state: State) -> None:
        made, result = steps(specs[index])[1:], state.result() if state.is_completed() else None
        status = "failed" if result is None else "cached" if all(address in there for address in made) else "computed"
        rows[index] = report.row(names[index], specs[index], status, result, "" if result else reason(state))
        logger.info("%s by %s: %s", *names[index], status)

    # Each run is diagnosed as soon as it is sampled; queued behind the others, its diagnosis would come after all sampling.
    for sampled in as_completed(list(samples)):
        batch = samples[sampled]
        built, state = final_state(targets[specs[batch[0]].target_id]), final_state(sampled)
        for index in (index for index in batch if index not in rows):
            task = diagnose.with_options(**options(steps(specs[index])[2]))
            arguments = specs[index].run_id, " by ".join(names[index]), content[index], place
            if not state.is_completed():
                finish(index, state if built.is_completed() else built)
            elif runtime.engine == "threads":  # of which matplotlib bears one
                finish(index, task(*arguments, return_state=True))
            else:
                diagnoses[submit_ahead(task, *arguments)] = index
    for diagnosed in as_completed(list(diagnoses)):
        finish(diagnoses[diagnosed], final_state(diagnosed))


def _publish(specs: list[RunSpec], rows: list[dict[str, Any]], store: Store) -> list[dict[str, Any]]:
    """The finished runs' plots to the store, and with the table to the UI; returns the rows or raises RunsFailed."""
    finished = [spec for spec, row in zip(specs, rows, strict=True) if row["status"] != "failed"]
    heading, plots, page = f"{len(finished)} of {len(rows)} runs finished", {}, ""
    try:
        if finished:
            manifest = artifacts.publish_sweep(finished, store)
            names = [file.name for file in manifest.files if file.name.endswith(".png")]
            plots = {name: store.read(sweep_address(manifest.id), name) for name in names}
            page = store.url(sweep_address(manifest.id), "report.html")
    except Exception as error:  # a damaged trace, a plot that fails: there is a table all the same
        heading += f"; no plots: {error}"
        get_run_logger().error(heading)
    publish_to_ui("sweep-results", report.table(rows), plots, heading, page)
    if len(finished) < len(rows):
        raise RunsFailed(rows)
    return rows


EXAMPLES = """\
examples:
  python flows/sweep.py                                                  the default experiment
  python flows/sweep.py --list                                           what can be chosen by name
  python flows/sweep.py --dry-run sampler.sgld.step_size=1e-5,1e-6       what would be computed
  python flows/sweep.py target=mlp-small,dln 'target.seed=range(1,4)' sampler=sgld,hmc sampler.num_chains=8
  python flows/sweep.py target=dln 'target.widths=[10,5,10]' target.rank=2 --store s3://bucket/prefix
"""

if __name__ == "__main__":
    sys.exit(command_line(sweep, plan, EXAMPLES))
