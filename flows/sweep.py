"""The main job: N targets x M samplers. `python flows/sweep.py --help`."""

from __future__ import annotations

import sys
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner

from flows.orchestration import Place, RunsFailed, artifact_task, command_line, log_progress, open_place, publish_to_ui, reason
from lambda_hat import artifacts, report
from lambda_hat.manifest import diagnosis_address, run_address, sweep_address, target_address
from lambda_hat.plan import make_plan
from lambda_hat.run import RunSpec, labels
from lambda_hat.runtime import configure
from lambda_hat.settings import Settings
from lambda_hat.spec import InvalidInput
from lambda_hat.store import Store


@artifact_task(name="build-target", task_run_name="build {label}")
def build_target(artifact_id: str, label: str, spec: dict[str, Any], place: Place) -> dict[str, Any]:
    settings, store = open_place(place)
    return artifacts.build_target(RunSpec.from_dict(spec).target, store, log_progress(settings)).summary


@artifact_task(name="sample", task_run_name="sample {label}")
def sample(artifact_id: str, label: str, spec: dict[str, Any], place: Place) -> dict[str, Any]:
    settings, store = open_place(place)
    return artifacts.sample_run(RunSpec.from_dict(spec), store, log_progress(settings)).summary


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
    place: Place = {"store_uri": store_uri, "settings_file": settings_file}
    settings, store = open_place(place)
    configure(settings.runtime)
    specs = plan(settings, store, experiment, overrides or [], from_run)
    names = labels(specs)

    targets: dict[str, PrefectFuture[Any]] = {}
    for spec, (target, _) in zip(specs, names, strict=True):
        if spec.target_id not in targets:
            task = build_target.with_options(refresh_cache=not store.exists(target_address(spec.target_id)))
            targets[spec.target_id] = task.submit(spec.target_id, target, spec.model_dump(mode="json"), place)
    # A task that waits holds a worker, so each stage is submitted whole before the next: no worker waits for work not begun.
    steps = [[targets[spec.target_id]] for spec in specs]
    cached = [True] * len(specs)
    for stage, address in ((sample, run_address), (diagnose, diagnosis_address)):
        for index, (spec, label) in enumerate(zip(specs, names, strict=True)):
            exists = store.exists(address(spec.target_id, spec.run_id))
            cached[index] &= exists
            arguments = (spec.run_id, " by ".join(label), spec.model_dump(mode="json"), place)
            task = stage.with_options(refresh_cache=not exists)
            steps[index].append(task.submit(*arguments, wait_for=steps[index][-1:]))

    rows = []
    for spec, label, futures, was_cached in zip(specs, names, steps, cached, strict=True):
        futures[-1].wait()
        if futures[-1].state.is_completed():
            rows.append(report.row(label, spec, "cached" if was_cached else "computed", futures[-1].result()))
        else:
            rows.append(report.row(label, spec, "failed", None, reason([future.state for future in futures])))
        logger.info("%s by %s: %s", *label, rows[-1]["status"])
    finished = [spec for spec, row in zip(specs, rows, strict=True) if row["status"] != "failed"]
    _publish(finished, rows, store)
    if len(finished) < len(rows):
        raise RunsFailed(rows)
    return rows


def plan(settings: Settings, store: Store, experiment: str | None, overrides: list[str], from_run: str | None) -> list[RunSpec]:
    """The runs asked for."""
    if from_run is None:
        return make_plan(settings, experiment, overrides)
    if experiment or overrides:
        raise InvalidInput(
            f"--from-run repeats a run as it was, without experiment or overrides; got {experiment or overrides}."
        )
    return [artifacts.find_run_spec(store, from_run)]


def _publish(finished: list[RunSpec], rows: list[dict[str, Any]], store: Store) -> None:
    """The finished runs' plots to the store, and with the table to the UI."""
    plots = {}
    if finished:
        manifest = artifacts.publish_sweep(finished, store)
        names = [file.name for file in manifest.files if file.name.endswith(".png")]
        plots = {name: store.read(sweep_address(manifest.id), name) for name in names}
    publish_to_ui("sweep-results", report.table(rows), plots, f"{len(finished)} of {len(rows)} runs finished")


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
