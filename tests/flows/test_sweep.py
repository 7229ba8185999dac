"""The sweep from end to end, against a Prefect server of its own: what it computes, what it keeps, what it shows."""

import base64
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from botocore.exceptions import EndpointConnectionError
from flow_runs import made, runner, tasks, ui_artifacts
from prefect.logging import disable_run_logger
from prefect.settings import (
    PREFECT_API_URL,
)

from flows import sweep as flow
from flows import tasks as steps_alone
from flows.ends import STOPPED
from flows.orchestration import RunsFailed
from flows.progress import Interrupted
from flows.tasks import artifact_task
from lambda_hat.llc import artifacts, summary
from lambda_hat.llc.plan import make_plan
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.settings import load_settings
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.arrays import unpack_arrays
from lambda_hat.store.manifest import diagnosis_address, run_address, sweep_address, target_address
from lambda_hat.store.store import Store
from lambda_hat.targets.theory import quadratic_llc

pytestmark = pytest.mark.usefixtures("clean_process")

CHECKOUT = Path(__file__).parents[2]

SETTINGS = """
[store]
uri = "{folder}/default store"
[runtime]
compilation_cache = ""
progress_seconds = 1e-9

[presets.target.bowl]
family = "quadratic"
dim = 4
data = {{ n_data = 300 }}
[presets.target.net]
family = "mlp"
model = {{ depth = 1, width = 3 }}
data = {{ n_data = 300, input_dim = 3 }}
training = {{ num_steps = 200 }}

[presets.sampler.sgld]
kind = "sgld"
step_size = 1e-3
batch_size = 64
num_draws = 100
num_burnin_steps = 100
num_steps_bw_draws = 2
[presets.sampler.hmc]
kind = "hmc"
num_draws = 100
num_burnin_steps = 100
[presets.sampler.mclmc]
kind = "mclmc"
num_draws = 100
num_burnin_steps = 100

[experiments.default]
sweeps = [["target=bowl", "sampler=sgld,hmc,mclmc"], ["target=net", "sampler=sgld,hmc"]]
[experiments.diverges]
sweeps = [
  ["target=net", "sampler=sgld", "training.optimizer=sgd", "training.learning_rate=1e6"],
  ["target=bowl", "sampler=sgld,hmc"],
]
"""

SMALL = ("target=bowl", "sampler=sgld,hmc")
ONE = ("target=bowl", "sampler=sgld")


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    path = folder / "settings.toml"
    path.write_text(SETTINGS.format(folder=folder))
    return str(path)


@pytest.fixture(scope="module")
def run(prefect_home, settings_file):
    return runner(flow.sweep, settings_file)


def statuses(outcome: SimpleNamespace) -> list[str]:
    return [row["status"] for row in outcome.result]


def specs_of(settings_file: str, *overrides: str, experiment: str | None = None) -> list[RunSpec]:
    return make_plan(load_settings(settings_file), experiment, overrides)


def trace_sha256(store: Store, spec: RunSpec) -> str:
    return store.manifest(run_address(spec.target_id, spec.run_id)).file("trace.npz").sha256


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    """The default experiment in an empty store."""
    store = Store(str(tmp_path_factory.mktemp("first") / "store"))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("prefect.task_runs")
    logger.addHandler(handler)
    outcome = run(store)
    logger.removeHandler(handler)
    assert outcome.error is None
    return SimpleNamespace(store=store, outcome=outcome, result=outcome.result, lines=lines)


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


LABELS = [("quadratic", "sgld"), ("quadratic", "hmc"), ("quadratic", "mclmc"), ("mlp", "sgld"), ("mlp", "hmc")]


def test_rows(first, settings_file):
    assert first.outcome.state.is_completed()
    assert [(row["target"], row["sampler"], row["status"]) for row in first.result] == [
        (*label, "computed") for label in LABELS
    ]
    specs = specs_of(settings_file)
    assert [(row["target_id"], row["run_id"]) for row in first.result] == [(spec.target_id, spec.run_id) for spec in specs]
    for row, spec in zip(first.result, specs, strict=True):
        result = json.loads(first.store.read(diagnosis_address(spec.target_id, spec.run_id), "result.json"))
        assert {name: row[name] for name in result} == result
        assert row["fge"] == pytest.approx(spec.fge, rel=0.1)  # as counted: trials of steps, lengths of trajectories
    # The numbers are of the run the row names.
    bowl = specs[1]
    exact = quadratic_llc(bowl.target.curvatures(), bowl.nbeta, bowl.posterior.localization)
    assert first.result[1]["mcse"] < 0.2
    assert abs(first.result[1]["llc"] - exact) < 4 * first.result[1]["mcse"]
    assert (first.result[1]["true_llc"], first.result[3]["true_llc"]) == (2.0, None)


