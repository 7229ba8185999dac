"""Batch-size studies: trials over batch size, learning rate, richness and width. `python flows/batch_size.py --help`."""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from flows.ends import NOT_KEPT, Stop
from flows.options import parse, parser
from flows.orchestration import Command, RunsFailed, command_line
from flows.runs import compute, run_each, show
from flows.tasks import Place, begin, measure, train
from lambda_hat.batch_size import artifacts
from lambda_hat.batch_size.ends import find_ends
from lambda_hat.batch_size.plan import StudyPlan, describe, make_study
from lambda_hat.batch_size.summary import incomplete, label, outcome, preview, summary, text
from lambda_hat.llc.preflight import check, check_samplings
from lambda_hat.specs.settings import Runtime, Settings
from lambda_hat.store.manifest import study_address
from lambda_hat.store.store import Store


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
      RunsFailed: some trials or runs could not be computed; the others are finished and stored.
    """
    settings, store, place = begin(store_uri, settings_file)
    study = _plan(settings, store, experiment or None, list(overrides))
    errors = _train(study, store, place, settings.runtime)
    ids, damaged = artifacts.intact(store, [trial.target_id for trial in study.trials])
    rows, unmeasured = _examine(study, settings, store, place, ids) if ids and study.keeps else ([], [])
    return _publish(study, settings, store, place, ids, outcome(study, ids, rows, errors + damaged, unmeasured))


def _plan(settings: Settings, store: Store, experiment: str | None, overrides: list[str]) -> StudyPlan:
    """The study asked for, once it is clear that nothing is in its way."""
    study, done = make_study(settings, experiment, overrides), artifacts.trained(store)
    check([trial for trial in study.trials if trial.target_id not in done], store, settings.runtime)
    networks = {(trial.task, trial.widths, trial.precision): trial for trial in study.trials}
    check_samplings(study.runs(settings, list(networks.values())), settings.runtime)
    return study


def _train(study: StudyPlan, store: Store, place: Place, runtime: Runtime) -> list[str]:
    """Trains what is not in the store; what failed, and why."""
    done = artifacts.trained(store)
    missing = [trial for trial in study.trials if trial.target_id not in done]
    get_run_logger().info("%d of %d trials are in the store", len(study.trials) - len(missing), len(study.trials))
    calls = [
        (artifacts.trials_id(batch), label(batch), [trial.model_dump(mode="json") for trial in batch], study.keeps, place)
        for batch in artifacts.batches(missing, find_ends(store, missing))
    ]
    return run_each(train, calls, runtime)


def _examine(
    study: StudyPlan, settings: Settings, store: Store, place: Place, ids: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Keeps, measures and samples the networks of trials that did not fail, as far as the study asks for it: the rows of the
    runs, and what could not be computed."""
    fine, curvature = artifacts.succeeded(store, ids), study.options.curvature
    trials = [trial for trial in study.trials if trial.target_id in fine]
    calls = [
        (trial.target_id, label([trial]), trial.model_dump(mode="json"), curvature, place)
        for trial in (artifacts.unexamined(store, trials, curvature) if study.options.keep or curvature else [])
    ]
    errors = run_each(measure, calls, settings.runtime)
    return compute(runs, store, place, settings.runtime) if (runs := study.runs(settings, trials)) else [], errors


def _publish(
    study: StudyPlan, settings: Settings, store: Store, place: Place, ids: list[str], result: dict[str, Any]
) -> dict[str, Any]:
    """The finished trials as one study, in the store and in the UI; returns the result with it or raises RunsFailed."""
    if ids:
        runs = [run for run in study.runs(settings, study.trials) if run.run_id in result["run_ids"]]
        result |= summary(artifacts.load_study(store, ids, runs))
        options = study.options
        compared = study.name, ids, store, options.plots, runs, options.target_loss
        address, publish = study_address(artifacts.study_id(*compared)), functools.partial(artifacts.publish_study, *compared)
        label = f"{study.name}: {len(ids)} of {len(study.trials)} trials"
        files, error = show("batch-size-results", result["best"], label, address, publish, store, place)
        if error:
            result["errors"].append(error)
        else:
            manifest = store.manifest(address)
            assert manifest is not None  # it was just shown
            result |= {"study_id": address.id, "files": files, "not_drawn": manifest.summary["not_drawn"]}
    if result["num_untrained"] or result["runs_failed"]:
        raise RunsFailed(incomplete(result), result)
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
    options.add_argument("--no-save", action="store_true", help="keep nothing: results go to a folder removed at the end")
    given = parse(options)
    if given.no_save and given.store:
        options.error("--no-save keeps nothing, in no store; got --store: leave one out")
    arguments = (given.experiment, given.overrides)
    command = Command(
        batch_size, plan=lambda settings, store, _: _plan(settings, store, *arguments), listing=describe,
        name=lambda study: f"{study.name}: {len(study.trials)} trials", preview=preview, arguments=lambda _: arguments,
        show=lambda _, result, __: text(result | {"files": {}}, kept=False) if given.no_save else text(result),
    )  # fmt: skip
    if not given.no_save:
        return command_line(command, given, Stop())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as given.store:
        # Of a process that is stopped nobody else removes the folder.
        return command_line(command, given, Stop(NOT_KEPT, functools.partial(shutil.rmtree, given.store, ignore_errors=True)))


if __name__ == "__main__":
    sys.exit(main())
