"""Publishers are killed with SIGKILL while a reader checks every byte it is shown.

This file is also the program of the publishers and of the reader: `python test_store_crash.py ROLE FOLDER ARGUMENT`.
"""

import contextlib
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lambda_hat.store.manifest import ArtifactError, run_address, target_address
from lambda_hat.store.store import Store

CHECKPOINT = run_address("tgt_" + "f" * 16, "run_" + "f" * 16)
SIZES = {"params.npz": 300_000, "data/x.npz": 150_000, "metrics.json": 500}


def address(number: int):
    return target_address(f"tgt_{number:016x}")


def contents(number: int) -> dict[str, bytes]:
    return {name: random.Random(f"{number} {name}").randbytes(size) for name, size in SIZES.items()}


def publish_until_killed(folder: str, first: str) -> None:
    store = Store(folder)
    print("ready", flush=True)
    for number in itertools.count(int(first)):
        store.publish(address(number), contents(number), spec={"number": number}, summary={"text": "x" * 20_000})
        store.save_checkpoint(CHECKPOINT, bytes(200_000 + number))


def publish_once(folder: str, count: str) -> None:
    store = Store(folder)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(count)):
        store.publish(address(number), contents(number), spec={"number": number}, summary={})


def read_until_told(folder: str, stop: str) -> None:
    """Reports what was read, and every artifact or checkpoint that was shown and then was not whole."""
    store = Store(folder)
    seen, reads, bad, had_checkpoint = set(), 0, [], False
    print("ready", flush=True)
    while not Path(stop).exists():
        with contextlib.suppress(FileNotFoundError):
            numbers = sorted(int(path.name[4:], 16) for path in (Path(folder) / "targets").iterdir())
            for number in numbers[-8:-1]:  # where the publishers are at work; the last is the checkpoint's
                if store.exists(address(number)):
                    seen.add(number)
            for number in random.sample(sorted(seen), min(4, len(seen))):
                try:
                    good = {name: store.read(address(number), name) for name in SIZES} == contents(number)
                    reads += len(SIZES)
                except ArtifactError as error:
                    good, problem = False, str(error)
                else:
                    problem = "other bytes than were published"
                if not good:
                    bad.append(problem)
        checkpoint = store.load_checkpoint(CHECKPOINT)
        if had_checkpoint and (checkpoint is None or checkpoint.strip(b"\0")):
            bad.append("the checkpoint is torn")
        had_checkpoint = had_checkpoint or checkpoint is not None
        reads += had_checkpoint
    print(json.dumps({"reads": reads, "seen": len(seen), "bad": bad}))


@contextlib.contextmanager
def program(role: str, *arguments: object):
    """A process in `role`, past its imports; killed at the end if it still runs."""
    command = [sys.executable, "-W", "error", __file__, role, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def attempts(folder: Path) -> list[Path]:
    return list(folder.glob("targets/*/files/*"))


@pytest.mark.timeout(120)
def test_killed_publishers_never_show_a_broken_artifact(tmp_path):
    folder, stop = tmp_path / "store", tmp_path / "stop"
    moment = random.Random(0)
    with program("read_until_told", folder, stop) as reader:
        for round_ in range(8):
            with contextlib.ExitStack() as stack:
                publishers = [stack.enter_context(program("publish_until_killed", folder, 1000 * round_)) for _ in range(2)]
                for publisher in publishers:
                    time.sleep(moment.uniform(0.05, 0.3))
                    publisher.kill()
                    publisher.wait()
        stop.touch()
        report = json.loads(reader.communicate(timeout=60)[0])

    assert report["bad"] == []
    assert report["reads"] > 200
    assert report["seen"] > 8

    incomplete = [
        attempt
        for attempt in attempts(folder)
        if any(not (attempt / name).exists() or (attempt / name).stat().st_size != size for name, size in SIZES.items())
    ]
    assert incomplete, "no kill came while files were written, so nothing was tested"

    store = Store(str(folder))
    assert [problem for _, problem in store.verify() if problem] == []
    left_behind = [int(path.parts[-3][4:], 16) for path in incomplete]
    for number in left_behind:
        store.publish(address(number), contents(number), spec={}, summary={})
        assert {name: store.read(address(number), name) for name in SIZES} == contents(number)
    assert [problem for _, problem in store.verify() if problem] == []


@pytest.mark.timeout(60)
def test_concurrent_publishers_of_the_same_ids_agree(tmp_path):
    count = 30
    with contextlib.ExitStack() as stack:
        publishers = [stack.enter_context(program("publish_once", tmp_path, count)) for _ in range(3)]
        for publisher in publishers:
            publisher.stdin.write("go\n")
            publisher.stdin.flush()
        for publisher in publishers:
            publisher.communicate(timeout=60)
            assert publisher.returncode == 0
    assert len(attempts(tmp_path)) > count, "no two publishers met at one id, so nothing was tested"
    store = Store(str(tmp_path))
    checked = list(store.verify())
    assert len(checked) == count
    assert [problem for _, problem in checked if problem] == []
    for number in range(count):
        assert {name: store.read(address(number), name) for name in SIZES} == contents(number)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
