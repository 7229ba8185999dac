"""The flow of studies from end to end, against a Prefect server of its own."""

import base64
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flow_runs import made, runner, tasks, ui_artifacts
from prefect.logging import disable_run_logger

from flows import batch_size as flow
from flows import sweep as sweep_flow
from flows import tasks as steps_alone
from flows.orchestration import RunsFailed
from lambda_hat.batch_size import artifacts
from lambda_hat.batch_size import plots as study_plots
from lambda_hat.batch_size.plan import make_study
from lambda_hat.specs.settings import load_settings
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.manifest import curvature_address, study_address, target_address, trials_address
from lambda_hat.store.store import Store

pytestmark = pytest.mark.usefixtures("clean_process")

SETTINGS = """
[store]
uri = "{folder}/default store"
[runtime]
compilation_cache = ""
progress_seconds = 1e-9

[presets.task.digits]
description = "some of the digits"
kind = "images"
n_data = 200
n_test = 100

[presets.sampler.hmc]
kind = "hmc"
num_chains = 2
num_draws = 30
num_burnin_steps = 20
num_integration_steps = 4

[studies.default]
description = "two programs of three trials, one of which diverges in each"
sweeps = [["task=digits", "width=8", "num_steps=30", "batch_size=16,64", "eta=1,16,1e30"]]
plots = ["heatmap_batch", "losscurve_grid"]
"""

#: One program of one trial.
ONE = ("batch_size=16", "eta=1")


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    path = folder / "settings.toml"
    path.write_text(SETTINGS.format(folder=folder))
    return str(path)


@pytest.fixture(scope="module")
def run(prefect_home, settings_file):
    return runner(flow.batch_size, settings_file)


def trials_of(settings_file, *overrides):
    return make_study(load_settings(settings_file), None, overrides).trials


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    """The default study in an empty store."""
    store = Store(str(tmp_path_factory.mktemp("first") / "store"))
    outcome = run(store)
    assert outcome.error is None
    return SimpleNamespace(store=store, outcome=outcome, result=outcome.result)


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


LABELS = [f"images, width 8, batch size {size}: 3 trials" for size in (16, 64)]


def test_result(first, settings_file):
    assert first.outcome.state.is_completed()
    found = {name: first.result[name] for name in ("name", "num_trials", "num_untrained", "failures", "runs_failed", "errors")}
    assert found == {
        "name": "default", "num_trials": 6, "num_untrained": 0, "failures": {"diverged": 2}, "runs_failed": 0, "errors": [],
    }  # fmt: skip
    trials = trials_of(settings_file)
    best = first.result["best"]
    assert {row["trial_id"] for row in best} == {trial.target_id for trial in trials}
    assert [row["eta"] for row in best[4:]] == ["1e+30", "1e+30"]
    losses = [float(row["final_loss"]) for row in best[:4]]
    assert losses == sorted(losses)
    study = artifacts.load_study(first.store, [trial.target_id for trial in trials])
    assert losses[0] == pytest.approx(study.table["final_loss"].min(), rel=1e-4)
    assert first.result["study_id"] == first.store.catalogue("study")["id"].iloc[0]
    assert all(Path(path).is_file() for path in first.result["files"].values())
    json.dumps(first.result, allow_nan=False)


def test_task_runs_and_artifacts(first):
    names = [*(f"train {label}" for label in LABELS), "compare default: 6 of 6 trials"]
    assert tasks(first.outcome, 3) == dict.fromkeys(names, "Completed")
    assert {address.kind for address in first.store.addresses()} == {"trials", "study"}  # no network was asked for
    assert [problem for _, problem in first.store.verify() if problem] == []


def test_ui(first):
    shown = ui_artifacts(first.outcome)
    assert shown.keys() == {"batch-size-results", "batch-size-results-plots"}
    table = shown["batch-size-results"]
    assert (table.type, table.description) == ("table", "default: 6 of 6 trials finished")
    cells = [{name: "–" if text == "-" else text for name, text in row.items()} for row in first.result["best"]]
    assert json.loads(table.data) == cells
    png = first.store.read(study_address(first.result["study_id"]), "heatmap_batch.png")
    markdown = shown["batch-size-results-plots"].data
    assert f"![heatmap_batch.png](data:image/png;base64,{base64.b64encode(png).decode()})" in markdown
    assert first.result["files"]["report.html"] in markdown


def test_again_nothing_is_computed(first, run):
    before = made(first.store)
    again = run(first.store)
    assert again.result == first.result
    assert tasks(again, 0) == {}
    assert made(first.store) == before


