"""A sweep killed with SIGKILL, its server with it, again and again, ends with the numbers of one that was never disturbed."""

import contextlib
import json
import re
import signal
import urllib.request
from pathlib import Path

import pytest
from places import Place, gone, made, processes
from programs import NUMBERS, wait_for
from sweeps import prefect_server

from flows.ends import NOT_KEPT, STOPPED
from lambda_hat.cli import main
from lambda_hat.llc import artifacts, summary
from lambda_hat.llc.plan import make_plan
from lambda_hat.llc.run import RunSpec, labels
from lambda_hat.specs.settings import load_settings
from lambda_hat.store.manifest import Address, diagnosis_address, run_address
from lambda_hat.store.store import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes left behind in /proc"),
]

# Every run takes a second or more, so that a kill finds it at work.
SETTINGS = """
[store]
uri = "unused"
[runtime]
platform = "cpu"
compilation_cache = "{folder}/programs"
progress_seconds = 1e-9

[presets.target.bowl]
family = "quadratic"
dim = 6
data = {{ n_data = 1000 }}
[presets.target.net]
family = "mlp"
model = {{ depth = 1, width = 4 }}
data = {{ n_data = 500, input_dim = 4 }}
training = {{ num_steps = 20000 }}

[presets.sampler.sgld]
kind = "sgld"
step_size = 1e-4
batch_size = 128
num_draws = 6000
num_burnin_steps = 2000
num_steps_bw_draws = 10
[presets.sampler.hmc]
kind = "hmc"
num_draws = 4000
[presets.sampler.mclmc]
kind = "mclmc"
num_draws = 5000

[experiments.default]
sweeps = [["target=bowl,net", "sampler=sgld,hmc,mclmc"]]
"""

CHECKPOINTS = "targets/*/runs/*/checkpoint"


def share_done(store: Store, spec: RunSpec) -> float:
    """The share of a run's draws in its checkpoint."""
    checkpoint = artifacts._load_checkpoint(store, run_address(spec.target_id, spec.run_id))
    if checkpoint is None:
        return 0.0
    return checkpoint.draws["loss_difference"].shape[1] / (spec.sampler.num_burnin_draws + spec.sampler.num_draws)


def first_percent(log: str, label: tuple[str, str]) -> int | None:
    """Where a run's first line of progress is; None if it has none."""
    found = re.search(rf"'sample {' by '.join(label)}' - [█░]+ +(\d+) % of", log)
    return None if found is None else int(found[1])


def test_killed_sweeps_end_as_undisturbed_ones(tmp_path, capsys):
    settings = tmp_path / "settings.toml"
    settings.write_text(SETTINGS.format(folder=tmp_path))
    specs = make_plan(load_settings(settings))
    assert len(specs) == 6
    undisturbed, killed = (Place(tmp_path, name, settings) for name in ("undisturbed", "killed"))
    rows, log = undisturbed.finish()
    assert [row["status"] for row in rows] == ["computed"] * 6
    names = labels(specs)
    assert all(first_percent(log, name) == 0 for name in names)

    total = 2 + 6 + 6 + 1
    kept: dict[Address, tuple[str, str]] = {}
    begun: dict[RunSpec, float] = {}
    resumed = 0
    for moment, how in (
        (lambda: killed.has("targets/*/manifest.json"), signal.SIGKILL),  # the other target is being trained
        (lambda: killed.has(CHECKPOINTS, 30_000), signal.SIGKILL),  # hundreds of draws into a run
        (lambda: len(list(Path(killed.store.uri).glob(CHECKPOINTS))) == 2, signal.SIGINT),  # two runs are at work
        (lambda: killed.has("targets/*/runs/*/diagnosis-v*/manifest.json"), signal.SIGKILL),  # the others are still to come
    ):
        log = killed.stop_when(moment, how)
        finished = made(killed.published())
        assert kept.items() <= finished.items(), "what was finished before was made again"
        assert 0 < len(finished) < total
        kept = finished
        for spec, label in zip(specs, names, strict=True):
            percent = first_percent(log, label)
            if begun.get(spec) and percent is not None:
                assert percent >= int(100 * begun[spec]) > 0, "it started anew"
                resumed += 1
        begun = {spec: share for spec in specs if (share := share_done(killed.store, spec)) > 0.01}
        plan = summary.plan_table(specs, killed.store).splitlines()[2:-1]
        for line, spec in zip(plan, specs, strict=True):
            there = run_address(spec.target_id, spec.run_id) in finished
            to_resume = share_done(killed.store, spec) > 0
            assert line.endswith("exists" if there else "to resume" if to_resume else "to compute")
    assert resumed, "no run that was killed at work went on"

    again, log = killed.finish()
    assert [row["status"] for row in again] == [
        "cached" if diagnosis_address(spec.target_id, spec.run_id) in kept else "computed" for spec in specs
    ]
    published = killed.published()
    assert len(published) == total
    assert kept.items() <= made(published).items()
    assert not killed.has(CHECKPOINTS)
    for row, other, spec in zip(rows, again, specs, strict=True):
        assert {name: other[name] for name in NUMBERS} == {name: row[name] for name in NUMBERS}
        address = run_address(spec.target_id, spec.run_id)
        traces = [place.store.manifest(address).file("trace.npz").sha256 for place in (undisturbed, killed)]
        assert traces[0] == traces[1], spec
    assert main(["verify", "--store", killed.store.uri, "--settings", str(settings)]) == 0
    assert capsys.readouterr().out.startswith(f"{total} artifacts checked, 0 damaged")


