"""A store, and the program that fills it in a process group of its own, to be stopped and gone on with."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from programs import CHECKOUT, environment, wait_for

from flows.ends import STOPPED
from lambda_hat.store.manifest import Address, Manifest
from lambda_hat.store.store import Store


def processes(group: int) -> dict[int, str]:
    """Command lines of the live processes of a process group, by number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, process_group, *_ = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(process_group) == group and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def gone(group: int, seconds: float = 5) -> dict[int, str]:
    """The processes of a group that are left when all have had time to end: what none should be."""
    deadline = time.monotonic() + seconds
    while (left := processes(group)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


class Place:
    """One store, and the program that fills it; `python flows/sweep.py` in a process group of its own."""

    def __init__(self, folder: Path, name: str, settings: Path, uri: str = "") -> None:
        self.store, self.settings = Store(uri or str(folder / name)), settings
        self.logs, self.name = folder, name
        self.environment = environment(folder)
        self.count = 0

    def sweep(self) -> contextlib.AbstractContextManager[tuple[subprocess.Popen, Path]]:
        """The running program and its log; at the end it and all it started are gone."""
        return self.program("flows/sweep.py", "--json", "--settings", str(self.settings), "--store", self.store.uri)

    @contextlib.contextmanager
    def program(self, *arguments: str) -> Iterator[tuple[subprocess.Popen, Path]]:
        """The same of any program of the checkout."""
        self.count += 1
        log = self.logs / f"{self.name}-{self.count}.log"
        command = [sys.executable, *arguments]
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
            assert gone(process.pid, 30) == {}

    def finish(self) -> tuple[list[dict], str]:
        """Runs the program to its end: rows and log. It takes its server with it."""
        with self.sweep() as (process, log):
            assert process.wait(timeout=240) == 0, log.read_text()[-3000:]
            assert processes(process.pid) == {}
        return json.loads(log.with_suffix(".json").read_text()), log.read_text()

    def stop_when(self, condition: Callable[[], bool], how: signal.Signals) -> str:
        """Starts the program and signals it, and its server, as soon as the condition holds; returns its log."""
        with self.sweep() as (process, log):
            wait_for(condition, process, log)
            assert any("flows.server" in command for command in processes(process.pid).values())
            os.killpg(process.pid, how)
            status = process.wait(timeout=30)
            if how == signal.SIGINT:  # as Ctrl-C in a terminal
                assert status == 130
                assert gone(process.pid) == {}
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