def test_task_runs(first):
    runs = [f"{step} {' by '.join(label)}" for step in ("sample", "diagnose") for label in LABELS]
    expected = dict.fromkeys(["build quadratic", "build mlp", *runs, "compare 5 of 5 runs"], "Completed")
    assert tasks(first.outcome, len(expected)) == expected


def test_progress_lines(first):
    assert any("100 % of 200 steps, loss " in line for line in first.lines), first.lines
    sampling = [line for line in first.lines if " draws, " in line]
    assert any("burn-in, llc " in line for line in sampling)
    done = [line for line in sampling if line.startswith("█" * 20 + " 100 % of ")]
    assert len(done) == len(LABELS)
    assert all("sampling, llc " in line and line.endswith("about 0 s left") for line in done)


def cells(rows):
    """The table as the UI is given it: a dash alone would be a bullet of Markdown there."""
    return [{name: "–" if text == "-" else text for name, text in row.items()} for row in summary.table(rows)]


def test_ui(first, settings_file):
    shown = ui_artifacts(first.outcome)
    assert shown.keys() == {"sweep-results", "sweep-results-plots"}
    assert (shown["sweep-results"].type, shown["sweep-results-plots"].type) == ("table", "markdown")
    assert shown["sweep-results"].description == "5 of 5 runs finished"
    assert json.loads(shown["sweep-results"].data) == cells(first.result)
    specs = specs_of(settings_file)
    address = sweep_address(artifacts.sweep_id(specs))
    markdown = shown["sweep-results-plots"].data
    assert first.store.url(address, "report.html") in markdown
    for target_id in {spec.target_id for spec in specs}:
        name = f"llc_convergence-{target_id}.png"
        png = first.store.read(address, name)
        assert png.startswith(b"\x89PNG")
        assert f"![{name}](data:image/png;base64,{base64.b64encode(png).decode()})" in markdown
    assert markdown.count("![") == 2
    assert [row["run_id"] for row in json.loads(first.store.read(address, "results.json"))] == [
        spec.run_id for spec in sorted(specs, key=lambda spec: spec.target_id)
    ]


def test_second_sweep_recomputes_nothing(first, run):
    before = made(first.store)
    assert len(before) == 2 + 5 + 5 + 1
    again = run(first.store)
    assert again.result == [row | {"status": "cached"} for row in first.result]
    assert tasks(again, 0) == {}
    assert made(first.store) == before
    assert json.loads(ui_artifacts(again)["sweep-results"].data) == cells(again.result)


def test_only_what_is_lost_is_recomputed(run, store, settings_file):
    assert statuses(run(store, *SMALL)) == ["computed", "computed"]
    specs = specs_of(settings_file, *SMALL)
    spec = specs[0]
    digest = trace_sha256(store, spec)
    target, sampled, diagnosis, compared = (
        Path(store.uri) / address.folder
        for address in (
            target_address(spec.target_id),
            run_address(spec.target_id, spec.run_id),
            diagnosis_address(spec.target_id, spec.run_id),
            sweep_address(artifacts.sweep_id(specs)),
        )
    )
    label = "quadratic by sgld"
    # A run that is all there needs no task.
    for lost, recomputed, task_names, count, expected in (
        (diagnosis, {diagnosis}, {f"diagnose {label}"}, 3, ["computed", "cached"]),
        # A run's folder holds its diagnosis too, a target's the runs: of these, the manifest alone.
        (sampled, {sampled, diagnosis}, {f"sample {label}", f"diagnose {label}"}, 3, ["computed", "cached"]),
        (sampled / "manifest.json", {sampled}, {f"sample {label}"}, 3, ["computed", "cached"]),
        (target / "manifest.json", {target}, {"build quadratic"}, 5, ["cached", "cached"]),
        (compared, {compared}, {"compare 2 of 2 runs"}, 1, ["cached", "cached"]),
    ):
        before = made(store)
        if lost.is_dir():
            shutil.rmtree(lost)
        else:
            lost.unlink()
        again = run(store, *SMALL)
        assert statuses(again) == expected, lost
        states = tasks(again, count)
        assert {name for name, state in states.items() if state != "Cached"} == task_names, lost
        assert all(states[name] == "Completed" for name in task_names), lost
        after = made(store)
        assert after.keys() == before.keys(), lost
        assert {Path(store.uri) / folder for folder in after if after[folder] != before[folder]} == recomputed, lost
        assert trace_sha256(store, spec) == digest, lost
    assert [problem for _, problem in store.verify() if problem] == []
    assert tasks(run(store, *SMALL), 0) == {}