#: Programs that would work for hours, and what they do when they are stopped.
SWEEP = ("flows/sweep.py", "target=quadratic", "sampler=sgld", "sampler.num_draws=10000000")
STUDY = ("flows/batch_size.py", "batch_size=64", "eta=1", "richness=1", "seed=0", "num_steps=10000000")
UPDATES = ("flows/entropy.py", "target.checkpoint=0", "target.rl.num_steps=100000")
PROGRAMS = {
    "sweep": (SWEEP, {}),
    "sweep in processes": (SWEEP, {"LAMBDA_HAT_RUNTIME__ENGINE": "processes"}),
    "batch_size": (STUDY, {}),
    "entropy": (UPDATES, {}),
}


@pytest.fixture
def at_work(tmp_path):
    """A program of a command, once it computes."""

    @contextlib.contextmanager
    def start(*command: str, **variables: str):
        place = Place(tmp_path, "stopped", tmp_path / "unused.toml")
        place.environment |= {
            "LAMBDA_HAT_RUNTIME__PROGRESS_SECONDS": "1e-9",
            "LAMBDA_HAT_RUNTIME__PLATFORM": "cpu",
            **variables,
        }
        with place.program(*command) as (process, log):
            wait_for(lambda: "░ " in log.read_text(), process, log)
            yield process, log

    return start


@pytest.mark.parametrize("name", PROGRAMS)
def test_kill_9_leaves_no_process(at_work, tmp_path, name):
    """Of the command's own process alone, as the kernel does where memory is short: its server and its workers end."""
    command, variables = PROGRAMS[name]
    with at_work(*command, "--store", str(tmp_path / "store"), **variables) as (process, _):
        assert any("flows.server" in command for command in processes(process.pid).values())
        process.kill()
        process.wait()
        assert gone(process.pid, 10) == {}


def test_kill_9_while_the_server_starts(tmp_path):
    place = Place(tmp_path, "starting", tmp_path / "unused.toml")
    with place.program(*SWEEP, "--store", str(tmp_path / "store")) as (process, log):
        wait_for(lambda: any("flows.server" in command for command in processes(process.pid).values()), process, log)
        process.kill()
        process.wait()
        assert gone(process.pid, 10) == {}


@pytest.mark.parametrize("name", PROGRAMS)
def test_sigterm_ends_a_command_and_its_server(at_work, tmp_path, name):
    """As systemd, Slurm or `docker stop` send it, to the command's own process alone."""
    command, variables = PROGRAMS[name]
    with at_work(*command, "--store", str(tmp_path / "store"), **variables) as (process, log):
        process.terminate()
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
        assert gone(process.pid) == {}
    assert log.read_text().count(STOPPED) == 1
    assert "Traceback" not in log.read_text()


def test_sigterm_with_a_standing_server(at_work, tmp_path):
    """Which the flow run tells that it has ended."""
    with (
        prefect_server(tmp_path) as url,
        at_work(*SWEEP, "--store", str(tmp_path / "store"), PREFECT_API_URL=url) as (
            process,
            log,
        ),
    ):
        process.terminate()
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
        assert log.read_text().splitlines().count(STOPPED) == 1
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/flow_runs/filter", b"{}", {"Content-Type": "application/json"}), timeout=10
        ) as answer:
            assert [run["state_type"] for run in json.load(answer)] == ["CRASHED"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_that_keeps_nothing_says_so(at_work, tmp_path, number):
    (tmp_path / "temporary").mkdir()
    with at_work(*STUDY, "--no-save", TMPDIR=str(tmp_path / "temporary")) as (process, log):
        assert list((tmp_path / "temporary").iterdir())
        process.send_signal(number)
        assert process.wait(timeout=10) == 128 + number
        assert gone(process.pid) == {}
    assert log.read_text().count(NOT_KEPT) == 1
    assert STOPPED not in log.read_text()
    assert list((tmp_path / "temporary").iterdir()) == []