def test_a_larger_study_trains_what_is_missing(run, store, settings_file):
    """And one that samples its networks trains none again: they were not kept, so each is built, once."""
    one = run(store, *ONE).result
    larger = run(store, "batch_size=16", "eta=1,2")
    names = {"train images, width 8, batch size 16: eta 2, richness 1, seed 0", "compare default: 2 of 2 trials"}
    assert tasks(larger, 2) == dict.fromkeys(names, "Completed")
    assert (larger.result["num_trials"], larger.result["study_id"] != one["study_id"]) == (2, True)
    sampled = run(store, *ONE, "sampler=hmc")
    assert sampled.error is None
    label = "trial by hmc"
    names = {"build trial", f"sample {label}", f"diagnose {label}", "compare default: 1 of 1 trials"}
    assert tasks(sampled, 4) == dict.fromkeys(names, "Completed")
    [row] = sampled.result["best"]
    [trial] = trials_of(settings_file, *ONE)
    diagnosis = store.catalogue("diagnosis").iloc[0]
    assert row["trial_id"] == trial.target_id == diagnosis["target_id"]
    assert float(row["llc"]) == pytest.approx(diagnosis["llc"], rel=1e-4)
    assert "llc" not in one["best"][0]
    # The sweep finds the network, by its trial's id.
    name = f"target=batch-size:{trial.target_id[:12]}"
    arguments = {"overrides": [name, "sampler=hmc"], "store_uri": store.uri, "settings_file": settings_file}
    [found] = sweep_flow.sweep(**arguments)
    assert (found["status"], found["target_id"], found["llc"]) == ("cached", trial.target_id, diagnosis["llc"])


def test_a_longer_study_goes_on_from_a_shorter_one(run, store, settings_file, command):
    """To the same bits; what is new is trained beside it."""
    run(store, "eta=1,16", "batch_size=16")
    shown = command("--dry-run", "eta=1,4,16", "batch_size=16", "num_steps=60", "--store", store.uri)
    assert [row.split()[-2:] for row in shown.out.splitlines()[2:-1]] == [["3", "3"]]
    samples = 16 * (3 * 60 - 2 * 28)
    assert shown.out.splitlines()[-1] == f"3 trials, 2 of them from the ends of shorter ones; {samples:,} samples to train on"
    longer = run(store, "eta=1,4,16", "batch_size=16", "num_steps=60")
    assert longer.error is None
    names = (
        "train images, width 8, batch size 16: 2 trials",
        "train images, width 8, batch size 16: eta 4, richness 1, seed 0",
        "compare default: 3 of 3 trials",
    )
    assert tasks(longer, 3) == dict.fromkeys(names, "Completed")
    fresh = Store(f"{store.uri} afresh")
    run(fresh, "eta=1,16", "batch_size=16", "num_steps=60")
    ids = [trial.target_id for trial in trials_of(settings_file, "eta=1,16", "batch_size=16", "num_steps=60")]
    here, there = (artifacts.load_study(place, ids) for place in (store, fresh))
    assert here.table.drop(columns="seconds").equals(there.table.drop(columns="seconds"))
    for name in ids:
        np.testing.assert_array_equal(here.curves[name][1], there.curves[name][1])


def test_curvature(run, store, settings_file, monkeypatch):
    """It is measured where training did not diverge, of networks that are kept for it."""

    def measure(target_id, store):
        assert store.exists(target_address(target_id))
        if fails:
            raise FloatingPointError("not finite")
        return store.publish(curvature_address(target_id), {}, spec={}, summary={"sharpness": 2.5})

    monkeypatch.setattr(artifacts, "measure_curvature", measure)  # tests/batch_size/test_studies.py measures
    overrides = ("batch_size=16", "eta=1,1e30", "curvature=true")
    fine, lost = trials_of(settings_file, *overrides)
    label = "measure images, width 8, batch size 16: eta 1, richness 1, seed 0"
    fails = True
    outcome = run(store, *overrides)
    assert str(outcome.error).startswith("1 measurements of trained networks failed; ")
    assert outcome.result["errors"] == [f"{label}: Task run encountered an exception FloatingPointError: not finite"]
    names = "train images, width 8, batch size 16: 2 trials", "compare default: 2 of 2 trials"
    assert tasks(outcome, 3) == dict.fromkeys(names, "Completed") | {label: "Failed"}
    assert [store.exists(target_address(trial.target_id)) for trial in (fine, lost)] == [True, False]
    fails = False
    again = run(store, *overrides)
    assert again.error is None
    assert tasks(again, 2) == dict.fromkeys((label, "compare default: 2 of 2 trials"), "Completed")
    assert [row.get("sharpness") for row in again.result["best"]] == ["2.5", "-"]
    assert again.result["study_id"] != outcome.result["study_id"]
    assert tasks(run(store, *overrides), 0) == {}


