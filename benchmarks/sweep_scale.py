"""What sweeps of many runs cost besides computing: `python benchmarks/sweep_scale.py`. Prints a Markdown table.

Each sweep is of one target and of runs that no program can sample together, first in a fresh store with a fresh Prefect home,
then again unchanged. `tiny` runs take milliseconds to sample, so that the time is that of tasks, store and diagnoses; `real`
ones are those of a study. Computing is as in sweep_overhead.py; memory is the peak of the largest process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from sweep_overhead import _union

ROOT = Path(__file__).parent.parent
KINDS = {
    "tiny": ["target=quadratic", "target.dim=2", "sampler=hmc", "sampler.num_chains=2", "sampler.num_burnin_steps=100"],
    "real": ["target=mlp-small", "sampler=hmc"],
}
FIRST = {"tiny": 100, "real": 2000}  # num_draws, different in every run


def main() -> int:
    options = _options()
    print(
        "| kind | runs | engine | server | sweep | wall | computing | not computing | a run | task runs | memory |\n|"
        + "---|" * 11
    )
    for kind in options.kinds:
        for count in options.runs:
            overrides = [*KINDS[kind], f"sampler.num_draws=range({FIRST[kind]},{FIRST[kind] + count})"]
            for engine in options.engines:
                for server in options.servers:
                    with tempfile.TemporaryDirectory() as folder, _environment(folder, engine, server):
                        for sweep in ("first", "again"):
                            _row([kind, str(count), engine, server, sweep], overrides, count)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["tiny"])
    parser.add_argument("--runs", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--engines", nargs="+", choices=["threads", "processes"], default=["threads", "processes"])
    parser.add_argument("--servers", nargs="+", choices=["embedded", "standing"], default=["embedded", "standing"])
    return parser.parse_args()


def _row(names: list[str], overrides: list[str], count: int) -> None:
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, "flows/sweep.py", *overrides], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.args
    wall = time.time() - began
    intervals = _task_runs(began)
    other = wall - _union(intervals)
    cells = [f"{wall:.1f} s", f"{wall - other:.1f} s", f"{other:.1f} s ({other / wall:.0%})", f"{1000 * other / count:.0f} ms"]
    print("| " + " | ".join([*names, *cells, f"{len(intervals)}", f"{usage.ru_maxrss / 2**10:.0f} MB"]) + " |", flush=True)


def _task_runs(since: float) -> list[tuple[float, float]]:
    """(start, end) of the tasks that ran since then, by Prefect's own record, in a process that reads the environment anew."""
    code = """
import sys
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    offset = 0
    while runs := client.read_task_runs(limit=200, offset=offset):
        offset += len(runs)
        for run in runs:
            if run.start_time and run.end_time and run.start_time.timestamp() >= float(sys.argv[1]):
                print(run.start_time.timestamp(), run.end_time.timestamp())
"""
    lines = subprocess.run(
        [sys.executable, "-c", code, str(since)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [(float(start), float(end)) for start, end in (line.split() for line in lines)]


@contextlib.contextmanager
def _environment(folder: str, engine: str, server: str) -> Iterator[None]:
    """Homes and settings of the programs that run inside, in this process's environment."""
    before = dict(os.environ)
    os.environ |= {
        "PREFECT_HOME": f"{folder}/prefect",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "LAMBDA_HAT_STORE__URI": f"{folder}/store",
        "LAMBDA_HAT_RUNTIME__COMPILATION_CACHE": f"{folder}/cache",
        "LAMBDA_HAT_RUNTIME__ENGINE": engine,
    }
    try:
        if server == "embedded":
            yield
            return
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        try:
            while not _healthy(port):
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait()
    finally:
        os.environ.clear()
        os.environ |= before


def _healthy(port: int) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health").status == 200
    return False


if __name__ == "__main__":
    sys.exit(main())
