"""Batch-size studies: trials over batch size, learning rate, richness and width. `python flows/batch_size.py --help`."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import as_completed
from prefect.logging import get_run_logger

from flows.engines import engine, final_state
from flows.orchestration import Command, RunsFailed, command_line, parser, publish_to_ui, reason
from flows.runs import compute
from flows.tasks import Place, measure, open_place, train
from lambda_hat.batch_size import artifacts
from lambda_hat.batch_size.plan import StudyPlan, describe, make_study
from lambda_hat.batch_size.summary import failures, preview, summary, text
from lambda_hat.manifest import curvature_address, study_address, target_address
from lambda_hat.runtime import configure
from lambda_hat.settings import Runtime, Settings
from lambda_hat.store import Store
from lambda_hat.trials.spec import TrialSpec


@flow(name="batch_size")
def batch_size(
    experiment: str = "", overrides: Sequence[str] = (), store_uri: str = "", settings_file: str = ""
) -> dict[str, Any]:
    """Trains networks over batch sizes, learning rates, richness and widths; only those that the store does not hold.

    Args:
      experiment: A named study of the settings; "default" if none is named.
      overrides: KEY=VALUE each, as on the command line: "batch_size=16,64,256", "eta=2**range(-8,5)" or "sampler=sgld".
      store_uri: Where artifacts go, a folder or s3://bucket/prefix, in place of the settings' store.
      settings_file: A settings file, in place of ./settings.toml.

    Returns:
      The study's id, counts, best trials and where its files are.

    Raises:
      InvalidInput: an argument is wrong; nothing has been computed.
      RunsFailed: some trials or runs failed; the others are finished and stored.
    """
    settings, store = open_place({"store_uri": store_uri or None, "settings_file": settings_file or None})
    configure(settings.runtime, computes=settings.runtime.engine == "threads")
    study = make_study(settings, experiment or None, list(overrides))
    place: Place = {"store_uri": store.uri, "settings_file": str(Path(settings_file).absolute()) if settings_file else None}
    _train(study, store, place, settings.runtime)
    done = artifacts.trained(store)
    ids = [trial.target_id for trial in study.trials if trial.target_id in done]
    rows = _examine(study, settings, store, place, ids) if ids else []
    return _publish(study, settings, store, ids, rows)


def _train(study: StudyPlan, store: Store, place: Place, runtime: Runtime) -> None:
    done = artifacts.trained(store)
    missing = [trial for trial in study.trials if trial.target_id not in done]
    get_run_logger().info("%d of %d trials are in the store", len(study.trials) - len(missing), len(study.trials))
    keep = study.options.keep or study.options.curvature or bool(study.sampling)
    options = {"refresh_cache": True, "timeout_seconds": runtime.task_timeout_seconds or None}
    if batches := artifacts.batches(missing):
        with engine(runtime.model_copy(update={"max_workers": min(runtime.max_workers, len(batches))})):
            futures = {}
            for batch in batches:
                first, content = batch[0], [trial.model_dump(mode="json") for trial in batch]
                label = f"{len(batch)} trials of width {first.width}, batch size {first.batch_size}"
                made = artifacts.trials_id(batch), label, content, keep, place
                futures[train.with_options(**options).submit(*made)] = label
            for future in as_completed(list(futures)):
                _log(futures[future], final_state(future))


def _examine(study: StudyPlan, settings: Settings, store: Store, place: Place, ids: list[str]) -> list[dict[str, Any]]:
    """Keeps, measures and samples what has not diverged, as far as the study asks for it; the rows of the runs."""
    table = artifacts.load_study(store, ids).table
    finite = set(table["trial_id"][table["diverged_at_step"].isna()])
    trials = [trial for trial in study.trials if trial.target_id in finite]
    address = curvature_address if study.options.curvature else target_address
    if study.options.keep or study.options.curvature:
        there = {manifest.id for manifest in store.manifests(address(trial.target_id) for trial in trials)}
        if missing := [trial for trial in trials if trial.target_id not in there]:
            with engine(settings.runtime):
                submitted = [_measure(trial, study.options.curvature, place) for trial in missing]
                for future in as_completed(submitted):
                    _log("measure", final_state(future))
    runs = study.runs(settings, trials)
    return compute(runs, store, place, settings.runtime) if runs else []


def _measure(trial: TrialSpec, curvature: bool, place: Place) -> Any:
    label, task = f"batch size {trial.batch_size}, eta {trial.eta:g}", measure.with_options(refresh_cache=True)
    return task.submit(trial.target_id, label, trial.model_dump(mode="json"), curvature, place)


def _log(label: str, state: Any) -> None:
    log = get_run_logger()
    log.info("%s: done", label) if state.is_completed() else log.error("%s: %s", label, reason(state))


def _publish(study: StudyPlan, settings: Settings, store: Store, ids: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The finished trials as one study, in the store and in the UI."""
    failed = sum(row["status"] == "failed" for row in rows)
    result: dict[str, Any] = {
        "num_trials": len(study.trials),
        "num_failed": len(study.trials) - len(ids),
        "runs_failed": failed,
    }
    if ids:
        sampled = {row["target_id"] for row in rows if row["status"] != "failed"}
        runs = study.runs(settings, [trial for trial in study.trials if trial.target_id in sampled])
        manifest = artifacts.publish_study(study.name, ids, store, study.options.plots, runs, study.options.curvature)
        found = study_address(manifest.id)
        result |= summary(manifest, artifacts.load_study(store, ids, runs), store)
        plots = {file.name: store.read(found, file.name) for file in manifest.files if file.name.endswith(".png")}
        heading = f"{study.name}: {len(ids)} of {len(study.trials)} trials finished"
        publish_to_ui("batch-size-results", result["best"], plots, heading, store.url(found, "report.html"))
    if result["num_failed"] or failed:
        raise RunsFailed(failures(result), result)
    return result


EXAMPLES = """\
examples:
  python flows/batch_size.py                                             the default study, a minute or two
  python flows/batch_size.py --list                                      studies, tasks and fields of a trial
  python flows/batch_size.py --experiment digits-mup batch_size=16,64,256 'eta=2**range(-8,5)' richness=0.1,1,10
  python flows/batch_size.py batch_size=16,64 num_epochs=20 'seed=range(0,3)' 'plots=[heatmap_batch,losscurve_grid]'
  python flows/batch_size.py sampler=sgld sampler.num_draws=500          with the llc of every trained network
  python flows/sweep.py target=batch-size:tgt_0123 sampler=sgld,hmc      one of its networks, sampled
"""


def main() -> int:
    options = parser(batch_size, EXAMPLES)
    options.add_argument(
        "--no-save", action="store_true", help="keep nothing: artifacts go to a folder that is removed at the end"
    )
    given = options.parse_args()
    arguments = (given.experiment, given.overrides)
    with tempfile.TemporaryDirectory() if given.no_save else contextlib.nullcontext(given.store) as store:
        given.store = store
        command = Command(
            batch_size, plan=lambda settings, _store, _: make_study(settings, *arguments), listing=describe,
            name=lambda study: f"{study.name}: {len(study.trials)} trials", preview=preview, arguments=lambda _: arguments,
            show=lambda _, result, __: text(result),
        )  # fmt: skip
        return command_line(command, given)


if __name__ == "__main__":
    sys.exit(main())
