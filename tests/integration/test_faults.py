"""Whatever happens to a sweep, the same command afterwards ends with the numbers of one that was never disturbed: nothing is
lost, nothing is made twice, every byte is checked. `make test-faults`."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from places import Place, made, processes
from programs import NUMBERS

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes left behind in /proc"),
]

#: Kills in all.
POINTS = 200

SETTINGS = """
[store]
uri = "unused"
[runtime]
platform = "cpu"
compilation_cache = "{folder}/programs"

[presets.target.bowl]
family = "quadratic"
dim = 6
data = {{ n_data = 1000 }}
[presets.target.net]
family = "mlp"
model = {{ depth = 1, width = 4 }}
data = {{ n_data = 200, input_dim = 4 }}
training = {{ num_steps = 2000 }}

[presets.sampler.sgld]
kind = "sgld"
step_size = 1e-4
batch_size = 100
num_draws = 4000
num_burnin_steps = 2000
[presets.sampler.hmc]
kind = "hmc"
num_draws = 2000

[experiments.default]
sweeps = [["target=bowl,net", "sampler.hmc.seed=1,2", "sampler=sgld,hmc"]]
"""

#: Targets, runs, diagnoses and the sweep's comparison.
TOTAL = 2 + 6 + 6 + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def place(folder):
    """By name: a store of its own, filled by the same settings."""
    settings = folder / "settings.toml"
    settings.write_text(SETTINGS.format(folder=folder))
    return lambda name: Place(folder, name, settings)


@pytest.fixture(scope="module")
def undisturbed(place):
    """The numbers of the rows, and the traces' checksums."""
    quiet = place("undisturbed")
    rows, _ = quiet.finish()
    assert len(rows) == 6
    return numbers(rows), traces(quiet)


def numbers(rows):
    return [{name: row[name] for name in NUMBERS} for row in rows]


def traces(place):
    return {address: m.file("trace.npz").sha256 for address, m in place.published().items() if address.kind == "run"}


def check_finished(place, undisturbed, rows):
    """The table and the traces are those of the undisturbed sweep; nothing is missing, doubled, damaged or left unfinished."""
    assert (numbers(rows), traces(place)) == undisturbed
    assert len(place.published()) == TOTAL
    assert not place.has("targets/**/checkpoint")


def test_killed_at_random_points(place, undisturbed, capsys):
    moment = random.Random(0)
    seconds, points, stores = 30.0, 0, 0
    killed = {"all": 0, "flow": 0, "server": 0}
    while points < POINTS:
        stores += 1
        store, kept = place(f"killed-{stores}"), {}
        while True:
            victim = moment.choice(sorted(killed))
            with store.sweep() as (process, _):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=moment.uniform(0, seconds))
                ended = process.poll() == 0
                if not ended:
                    points += 1
                    killed[victim] += 1
                    kill(process, victim)
            finished = made(store.published())
            assert kept.items() <= finished.items(), "what was finished before was made again, or lost"
            kept = finished
            if ended or points >= POINTS:
                break
        rows, _ = store.finish()
        check_finished(store, undisturbed, rows)
        assert kept.items() <= made(store.published()).items()
    with capsys.disabled():
        print(f"\n| killed | points | lost | doubled |\n|---|---|---|---|\n| {killed} | {points} | 0 | 0 | in {stores} stores")


def kill(process, victim):
    """The whole group, the flow's process or the embedded server's; what is left has a moment to do harm."""
    servers = [number for number, command in processes(process.pid).items() if "uvicorn" in command]
    numbers = {"all": list(processes(process.pid)), "flow": [process.pid], "server": servers}[victim]
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    if victim != "all":
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)


def test_two_sweeps_at_once(place, undisturbed):
    one, other = place("shared"), place("shared")
    other.name = "shared-too"  # of its logs
    with one.sweep() as (first, log), other.sweep() as (second, other_log):
        assert [first.wait(timeout=240), second.wait(timeout=240)] == [0, 0], (
            log.read_text()[-2000:] + other_log.read_text()[-2000:]
        )
    for path in (log, other_log):
        check_finished(one, undisturbed, json.loads(path.with_suffix(".json").read_text()))


def test_disk_full(place, undisturbed, folder):
    disk = folder / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in Path(place("undisturbed").store.uri).rglob("*") if path.is_file())
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size // 3}", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        small = place("disk")
        with small.sweep() as (process, log):
            assert process.wait(timeout=240) == 1
        assert "No space left on device" in log.read_text()
        kept = made(small.published())
        assert len(kept) < TOTAL
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
        rows, _ = small.finish()
        check_finished(small, undisturbed, rows)
        assert kept.items() <= made(small.published()).items()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_damaged_and_truncated(place, undisturbed, folder):
    """Each kind of damage is seen; after what the message says, the same command makes what is missing, and only that."""
    choice = random.Random(1)
    place("undisturbed").finish()
    for damage in ("flip", "truncate", "empty", "delete", "manifest"):
        broken = place(f"broken-{damage}")
        shutil.copytree(place("undisturbed").store.uri, broken.store.uri)
        for path in choice.sample(sorted(Path(broken.store.uri).glob("**/files/*/*.npz")), 3):
            content = bytearray(path.read_bytes())
            if damage == "flip":
                content[choice.randrange(len(content))] ^= 0xFF
            if damage == "delete":
                path.unlink()
            elif damage == "manifest":
                (path.parents[2] / "manifest.json").write_text("{")
            else:
                path.write_bytes({"truncate": content[:-1], "empty": b""}.get(damage, content))
        problems = [problem for _, problem in broken.store.verify() if problem]
        assert 0 < len(problems) <= 3
        for problem in problems:  # a file of the right size is only read where it is needed: the user deletes its manifest
            if found := re.search(r"Delete (\S+) and", problem):
                Path(found[1]).unlink()
        rows, _ = broken.finish()
        check_finished(broken, undisturbed, rows)


def test_clock_going_back(place, undisturbed):
    if not shutil.which("faketime"):
        pytest.skip("needs Debian's faketime")
    late = place("late")
    with late.sweep() as (process, _), contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=12)
    kept = made(late.published())
    late.before = ["faketime", "-f", "-3d"]
    late.environment["FAKETIME_DONT_FAKE_MONOTONIC"] = "1"
    rows, _ = late.finish()
    check_finished(late, undisturbed, rows)
    assert kept.items() <= made(late.published()).items()