def test_a_failure_leaves_the_others_alone_and_is_tried_again(run, store, settings_file):
    with pytest.raises(RunsFailed, match=r"^1 of 3 runs failed; the others are finished and kept\.$") as raised:
        flow.sweep("diverges", store_uri=store.uri, settings_file=settings_file)
    assert [row["status"] for row in raised.value.result] == ["failed", "computed", "computed"]
    before = made(store)
    # The failure is not cached, what was finished is.
    again = run(store, experiment="diverges")
    assert again.state.is_failed()
    assert again.state.name == "Failed"
    assert statuses(again) == ["failed", "cached", "cached"]
    assert tasks(again, 2) == {"build mlp": "Failed", "sample mlp by sgld": "NotReady"}
    assert made(store) == before
    for rows in (raised.value.result, again.result):
        assert rows[0]["verdict"] == "failed"
        assert "FloatingPointError" in rows[0]["remedy"]
        assert "it diverged with learning_rate=1000000.0. Lower training.learning_rate." in rows[0]["remedy"]
        assert (rows[1]["llc"], "llc" in rows[0]) == (raised.value.result[1]["llc"], False)
    shown = ui_artifacts(again)
    assert shown["sweep-results"].description == "2 of 3 runs finished"
    assert json.loads(shown["sweep-results"].data)[0]["verdict"] == "failed"
    assert shown["sweep-results-plots"].data.count("![") == 1
    assert not store.exists(target_address(raised.value.result[0]["target_id"]))


