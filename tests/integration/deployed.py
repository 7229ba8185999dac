"""What docs/deployment.md describes, for tests: its commands are typed out of it, on a server of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
from programs import CHECKOUT, environment, free_ports

T = TypeVar("T")


def documented(section: str) -> list[str]:
    """The commands of a section of the document, line by line."""
    text = (CHECKOUT / "docs" / "deployment.md").read_text()
    [body] = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return [
        line for block in re.findall(r"^```shell\n(.*?)^```", body, re.DOTALL | re.MULTILINE) for line in block.splitlines()
    ]


def wait_for(condition: Callable[[], T], what: str, seconds: float = 120) -> T:
    """What the condition returns, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)
    return found


class Terminals:
    """The terminals of someone who follows the document, in one folder and one environment."""

    def __init__(self, folder: Path, store_uri: str) -> None:
        [self.port], self.folder, self.running = free_ports(1), folder, list[subprocess.Popen]()
        self.environment = environment(folder) | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "250",
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "LAMBDA_HAT_STORE__URI": store_uri,
            "LAMBDA_HAT_RUNTIME__PLATFORM": "cpu",
            "LAMBDA_HAT_RUNTIME__COMPILATION_CACHE": str(folder / "programs"),
            "LAMBDA_HAT_RUNTIME__PROGRESS_SECONDS": "1",
        }
        self.log = folder / "log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def type(self, command: str, status: int = 0) -> str:
        """Types a command; returns what it prints. `export` holds for all that follows; a server or a worker runs on."""
        command = command.replace("127.0.0.1:4200", f"127.0.0.1:{self.port}")
        if command.startswith("export "):
            name, value = command.removeprefix("export ").split("=", 1)
            self.environment[name] = value
            return ""
        if command.startswith(("prefect server start", "prefect worker start")):
            with self.log.open("ab") as log:
                process = subprocess.Popen(
                    ["bash", "-c", f"exec {command}"], cwd=CHECKOUT, env=self.environment, stdout=log, stderr=log,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            self.running.append(process)
            if "server" in command:
                wait_for(lambda: self._healthy(process), "the server")
            return ""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=CHECKOUT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}\n{self.log.read_text()[-5000:]}"
        return done.stdout + done.stderr

    def _healthy(self, process: subprocess.Popen) -> bool:
        assert process.poll() is None, self.log.read_text()[-5000:]
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/api/health").is_success
        return False

    def api(self, path: str, filters: dict | None = None) -> list | dict:
        """What the server's API answers: to a GET, or to a POST of filters."""
        user, password = self.environment.get("PREFECT_API_AUTH_STRING", ":").split(":")
        done = httpx.request(
            "GET" if filters is None else "POST", f"{self.url}/api/{path}", json=filters, auth=(user, password), timeout=60
        )
        return done.raise_for_status().json()

    def kill(self) -> None:
        """What was started last, by SIGKILL."""
        process = self.running.pop()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """Stops workers first, as they would wait for the server; and whatever they have left."""
        for process in reversed(self.running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def terminals(folder: Path, store_uri: str) -> Iterator[Terminals]:
    opened = Terminals(folder, store_uri)
    try:
        yield opened
    finally:
        opened.close()


def flow_run_id(printed: str) -> str:
    """The id in what `prefect deployment run` printed."""
    [found] = re.findall(r"UUID: ([0-9a-f-]{36})", printed)
    return found