def test_networks_that_are_asked_for_later_are_built(run, store, settings_file):
    run(store, *ONE)
    [trial] = trials_of(settings_file, *ONE)
    assert not store.exists(target_address(trial.target_id))
    kept = run(store, *ONE, "keep=true")
    assert tasks(kept, 1) == {"measure images, width 8, batch size 16: eta 1, richness 1, seed 0": "Completed"}
    assert store.exists(target_address(trial.target_id))


@pytest.fixture
def broken(monkeypatch):
    """Training of batch size 64 fails, by an error that is not of the storage."""
    train = artifacts.train_batch

    def fail(specs, *arguments):
        if specs[0].batch_size == 64:
            raise RuntimeError("no memory for\nso much")
        return train(specs, *arguments)

    monkeypatch.setattr(artifacts, "train_batch", fail)
    return SimpleNamespace(mend=lambda: monkeypatch.setattr(artifacts, "train_batch", train))


def test_a_failure_leaves_the_others_alone_and_is_tried_again(run, store, broken):
    outcome = run(store)
    assert isinstance(outcome.error, RunsFailed)
    assert str(outcome.error).startswith("3 of 6 trainings failed; the others are finished")
    assert outcome.state.is_failed()
    found = outcome.result
    assert (found["num_untrained"], found["failures"], len(found["best"])) == (3, {"diverged": 1}, 3)
    [error] = outcome.result["errors"]
    assert error.startswith(f"train {LABELS[1]}: ")
    assert error.endswith("no memory for so much")
    names = f"train {LABELS[0]}", "compare default: 3 of 6 trials"
    assert tasks(outcome, 3) == dict.fromkeys(names, "Completed") | {f"train {LABELS[1]}": "Failed"}
    shown = ui_artifacts(outcome)
    assert shown["batch-size-results"].description == "default: 3 of 6 trials finished"
    # Of one batch size there is no map over batch sizes.
    assert "![losscurve_grid.png]" in (markdown := shown["batch-size-results-plots"].data)
    assert markdown.count("![") == 1
    broken.mend()
    again = run(store)
    assert again.error is None
    assert tasks(again, 2) == dict.fromkeys((f"train {LABELS[1]}", "compare default: 6 of 6 trials"), "Completed")
    assert again.result["study_id"] != outcome.result["study_id"]


def test_damaged_results_leave_the_others_alone(run, store, settings_file):
    """A byte of one batch's results is flipped: the others are a study, and the message says what to delete."""
    run(store)
    batch = [trial for trial in trials_of(settings_file) if trial.batch_size == 64]
    address = trials_address(artifacts.trials_id(batch))
    path = Path(store.url(address, "results.json"))
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    outcome = run(store)
    assert outcome.state.is_failed()
    assert (outcome.result["num_untrained"], len(outcome.result["best"])) == (3, 3)
    [error] = outcome.result["errors"]
    manifest = Path(store.uri, address.folder, "manifest.json")
    assert f"Delete {manifest}" in error
    manifest.unlink()
    assert run(store).error is None


def test_a_plot_that_fails_does_not_lose_the_result(run, store, monkeypatch):
    def fail(study):
        raise ValueError("cannot be drawn")

    monkeypatch.setitem(study_plots.PLOTS, "heatmap_batch", fail)
    outcome = run(store, *ONE)
    assert outcome.error is None
    assert "study_id" not in outcome.result
    assert [error for error in outcome.result["errors"] if "cannot be drawn" in error] == outcome.result["errors"] != []
    assert len(outcome.result["best"]) == 1
    shown = ui_artifacts(outcome)
    assert shown["batch-size-results"].description.startswith("default: 1 of 1 trials finished; no plots: ")
    assert len(json.loads(shown["batch-size-results"].data)) == 1
    assert "![" not in shown["batch-size-results-plots"].data
    monkeypatch.undo()
    assert "study_id" in run(store, *ONE).result