def test_damage_fails_with_a_remedy_that_helps(run, store, settings_file):
    """A byte of a target's file is flipped; the run on it says what to delete; then it is computed."""
    spec = specs_of(settings_file, *ONE)[0]
    artifacts.build_target(spec.target, store)
    damaged = Path(store.url(target_address(spec.target_id), "params.npz"))
    content = bytearray(damaged.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    outcome = run(store, *ONE)
    assert isinstance(outcome.error, RunsFailed)
    reason = outcome.result[0]["remedy"]
    assert "ArtifactError" in reason
    manifest = Path(store.uri) / target_address(spec.target_id).folder / "manifest.json"
    assert f"Delete {manifest} and compute it again." in reason
    manifest.unlink()
    assert statuses(run(store, *ONE)) == ["computed"]


def test_a_damaged_trace_costs_the_plots_alone(run, store, settings_file):
    rows = run(store, *SMALL).result
    specs = specs_of(settings_file, *SMALL)
    trace = Path(store.url(run_address(specs[0].target_id, specs[0].run_id), "trace.npz"))
    trace.write_bytes(bytes(trace.stat().st_size))
    shutil.rmtree(Path(store.uri) / sweep_address(artifacts.sweep_id(specs)).folder)
    again = run(store, *SMALL)
    assert again.result == [row | {"status": "cached"} for row in rows]
    shown = ui_artifacts(again)
    assert shown["sweep-results"].description.startswith("2 of 2 runs finished; no plots: A file must be as its manifest says")
    assert json.loads(shown["sweep-results"].data) == summary.table(again.result)
    assert "![" not in shown["sweep-results-plots"].data


def test_all_failed(run, store):
    outcome = run(store, "target=net", "sampler=sgld", "training.optimizer=sgd", "training.learning_rate=1e6")
    assert str(outcome.error) == "1 of 1 runs failed; the others are finished and kept."
    assert ui_artifacts(outcome)["sweep-results"].description == "0 of 1 runs finished"
    assert made(store) == {}


def test_failures_survive_pickling():
    error = pickle.loads(pickle.dumps(RunsFailed("1 of 2 runs failed", [{"status": "failed"}, {"status": "cached"}])))
    assert error.result == [{"status": "failed"}, {"status": "cached"}]
    assert str(error) == "1 of 2 runs failed"


def test_a_changed_number_computes_the_new_run_alone(run, store, settings_file):
    run(store, *ONE)
    before = made(store)
    outcome = run(store, *ONE, "sampler.step_size=1e-3,5e-4")
    assert statuses(outcome) == ["cached", "computed"]
    assert [row["sampler"] for row in outcome.result] == ["sgld step_size=0.001", "sgld step_size=0.0005"]
    assert tasks(outcome, 4) == {
        "build quadratic": "Cached",
        "sample quadratic by sgld step_size=0.001 and 1 more": "Completed",
        "diagnose quadratic by sgld step_size=0.0005": "Completed",
        "compare 2 of 2 runs": "Completed",
    }
    after = made(store)
    old, new = specs_of(settings_file, *ONE, "sampler.step_size=1e-3,5e-4")
    assert {folder: after[folder] for folder in before} == before
    assert after.keys() - before.keys() == {
        run_address(new.target_id, new.run_id).folder,
        diagnosis_address(new.target_id, new.run_id).folder,
        sweep_address(artifacts.sweep_id([old, new])).folder,
    }


def test_from_run_repeats(first, run):
    before = made(first.store)
    wanted = first.result[4]
    whole = run(first.store, from_run=wanted["run_id"])
    assert whole.result == [wanted | {"status": "cached"}]
    assert tasks(whole, 1) == {"compare 1 of 1 runs": "Completed"}
    unique = next(
        wanted["run_id"][:n]
        for n in range(5, 21)
        if sum(row["run_id"][:n] == wanted["run_id"][:n] for row in first.result) == 1
    )
    assert run(first.store, from_run=unique).result == whole.result
    # Of a sweep of one run, plots are made; nothing else is.
    assert {folder: time for folder, time in made(first.store).items() if not folder.startswith("sweeps/")} == {
        folder: time for folder, time in before.items() if not folder.startswith("sweeps/")
    }


def test_from_run_computes_what_the_run_lacks(run, store, settings_file):
    spec = specs_of(settings_file, *ONE)[0]
    artifacts.build_target(spec.target, store)
    artifacts.sample_batch([spec], store)
    assert statuses(run(store, from_run=spec.run_id)) == ["computed"]
    assert store.exists(diagnosis_address(spec.target_id, spec.run_id))


def test_from_run_repeats_into_another_store(first, run, store, settings_file, monkeypatch):
    """The run is looked up in the settings' store if it is not in the one named."""
    monkeypatch.setenv("LAMBDA_HAT_STORE__URI", first.store.uri)
    before = made(first.store)
    spec = specs_of(settings_file, *ONE)[0]
    outcome = run(store, from_run=spec.run_id)
    assert statuses(outcome) == ["computed"]
    assert trace_sha256(store, spec) == trace_sha256(first.store, spec)
    assert made(first.store) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"overrides": ["sampler.stepsize=1"]}, "Did you mean 'sampler.step_size'"),
        ({"from_run": "run_", "overrides": [*ONE]}, "without experiment or overrides"),
        ({"store_uri": "nothing://here"}, "got 'nothing://here'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_input_computes_nothing(run, store, arguments, words):
    outcome = run(store, **arguments)
    assert isinstance(outcome.error, InvalidInput)
    assert words in str(outcome.error)
    assert outcome.state.is_failed()
    assert tasks(outcome, 0) == {}
    assert ui_artifacts(outcome) == {}
    assert not Path(store.uri).exists()


class _Interruption(Exception):
    pass


def test_an_interrupted_run_resumes(first, run, store, settings_file):
    def stop(*progress: object) -> None:
        raise _Interruption

    spec = specs_of(settings_file, *ONE)[0]
    address = run_address(spec.target_id, spec.run_id)
    artifacts.build_target(spec.target, store)
    with pytest.raises(_Interruption):
        artifacts.sample_batch([spec], store, stop)
    assert not store.exists(address)
    checkpoint = artifacts._load_checkpoint(store, address)
    assert 0 < checkpoint.draws["loss_difference"].shape[1] < spec.sampler.num_burnin_draws + spec.sampler.num_draws
    # Time already spent, by which to tell that the run went on from here.
    checkpoint = checkpoint._replace(seconds={"compile": 0.0, "sampling": 5000.0})
    store.save_checkpoint(address, artifacts._pack_checkpoint(checkpoint))
    assert summary.plan_table([spec], store).splitlines()[2].endswith("to resume")

    outcome = run(store, *ONE)
    assert statuses(outcome) == ["computed"]
    assert 5000 < outcome.result[0]["seconds"] < 5100
    assert trace_sha256(store, spec) == trace_sha256(first.store, spec)
    assert outcome.result[0]["llc"] == first.result[0]["llc"]
    assert store.load_checkpoint(address) is None


def test_a_damaged_checkpoint_is_not_resumed(first, run, store, settings_file):
    spec = specs_of(settings_file, *ONE)[0]
    address = run_address(spec.target_id, spec.run_id)
    store.save_checkpoint(address, b"half of a checkpoint")
    path = Path(store.uri) / address.folder / "checkpoint"
    path.write_bytes(path.read_bytes()[:-1])
    assert statuses(run(store, *ONE)) == ["computed"]
    assert trace_sha256(store, spec) == trace_sha256(first.store, spec)
    assert not path.exists()


def test_processes_give_the_same_numbers(first, run, store, settings_file, monkeypatch):
    """In worker processes, from training to draws, bit for bit."""
    monkeypatch.setenv("LAMBDA_HAT_RUNTIME__ENGINE", "processes")
    overrides = ("target=bowl,net", "sampler=hmc")
    outcome = run(store, *overrides)
    assert outcome.error is None
    assert set(tasks(outcome, 7).values()) == {"Completed"}
    for spec in specs_of(settings_file, *overrides):
        address = run_address(spec.target_id, spec.run_id)
        threads, processes = (unpack_arrays(place.read(address, "trace.npz")) for place in (first.store, store))
        assert threads.keys() == processes.keys()
        for name, draws in threads.items():
            np.testing.assert_array_equal(processes[name], draws, strict=True)


def test_a_time_limit_ends_a_task_where_it_can_go_on(run, store, settings_file, monkeypatch):
    monkeypatch.setenv("LAMBDA_HAT_RUNTIME__TASK_TIMEOUT_SECONDS", "10")
    overrides = (*ONE, "sampler.num_draws=10000000")
    outcome = run(store, *overrides)
    assert statuses(outcome) == ["failed"]
    assert "Task run exceeded timeout of 10.0 second(s)" in outcome.result[0]["remedy"]
    assert tasks(outcome, 2) == {"build quadratic": "Completed", "sample quadratic by sgld": "TimedOut"}
    spec = specs_of(settings_file, *overrides)[0]
    assert summary.plan_table([spec], store).splitlines()[2].endswith("to resume")


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (ConnectionError("refused"), 3),
        (EndpointConnectionError(endpoint_url="http://store"), 3),
        (PermissionError("wrong credentials"), 1),
        (InvalidInput("wrong input"), 1),
        (Interrupted("stopped"), 1),
        (KeyError("a bug"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_network_are_tried_again(prefect_home, tmp_path, error, calls):
    made = []

    @artifact_task(name="fragile")
    def fragile(artifact_id, place):
        made.append(artifact_id)
        if len(made) < 3:
            raise error

    soon = fragile.with_options(retry_delay_seconds=0, refresh_cache=True)
    state = soon("run_1", {"store_uri": str(tmp_path)}, return_state=True)
    assert len(made) == calls
    assert state.is_completed() == (calls == 3)


def test_stores_share_no_results(run, store, tmp_path, prefect_home):
    other = Store(str(tmp_path / "other"))
    here = run(store, *ONE)
    elsewhere = run(other, *ONE)
    assert statuses(here) == statuses(elsewhere) == ["computed"]
    assert set(tasks(elsewhere, 4).values()) == {"Completed"}
    assert made(store).keys() == made(other).keys()
    # The time a run took tells whose result it is.
    assert here.result[0]["seconds"] != elsewhere.result[0]["seconds"]
    assert run(store, *ONE).result == [here.result[0] | {"status": "cached"}]
    assert run(other, *ONE).result == [elsewhere.result[0] | {"status": "cached"}]
    # Each is recomputed without a look at the other.
    shutil.rmtree(other.uri)
    assert tasks(run(store, *ONE), 0) == {}
    assert set(tasks(run(other, *ONE), 4).values()) == {"Completed"}
    assert any(prefect_home.rglob("sample-swp_*")), "results are kept elsewhere, so this test leaves something behind"


def test_a_copied_store_needs_no_computing(first, run, store):
    shutil.copytree(first.store.uri, store.uri)
    before = made(store)
    assert statuses(run(store)) == ["cached"] * 5
    assert made(store) == before


def test_task_functions(store, settings_file):
    """Without Prefect they make the same artifacts."""
    spec = specs_of(settings_file, *ONE)[0]
    place = {"store_uri": store.uri, "settings_file": settings_file}
    with disable_run_logger():
        metrics = steps_alone.build_target.fn(spec.target_id, "", spec.model_dump(mode="json"), place)
        [summary] = steps_alone.sample.fn(artifacts.sweep_id([spec]), "", [spec.model_dump(mode="json")], place)
    result = steps_alone.diagnose.fn(spec.run_id, "", spec.model_dump(mode="json"), place)
    assert metrics["true_llc"] == "4/2"
    assert summary["fge"] >= spec.fge
    assert summary["nbeta"] == spec.nbeta
    assert result == store.manifest(diagnosis_address(spec.target_id, spec.run_id)).summary
    json.dumps([metrics, summary, result], allow_nan=False)


@pytest.fixture
def command(settings_file, monkeypatch, capsys):
    """The command line in this process: its status, stdout and stderr."""

    def command(*arguments: str, settings: str | None = settings_file) -> SimpleNamespace:
        where = [] if settings is None else ["--settings", settings]
        monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments, *where])
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
        (["target=bwol"], ["got 'bwol'", "Did you mean 'bowl'?"]),
        (["step_size"], ["'step_size'", "key=value"]),
        (["sampler.stepsize=1"], ["Did you mean 'sampler.step_size'?"]),
        (["sampler.num_chains=0"], ["must be greater than or equal to 1; got 0"]),
        (["sampler.step_size=fast"], ["must be a valid number; got 'fast'"]),
        (["sampler.batch_size=301", *ONE], ["at most data.n_data, 300; got 301"]),
        (["target.seed=range(3,1)"], ["range(3,1) is empty"]),
        (["target=bowl", "target=net"], ["sets a key once"]),
        (["=1"], ["a key is names joined by dots"]),
        ([""], ["key=value"]),
        (["--experiment", "defualt"], ["Did you mean 'default'?"]),
        (["--from-run", "run_0000000000000000"], ["fits none", "`lambda-hat ls` lists all"]),
        (["--from-run", "../../etc"], ["got '../../etc'"]),
        (["--from-run", ""], ["got ''"]),
        (["--from-run", "run_1", "target=bowl"], ["without experiment or overrides"]),
        (["--store", "nothing://here"], ["got 'nothing://here'", "Use a local path"]),
        (["--store", ""], ["got ''", "use a path like ./artifacts"]),
        (["--settings", "/nowhere.toml"], ["none at /nowhere.toml"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_malformed_command_line(command, arguments, words):
    result = command(*arguments, **({"settings": None} if "--settings" in arguments else {}))
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert all(word in result.err for word in words), result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus"], "--bogus"),
        (["--store"], "expected one argument"),
        (["+sampler.step_size=1"], "write KEY=VALUE without +"),
        (["+experiment=default", "--experiment", "default"], "which is given once; got +experiment=default"),
    ],
)
def test_unknown_option(command, arguments, words):
    result = command(*arguments, settings=None)
    assert (result.status, result.out) == (2, "")
    assert words in result.err.splitlines()[-1]


def test_help_and_list_name_what_there_is(command):
    shown = command("--help")
    assert (shown.status, shown.err) == (0, "")
    assert all(option in shown.out for option in ("KEY=VALUE", "--experiment", "--dry-run", "--from-run", "--store", "--json"))
    shown = command("--list")
    assert (shown.status, shown.err) == (0, "")
    assert {"bowl", "net", "sgld", "hmc", "mclmc", "default", "diverges"} <= set(shown.out.split())


def test_hydras_ways_to_say_it(command):
    """-m changes nothing, +experiment=NAME is --experiment NAME, and options stand between overrides."""
    ours = command("--dry-run", "--experiment", "diverges", "target.seed=1,2", "sampler.num_chains=3")
    assert ours.status == 0
    for arguments in (
        ["-m", "+experiment=diverges", "target.seed=1,2", "--dry-run", "sampler.num_chains=3"],
        ["target.seed=1,2", "--multirun", "sampler.num_chains=3", "+experiment=diverges", "--dry-run"],
    ):
        assert command(*arguments) == ours


def test_dry_run_computes_nothing(command, store, settings_file):
    shown = command("--dry-run", "--store", store.uri)
    assert (shown.status, shown.err) == (0, "")
    assert shown.out.count("to compute\n") == 6
    assert all(spec.run_id in shown.out for spec in specs_of(settings_file))
    assert "5 runs of 2 targets, 0 of them built" in shown.out
    assert not Path(store.uri).exists()


def test_command_with_one_worker_and_a_failure(prefect_home, command, store, monkeypatch):
    """A worker that waited for work not yet begun would wait for ever."""
    monkeypatch.setenv("LAMBDA_HAT_RUNTIME__MAX_WORKERS", "1")
    result = command("--experiment", "diverges", "--store", store.uri)
    assert result.status == 1
    assert [line.split()[-2:] for line in result.out.splitlines() if line.startswith("mlp ")] == [["failed", "failed"]]
    assert result.out.count(" computed ") == 2
    assert "failed (1): Task run encountered an exception FloatingPointError" in result.out
    plots = [line.strip() for line in result.out.splitlines() if line.strip().endswith(".png")]
    assert len(plots) == 1
    assert Path(plots[0]).read_bytes().startswith(b"\x89PNG")
    again = command("--experiment", "diverges", "--store", store.uri, "--json")
    assert again.status == 1
    assert [row["status"] for row in json.loads(again.out)] == ["failed", "cached", "cached"]


def program(tmp_path: Path, settings_file: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """`python flows/sweep.py` with a home folder and a process group of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "LAMBDA_HAT_"))}
    own = {"HOME": str(tmp_path / "home"), "PREFECT_HOME": str(tmp_path / "prefect")}
    return subprocess.Popen(
        [sys.executable, "flows/sweep.py", "--settings", settings_file, *arguments],
        cwd=CHECKOUT, env=kept | own | variables, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> SimpleNamespace:
    """Waits for its end: its status, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
    return SimpleNamespace(status=process.returncode, out=out, err=err)


def test_program(first, tmp_path, store, settings_file):
    """With a server that is there already; tests/integration/test_kill.py has it start its own."""
    url = PREFECT_API_URL.value()
    result = end(program(tmp_path, settings_file, *ONE, "--json", "--store", store.uri, PREFECT_API_URL=url))
    assert result.status == 0, result.err
    (row,) = json.loads(result.out)
    assert row["run_id"] == first.result[0]["run_id"]
    assert (row["status"], row["llc"]) == ("computed", first.result[0]["llc"])
    assert "Traceback" not in result.err
    assert " 100 % of 150 draws" in result.err
    assert any((tmp_path / "prefect").rglob("sample-swp_*"))
    assert not (tmp_path / "home" / ".prefect").exists()


def test_ctrl_c_stops_a_long_run_where_it_can_go_on(prefect_home, tmp_path, store, settings_file):
    overrides = (*ONE, "sampler.num_draws=10000000")  # far longer than this waits
    url = PREFECT_API_URL.value()
    process = program(tmp_path, settings_file, *overrides, "--store", store.uri, PREFECT_API_URL=url)
    try:
        deadline = time.monotonic() + 120
        while not list(Path(store.uri).glob("targets/*/runs/*/checkpoint")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
    finally:
        result = end(process)
    assert result.status == 130
    assert STOPPED in result.err
    assert time.monotonic() - began < 30
    spec = specs_of(settings_file, *overrides)[0]
    assert summary.plan_table([spec], store).splitlines()[2].endswith("to resume")


def test_program_refuses_in_one_line(tmp_path, store, settings_file):
    result = end(program(tmp_path, settings_file, "sampler.stepsize=1", "--store", store.uri))
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: Override 'sampler.stepsize=1': ")
    assert result.err.count("\n") == 1
    assert not Path(store.uri).exists()
