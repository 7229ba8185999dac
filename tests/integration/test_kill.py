"""A sweep killed with SIGKILL, its server with it, again and again, ends with the numbers of one that was never disturbed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.progress import STOPPED
from lambda_hat import artifacts, report
from lambda_hat.cli import main
from lambda_hat.manifest import Address, Manifest, diagnosis_address, run_address
from lambda_hat.plan import make_plan
from lambda_hat.run import RunSpec, labels
from lambda_hat.settings import load_settings
from lambda_hat.store import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes left behind in /proc"),
]

CHECKOUT = Path(__file__).parents[2]

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

#: Of a row, what does not depend on the time it took.
NUMBERS = ("run_id", "llc", "mcse", "llc_per_chain", "ess_bulk", "rhat", "acceptance_rate", "init_loss", "verdict")

CHECKPOINTS = "targets/*/runs/*/checkpoint"


def processes(group: int) -> list[str]:
    """Command lines of the live processes of a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, process_group, *_ = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(process_group) == group and state != "Z":
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 180) -> None:
    """Until the condition holds, while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        running = process.poll() is None
        assert running, f"the sweep ended before what was waited for:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"waited in vain:\n{log.read_text()[-3000:]}"
        time.sleep(0.01)


class Place:
    """One store, and the program that fills it; `python flows/sweep.py` in a process group of its own."""

    def __init__(self, folder: Path, name: str, settings: Path) -> None:
        self.store, self.settings = Store(str(folder / name)), settings
        self.logs, self.name = folder, name
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "LAMBDA_HAT_", "JAX_"))
        } | {"PREFECT_HOME": str(folder / "prefect")}
        self.count = 0

    @contextlib.contextmanager
    def sweep(self) -> Iterator[tuple[subprocess.Popen, Path]]:
        """The running program and its log; at the end it and all it started are gone."""
        self.count += 1
        log = self.logs / f"{self.name}-{self.count}.log"
        command = [sys.executable, "flows/sweep.py", "--json", "--settings", str(self.settings), "--store", self.store.uri]
        with log.open("wb") as stderr, log.with_suffix(".json").open("wb") as stdout:
            process = subprocess.Popen(
                command, cwd=CHECKOUT, env=self.environment, stdout=stdout, stderr=stderr, start_new_session=True
            )
        try:
            yield process, log
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
            deadline = time.monotonic() + 30
            while (left := processes(process.pid)) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert left == []

    def finish(self) -> tuple[list[dict], str]:
        """Runs the program to its end: rows and log. It takes its server with it."""
        with self.sweep() as (process, log):
            assert process.wait(timeout=240) == 0, log.read_text()[-3000:]
            assert processes(process.pid) == []
        return json.loads(log.with_suffix(".json").read_text()), log.read_text()

    def stop_when(self, condition: Callable[[], bool], how: signal.Signals) -> str:
        """Starts the program and signals it, and its server, as soon as the condition holds; returns its log."""
        with self.sweep() as (process, log):
            wait_for(condition, process, log)
            assert any("uvicorn" in command for command in processes(process.pid))
            os.killpg(process.pid, how)
            status = process.wait(timeout=30)
            if how == signal.SIGINT:  # as Ctrl-C in a terminal
                assert status == 130
                assert processes(process.pid) == []
                assert STOPPED in log.read_text()
            else:
                assert status == -how
        return log.read_text()

    def published(self) -> dict[Address, Manifest]:
        """All that is finished; every byte of it is checked."""
        problems = dict(self.store.verify())
        assert [problem for problem in problems.values() if problem] == []
        found = {address: self.store.manifest(address) for address in problems}
        return {address: manifest for address, manifest in found.items() if manifest is not None}

    def has(self, pattern: str, size: int = 0) -> bool:
        """Whether the store has a file like this, larger than `size`."""
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_size > size for path in Path(self.store.uri).glob(pattern))
        return False


def made(published: dict[Address, Manifest]) -> dict[Address, tuple[str, str]]:
    """When each was made, and in which attempt: what is made again differs in both."""
    return {address: (manifest.created_at, manifest.attempt) for address, manifest in published.items()}


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
        plan = report.plan_table(specs, killed.store).splitlines()[2:-1]
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
