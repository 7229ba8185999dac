"""The main job: N targets x M samplers. `python flows/sweep.py --help`."""

from __future__ import annotations

import sys
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture, as_completed
from prefect.logging import get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner

from flows.orchestration import Place, RunsFailed, artifact_task, command_line, open_place, plan, publish_to_ui, reason
from flows.progress import log_progress
from lambda_hat import artifacts, report
from lambda_hat.manifest import diagnosis_address, run_address, sweep_address, target_address
from lambda_hat.run import RunSpec, batches, labels
from lambda_hat.runtime import configure
from lambda_hat.store import Store


@artifact_task(name="build-target", task_run_name="build {label}")
def build_target(artifact_id: str, label: str, spec: dict[str, Any], place: Place) -> dict[str, Any]:
    settings, store = open_place(place)
    return artifacts.build_target(RunSpec.from_dict(spec).target, store, log_progress(settings)).summary


@artifact_task(name="sample", task_run_name="sample {label}")
def sample(artifact_id: str, label: str, specs: list[dict[str, Any]], place: Place) -> list[dict[str, Any]]:
    """A batch: runs that one program can sample together."""
    settings, store = open_place(place)
    manifests = artifacts.sample_batch([RunSpec.from_dict(spec) for spec in specs], store, log_progress(settings))
    return [manifest.summary for manifest in manifests]


@artifact_task(name="diagnose", task_run_name="diagnose {label}")
def diagnose(artifact_id: str, label: str, spec: dict[str, Any], place: Place) -> dict[str, Any]:
    _, store = open_place(place)
    return artifacts.diagnose_run(RunSpec.from_dict(spec), store).summary


@flow(name="sweep", task_runner=ThreadPoolTaskRunner(max_workers=2))  # type: ignore[arg-type]
def sweep(
    experiment: str | None = None,
    overrides: list[str] | None = None,
    from_run: str | None = None,
    store_uri: str | None = None,
    settings_file: str | None = None,
) -> list[dict[str, Any]]:
    """Builds targets, samples them and diagnoses the runs; computes only what the store does not hold.

    Args:
      experiment: a named experiment of the settings; "default" if none is named.
      overrides: KEY=VALUE strings, as on the command line, e.g. "sampler.sgld.step_size=1e-5,1e-6".
      from_run: the id of a finished run to repeat, in place of experiment and overrides.
      store_uri: where artifacts go, in place of the settings' store.
      settings_file: settings file, in place of ./settings.toml.

    Returns:
      A row per run: its diagnosis, ids and status (computed, cached).

    Raises:
      InvalidInput: an argument is wrong; nothing has been computed.
      RunsFailed: some runs failed; the others are finished and stored.
    """
    logger = get_run_logger()
    settings, store = open_place({"store_uri": store_uri, "settings_file": settings_file})
    configure(settings.runtime)
    specs = plan(settings, store, experiment, overrides or [], from_run)
    names = labels(specs)
    place: Place = {"store_uri": store.uri, "settings_file": settings_file}

    def arguments(index: int) -> tuple[Any, ...]:
        return specs[index].run_id, " by ".join(names[index]), specs[index].model_dump(mode="json"), place

    targets: dict[str, PrefectFuture[Any]] = {}
    for spec, (target, _) in zip(specs, names, strict=True):
        if spec.target_id not in targets:
            task = build_target.with_options(refresh_cache=not store.exists(target_address(spec.target_id)))
            targets[spec.target_id] = task.submit(spec.target_id, target, spec.model_dump(mode="json"), place)
    exists = [[store.exists(at(spec.target_id, spec.run_id)) for at in (run_address, diagnosis_address)] for spec in specs]
    samples: dict[PrefectFuture[Any], list[int]] = {}
    for batch in batches(specs):
        runs = [specs[index] for index in batch]
        label = " by ".join(names[batch[0]]) + (f" and {len(batch) - 1} more" if len(batch) > 1 else "")
        task = sample.with_options(refresh_cache=not all(exists[index][0] for index in batch))
        content = [spec.model_dump(mode="json") for spec in runs]
        submitted = task.submit(artifacts.sweep_id(runs), label, content, place, wait_for=[targets[runs[0].target_id]])
        samples[submitted] = batch
    rows: dict[int, dict[str, Any]] = {}
    # Each run is diagnosed here as soon as it is sampled; queued, its diagnosis would come after all sampling.
    for sampled in as_completed(list(samples)):
        for index in samples[sampled]:
            steps = [targets[specs[index].target_id], sampled]
            for future in steps:
                future.wait()  # until then it asks the server, which may not know yet
            states = [future.state for future in steps]
            if states[-1].is_completed():
                task = diagnose.with_options(refresh_cache=not exists[index][1])
                states.append(task(*arguments(index), return_state=True))
            if states[-1].is_completed():
                status = "cached" if all(exists[index]) else "computed"
                rows[index] = report.row(names[index], specs[index], status, states[-1].result())
            else:
                rows[index] = report.row(names[index], specs[index], "failed", None, reason(states))
            logger.info("%s by %s: %s", *names[index], rows[index]["status"])
    return _publish(specs, [rows[index] for index in range(len(specs))], store)


def _publish(specs: list[RunSpec], rows: list[dict[str, Any]], store: Store) -> list[dict[str, Any]]:
    """The finished runs' plots to the store, and with the table to the UI; returns the rows or raises RunsFailed."""
    finished = [spec for spec, row in zip(specs, rows, strict=True) if row["status"] != "failed"]
    heading, plots = f"{len(finished)} of {len(rows)} runs finished", {}
    try:
        if finished:
            manifest = artifacts.publish_sweep(finished, store)
            names = [file.name for file in manifest.files if file.name.endswith(".png")]
            plots = {name: store.read(sweep_address(manifest.id), name) for name in names}
    except Exception as error:  # a damaged trace, a plot that fails: there is a table all the same
        heading += f"; no plots: {error}"
        get_run_logger().error(heading)
    publish_to_ui("sweep-results", report.table(rows), plots, heading)
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
