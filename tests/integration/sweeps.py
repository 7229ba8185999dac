"""`python flows/sweep.py` and `prefect server` as programs, for the tests of engines."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from programs import CHECKOUT, environment, free_ports, wait_for

from lambda_hat.llc.plan import make_plan
from lambda_hat.specs.settings import load_settings
from lambda_hat.store.arrays import unpack_arrays
from lambda_hat.store.manifest import run_address
from lambda_hat.store.store import Store

SETTINGS = """
[store]
uri = "unused"
[runtime]
platform = "cpu"
compilation_cache = ""
progress_seconds = 1

[presets.target.bowl]
family = "quadratic"
dim = 4
data = {{ n_data = 300 }}
[presets.target.net]
family = "mlp"
model = {{ depth = 1, width = 3 }}
data = {{ n_data = 300, input_dim = 3 }}
training = {{ num_steps = 500 }}
[presets.sampler.sgld]
kind = "sgld"
step_size = 1e-3
batch_size = 64
num_draws = {num_draws}
[presets.sampler.hmc]
kind = "hmc"
num_draws = {num_draws}

[experiments.default]
sweeps = [["target=bowl,net", "sampler=sgld,hmc"]]
[experiments.diverges]
sweeps = [
  ["target=net", "sampler=sgld", "training.optimizer=sgd", "training.learning_rate=1e6"],
  ["target=bowl", "sampler=hmc"],
]
"""


@contextlib.contextmanager
def program(log: Path, *command: str, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs meanwhile, in a process group of its own, which is ended. Its stdout is beside its log, as .out."""
    with log.open("wb") as err, log.with_suffix(".out").open("wb") as out:
        process = subprocess.Popen(command, env=env, cwd=CHECKOUT, stdout=out, stderr=err, start_new_session=True)
    try:
        yield process
    finally:
        for number in (15, 9):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)


@contextlib.contextmanager
def prefect_server(folder: Path) -> Iterator[str]:
    """The address of a server's API."""
    [port], log = free_ports(1), folder / "server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]

    def healthy() -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5).status == 200
        return False

    with program(log, *command, env=environment(folder)) as process:
        wait_for(healthy, process, log)
        yield f"http://127.0.0.1:{port}/api"


class Sweeps:
    """Runs sweeps of the settings above, each engine into a store of its own."""

    def __init__(self, folder: Path, url: str, num_draws: int = 100) -> None:
        self.folder, self.url = folder, url
        self.settings = folder / "settings.toml"
        self.settings.write_text(SETTINGS.format(num_draws=num_draws))

    def start(self, name: str, *arguments: str, **variables: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        """The running program; its log is `log(name)`."""
        command = [
            sys.executable,
            "flows/sweep.py",
            "--json",
            "--settings",
            str(self.settings),
            "--store",
            self.store(name).uri,
        ]
        env = environment(self.folder, PREFECT_API_URL=self.url, **variables)
        return program(self.log(name), *command, *arguments, env=env)

    def finish(self, name: str, *arguments: str, **variables: str) -> SimpleNamespace:
        """Runs the program to its end: status and rows."""
        with self.start(name, *arguments, **variables) as process:
            status = process.wait(timeout=400)
        return SimpleNamespace(status=status, rows=self.rows(name))

    def rows(self, name: str) -> list[dict]:
        return json.loads(self.log(name).with_suffix(".out").read_text())

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def store(self, name: str) -> Store:
        return Store(str(self.folder / name))

    def assert_same_draws(self, one: str, other: str) -> None:
        """Bit for bit, of every run of the default experiment."""
        for spec in make_plan(load_settings(self.settings)):
            address = run_address(spec.target_id, spec.run_id)
            first, second = (unpack_arrays(self.store(name).read(address, "trace.npz")) for name in (one, other))
            assert first.keys() == second.keys()
            for field, draws in first.items():
                np.testing.assert_array_equal(second[field], draws, strict=True)
