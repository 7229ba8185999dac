"""What a sweep costs besides computing: `python benchmarks/sweep_overhead.py`. Prints a Markdown table.

Runs the default experiment as a user does, in a fresh store with a fresh Prefect home and compilation cache, then again
unchanged. Computing is the time in which at least one task (build-target, sample, diagnose, compare) was running; the rest of
the process's wall time is starting Python, the embedded server, orchestration and stopping.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "PREFECT_HOME": f"{folder}/prefect",
            "LAMBDA_HAT_STORE__URI": f"{folder}/store",
            "LAMBDA_HAT_RUNTIME__COMPILATION_CACHE": f"{folder}/cache",
        }
        command = [sys.executable, "flows/sweep.py", *sys.argv[1:]]
        print("| run | wall time | computing | not computing | task runs |\n|" + "---|" * 5)
        for name in ("first", "again"):
            began = time.time()
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            wall = time.time() - began
            intervals = _task_runs(began)
            computing = _union(intervals)
            print(f"| {name} | {wall:.1f} s | {computing:.1f} s | {1 - computing / wall:.0%} | {len(intervals)} |", flush=True)
    return 0


def _task_runs(since: float) -> list[tuple[float, float]]:
    """(start, end) of the tasks that ran since then, by Prefect's own record; cached ones never ran."""
    from prefect.client.orchestration import get_client  # reads PREFECT_HOME when imported

    with get_client(sync_client=True) as client:
        runs = client.read_task_runs()
    times = [(run.start_time.timestamp(), run.end_time.timestamp()) for run in runs if run.start_time and run.end_time]
    return [(start, end) for start, end in times if start >= since]


def _union(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of the intervals."""
    total, reached = 0.0, 0.0
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    sys.exit(main())