@pytest.mark.slow
def test_processes_give_the_same_numbers(first, run, store, settings_file, monkeypatch):
    """In worker processes, bit for bit."""
    monkeypatch.setenv("LAMBDA_HAT_RUNTIME__ENGINE", "processes")
    monkeypatch.setenv("LAMBDA_HAT_RUNTIME__MAX_WORKERS", "1")
    outcome = run(store, "batch_size=16")
    assert outcome.error is None
    ids = [trial.target_id for trial in trials_of(settings_file, "batch_size=16")]
    here, there = (artifacts.load_study(place, ids) for place in (first.store, store))
    for name in ids:
        np.testing.assert_array_equal(here.curves[name][1], there.curves[name][1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"overrides": ["etta=1"]}, "Did you mean 'eta'?"),
        ({"experiment": "defualt"}, "Did you mean 'default'?"),
        ({"store_uri": "nothing://here"}, "got 'nothing://here'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_input_computes_nothing(run, store, arguments, words):
    outcome = run(store, **arguments)
    assert isinstance(outcome.error, InvalidInput)
    assert words in str(outcome.error)
    assert tasks(outcome, 0) == {}
    assert ui_artifacts(outcome) == {}
    assert not Path(store.uri).exists()


def test_task_functions(store, settings_file):
    """Without Prefect they make the same artifacts."""
    [trial] = trials_of(settings_file, *ONE)
    place = {"store_uri": store.uri, "settings_file": settings_file}
    content = trial.model_dump(mode="json")
    with disable_run_logger():
        summary = steps_alone.train.fn(artifacts.trials_id([trial]), "", [content], False, place)
        metrics = steps_alone.measure.fn(trial.target_id, "", content, False, place)
    assert summary["num_trials"] == 1
    assert metrics["num_params"] == 8 * 64 + 10 * 8
    json.dumps([summary, metrics], allow_nan=False)


@pytest.fixture
def command(settings_file, monkeypatch, capsys):
    """The command line in this process: its status, stdout and stderr."""

    def command(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["batch_size.py", *arguments, "--settings", settings_file])
        try:
            status = flow.main()
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["etta=1"], ["'etta=1'", "Did you mean 'eta'?"]),
        (["--experiment", "defualt"], ["Did you mean 'default'?"]),
        (["plots=heatmap"], ["plot must be a known name; got 'heatmap'"]),
        (["sampler=hcm"], ["Did you mean 'hmc'?"]),
        (["batch_size=0"], ["trial.batch_size must be greater than or equal to 1; got 0."]),
        (["--store", "nothing://here"], ["got 'nothing://here'"]),
        (["--dry-run", "eta=range(3,1)"], ["is empty"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_malformed_command_line(command, arguments, words):
    result = command(*arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert all(word in result.err for word in words), result.err


def test_help_and_list(command):
    shown = command("--help")
    assert (shown.status, shown.err) == (0, "")
    assert shown.out.count("python flows/batch_size.py ") >= 4
    assert all(option in shown.out for option in ("KEY=VALUE", "--experiment", "--dry-run", "--no-save", "--store", "--json"))
    shown = command("--list")
    assert (shown.status, shown.err) == (0, "")
    assert {"default", "digits", "batch_size", "eta"} <= set(shown.out.split())


def test_dry_run_computes_nothing(command, first, store):
    shown = command("--dry-run", "--store", store.uri)
    assert (shown.status, shown.err) == (0, "")
    header, _, *rows, total = shown.out.splitlines()
    assert header.split()[-2:] == ["to", "train"]
    assert [row.split()[-2:] for row in rows] == [["3", "3"], ["3", "3"]]
    # 30 steps of three trials of each batch size.
    assert total == f"6 trials; {3 * 30 * (16 + 64):,} samples to train on"
    assert not Path(store.uri).exists()
    shown = command("--dry-run", "eta=1,2,16", "sampler=hmc", "--store", first.store.uri)
    assert [row.split()[-2:] for row in shown.out.splitlines()[2:-1]] == [["3", "1"], ["3", "1"]]
    assert shown.out.splitlines()[-1] == f"6 trials, and the llc of each; {30 * (16 + 64):,} samples to train on"


def test_command(prefect_home, command, store, broken):
    result = command("--store", store.uri)
    assert result.status == 1
    assert (
        "3 of 6 trainings failed; the others are finished and kept, and the same command tries again what failed." in result.out
    )
    assert f"  train {LABELS[1]}: " in result.out
    assert "no memory for so much" in result.out
    places = [line.split()[-1] for line in result.out.splitlines() if line.startswith(("report: ", "table: ", "  /"))]
    assert [Path(place).suffix for place in places] == [".html", ".csv", ".png"]
    assert all(Path(place).is_file() for place in places)
    again = command("--store", store.uri, "--json")
    assert again.status == 1
    found = json.loads(again.out)
    assert (found["num_trials"], found["num_untrained"], len(found["best"])) == (6, 3, 3)
    broken.mend()
    fixed = command("--store", store.uri)
    assert (fixed.status, "trainings failed" in fixed.out) == (0, False)
    assert ": 6 trials, 2 failed: 2 diverged; the best of them above" in fixed.out


def test_nothing_is_kept(prefect_home, command, settings_file, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = command(*ONE, "--no-save")
    assert result.status == 0
    assert ": 1 trials, none failed" in result.out
    assert str(tmp_path) not in result.out
    assert not (Path(settings_file).parent / "default store").exists()
    assert [path.name for path in tmp_path.iterdir() if list(path.rglob("manifest.json"))] == []
    result = command("--no-save", "--store", str(tmp_path))
    assert (result.status, result.out) == (2, "")
    assert "--no-save keeps nothing, in no store; got --store: leave one out" in result.err
