"""Whatever happens to a sweep, the same command afterwards ends with the numbers of one that was never disturbed: nothing is
lost, nothing is made twice, every byte is checked, and what is left behind is removed by `gc`. `make test-faults` prints a
table.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from deployed import Terminals, documented, terminals
from faults import SETTINGS, Tally, check_finished, chosen, content, disturb, ends_well, is_complete, runs_for
from places import Place, made, processes
from programs import wait_for
from swift import NotInstallable, swift

from lambda_hat.store.manifest import StoreUnavailable, target_address
from lambda_hat.store.store import Store

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes left behind in /proc"),
]

#: How often each is killed, at a random moment of a sweep: of one with an embedded server, and of one with a standing server.
EMBEDDED = {"sweep and embedded server": 20, "sweep": 20, "embedded server": 20}
STANDING = {"sweep beside a standing server": 90, "standing server": 25}
WORKER = {"worker": 12, "worker and its run": 13}

SERVER = "prefect server start --no-ui"

#: How often the S3 server is, while a file is sent to it, and while a sweep runs.
UPLOADS, S3_SWEEPS = 16, 10


@pytest.fixture(scope="module")
def tallies(request) -> Iterator[Callable[[str], Tally]]:
    """By the name of the fault; printed at the end, whatever failed."""
    kept: dict[str, Tally] = {}
    yield lambda fault: kept.setdefault(fault, Tally())
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n| fault | points | lost | doubled | left behind, removed by gc |\n|---|---|---|---|---|")
        for fault, tally in kept.items():
            print(f"| {fault} | {tally.points} | {tally.lost} | {tally.doubled} | {tally.left} |")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def place(folder):
    """By name: a store of its own, filled by the same settings."""
    settings = folder / "settings.toml"
    settings.write_text(SETTINGS.format(folder=folder))
    return lambda name, uri="": Place(folder, name, settings, uri)


@pytest.fixture(scope="module")
def standing(folder) -> Iterator[Terminals]:
    """Someone with a server that runs."""
    (folder / "standing").mkdir()
    with terminals(folder / "standing", "unused") as reader:
        reader.type(SERVER)
        yield reader


@pytest.fixture(scope="module")
def undisturbed(place):
    """What it found, and how long it takes once its programs are compiled."""
    quiet = place("undisturbed")
    rows, _ = quiet.finish()
    assert [row["status"] for row in rows] == ["computed"] * 3
    began = time.monotonic()
    place("again").finish()
    return SimpleNamespace(content=content(quiet.published()), seconds=time.monotonic() - began)


def test_killed_with_an_embedded_server(place, undisturbed, tallies):
    moment = random.Random(0)

    def strike(store: Place, victim: str) -> tuple[bool, bool]:
        with store.sweep() as (process, log):
            if not runs_for(process, moment.uniform(0, undisturbed.seconds), log):
                return False, True
            kill(process, victim)
        return True, False

    disturb(place, undisturbed, chosen(EMBEDDED, moment), tallies, strike)


def kill(process: subprocess.Popen, victim: str) -> None:
    """What is left has a moment to do harm."""
    group = processes(process.pid)
    numbers = {
        "kill -9: sweep and embedded server": list(group),
        "kill -9: sweep": [process.pid],
        "kill -9: embedded server": [number for number, words in group.items() if "uvicorn" in words],
    }[victim]
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    if numbers != list(group):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)


def test_killed_with_a_standing_server(place, undisturbed, tallies, standing):
    """The server starts again on its database within seconds; the sweep goes on, or ends and is called again."""
    moment = random.Random(1)

    def strike(store: Place, victim: str) -> tuple[bool, bool]:
        store.environment["PREFECT_API_URL"] = f"{standing.url}/api"
        with store.sweep() as (process, log):
            if not runs_for(process, moment.uniform(0, 0.7 * undisturbed.seconds), log):  # no server has to start
                return False, True
            if victim != "kill -9: standing server":
                return True, False  # it is killed
            standing.kill()
            time.sleep(moment.uniform(0, 3))
            standing.type(SERVER)
            return True, ends_well(process)

    disturb(place, undisturbed, chosen(STANDING, moment), tallies, strike)


def test_worker_killed(place, undisturbed, tallies, standing):
    """Alone, so that its run goes on beside the one a new worker starts, or with its run."""
    moment, pids = random.Random(2), list[int]()
    for line in documented("Server, pool, worker")[1:]:
        standing.type(line)
    [deployment] = standing.api("deployments/filter", {"deployments": {"name": {"any_": ["sweep"]}}})

    def strike(store: Place, victim: str) -> tuple[bool, bool]:
        parameters = {"store_uri": store.store.uri, "settings_file": str(store.settings)}
        run = standing.api(f"deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"]
        deadline = time.monotonic() + moment.uniform(0, undisturbed.seconds)
        while (found := standing.api(f"flow_runs/{run}"))["state_type"] in ("SCHEDULED", "PENDING", "RUNNING"):
            if time.monotonic() > deadline and found["state_type"] != "SCHEDULED":  # the worker has it
                standing.kill()
                if found["infrastructure_pid"]:
                    pids.append(int(found["infrastructure_pid"]))
                if victim.endswith("and its run"):
                    kill_all(pids)
                standing.type("prefect worker start --pool lambda-hat --limit 1")
                return True, False
            time.sleep(0.2)
        assert found["state_type"] == "COMPLETED", found["state"]
        kill_all(pids)
        return False, True

    try:
        disturb(place, undisturbed, chosen(WORKER, moment), tallies, strike)
    finally:
        kill_all(pids)


def kill_all(pids: list[int]) -> None:
    """Each is the first of a process group."""
    while pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pids.pop(), signal.SIGKILL)


def test_s3_server_killed(place, undisturbed, tallies, folder, monkeypatch):
    """While it is sent a file, in one request or in parts, and while a sweep runs; it has kept what it had confirmed."""
    moment, tally = random.Random(3), tallies("kill -9: S3 server, during an upload")
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(swift(folder / "swift"))
        except NotInstallable as error:
            pytest.skip(str(error))
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("faults")
        store = Store("s3://faults/uploads", cache="")
        for number in range(UPLOADS):
            data = os.urandom((8, 120)[number % 2] << 20)  # s3fs sends more than 100 MB in parts
            address = target_address(f"tgt_{number:016x}")
            with ThreadPoolExecutor(1) as pool:
                upload = pool.submit(store.publish, address, {"params.npz": data}, spec={}, summary={})
                time.sleep(moment.uniform(0, (0.3, 3)[number % 2]))
                tally.points += not upload.done()
                server.kill()
                time.sleep(moment.uniform(0, 10))
                server.start()
                error = upload.exception()
            assert error is None or isinstance(error, StoreUnavailable), error
            there = store.manifest(address)
            assert there or error, "it was confirmed"
            again = store.publish(address, {"params.npz": data}, spec={}, summary={})
            assert there in (None, again)
            assert store.read(address, "params.npz") == data
        assert len(list(store.verify())) == UPLOADS
        left = list(store.clean(hours=0))
        tally.left += len(left)
        assert list(store.clean(hours=0)) == []
        assert [problem for _, problem in store.verify()] == [None] * UPLOADS

        def strike(store: Place, victim: str) -> tuple[bool, bool]:
            with store.sweep() as (process, log):
                if not runs_for(process, moment.uniform(0, undisturbed.seconds), log):
                    return False, True
                server.kill()
                time.sleep(moment.uniform(0, 20))
                server.start()
                return True, ends_well(process)

        def remote(name: str) -> Place:
            store = place(name, f"s3://faults/{name}")
            store.environment |= server.environment
            return store

        disturb(remote, undisturbed, ["kill -9: S3 server, during a sweep"] * S3_SWEEPS, tallies, strike)


def test_two_sweeps_at_once(place, undisturbed, tallies):
    one, other = place("shared"), place("shared")
    other.name = "shared-too"  # of its logs
    with one.sweep() as (first, log), other.sweep() as (second, other_log):
        assert [first.wait(timeout=240), second.wait(timeout=240)] == [0, 0], (
            log.read_text()[-2000:] + other_log.read_text()[-2000:]
        )
    tally = tallies("two sweeps into one store at once")
    tally.points += 1
    check_finished(one, undisturbed, tally)


def test_disk_full(place, undisturbed, folder, tallies):
    """Again and again, each time with a little more room."""
    disk = folder / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in Path(place("undisturbed").store.uri).rglob("*") if path.is_file())
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size // 10}", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    tally, kept = tallies("disk full"), {}
    try:
        small = place("disk")
        for tenths in (1, 2, 4, 40):
            subprocess.run(["mount", "-o", f"remount,size={tenths * size // 10}", str(disk)], check=True)
            with small.sweep() as (process, log):
                status = process.wait(timeout=240)
            tally.points += "No space left on device" in log.read_text()
            finished = made(small.published())
            tally.compare(kept, finished)
            assert (status == 0) == is_complete(finished) == (tenths == 40), log.read_text()[-3000:]
            kept = finished
        assert tally.points == 3
        check_finished(small, undisturbed, tally)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_damaged_and_truncated(place, undisturbed, tallies):
    """Each kind of damage is seen; after what the message says, the same command makes what is missing, and only that."""
    choice = random.Random(1)
    place("undisturbed").finish()
    for damage in ("flip", "truncate", "empty", "delete", "manifest"):
        tally = tallies(f"damaged files: {damage}")
        broken = place(f"broken-{damage}")
        shutil.copytree(place("undisturbed").store.uri, broken.store.uri)
        whole = made(broken.published())
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
            tally.points += 1
        problems = {address: problem for address, problem in broken.store.verify() if problem}
        assert 0 < len(problems) <= 3
        # A file of the right size is only read where it is needed: the user deletes its manifest.
        for problem in problems.values():
            if found := re.search(r"Delete (\S+) and", problem):
                Path(found[1]).unlink()
        broken.finish()
        tally.compare({address: how for address, how in whole.items() if address not in problems}, made(broken.published()))
        check_finished(broken, undisturbed, tally)


#: For LD_PRELOAD: what a process takes for the time of day is three days ago.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec -= 3 * 24 * 60 * 60;
    return status;
}
"""


def test_clock_going_back(place, undisturbed, tallies, folder):
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    (folder / "clock.c").write_text(CLOCK)
    library = folder / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "clock.c", "-ldl"], check=True)
    late, tally = place("late"), tallies("clock three days back, after kill -9")
    with late.sweep() as (process, log):
        wait_for(lambda: late.has("targets/*/runs/*/manifest.json"), process, log)
    before = late.published()
    late.environment["LD_PRELOAD"] = str(library)
    tally.points += 1
    late.finish()
    after = late.published()
    tally.compare(made(before), made(after))
    days = {manifest.created_at[:10] for address, manifest in after.items() if address not in before}
    assert days
    assert max(days) < min(manifest.created_at[:10] for manifest in before.values())
    check_finished(late, undisturbed, tally)
