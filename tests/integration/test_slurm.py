"""A sweep on a real Slurm, whose jobs are its workers: one cancelled at work is replaced; the numbers are those of threads."""

import json
import subprocess
import time

import pytest
import slurm
from programs import wait_for
from sweeps import Sweeps, prefect_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(slurm.missing()), reason=f"needs {slurm.missing()}: apt-get install slurm-wlm munge"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which sbatch, squeue and scancel find it."""
    with slurm.running(tmp_path_factory.mktemp("slurm") / "slurm") as environment:
        yield {name: environment[name] for name in ("PATH", "SLURM_CONF")}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    with prefect_server(folder) as url:
        yield Sweeps(folder, url, num_draws=20_000)


def test_a_cancelled_worker_is_replaced(sweeps, cluster):
    arguments = {
        "memory": "2GB", "walltime": "00:30:00", "interface": "lo", "job_directives_skip": ["--mem"],
        "log_directory": str(sweeps.folder / "jobs"), "local_directory": str(sweeps.folder / "scratch"),
    }  # fmt: skip
    variables = {"LAMBDA_HAT_RUNTIME__ENGINE": "slurm", "LAMBDA_HAT_RUNTIME__MAX_WORKERS": "1"}
    variables |= {"LAMBDA_HAT_RUNTIME__SLURM": json.dumps(arguments)} | cluster

    def jobs() -> list[str]:
        queue = subprocess.run(["squeue", "-h", "-o", "%i"], env=cluster, check=True, capture_output=True, text=True)
        return queue.stdout.split()

    threads = sweeps.finish("threads")
    with sweeps.start("slurm", **variables) as process:
        store = sweeps.folder / "slurm"
        wait_for(lambda: any(store.glob("targets/*/runs/*/checkpoint")), process, sweeps.log("slurm"))
        (job,) = jobs()
        subprocess.run(["scancel", job], env=cluster, check=True)
        assert process.wait(timeout=400) == 0, sweeps.log("slurm").read_text()[-3000:]
    assert [row["status"] for row in threads.rows] == ["computed"] * 4
    assert [row["status"] for row in sweeps.rows("slurm")] == ["computed"] * 4
    sweeps.assert_same_draws("threads", "slurm")
    assert len(list((sweeps.folder / "jobs").glob("*.out"))) >= 2, "no job took over"
    deadline = time.monotonic() + 60
    while jobs():
        assert time.monotonic() < deadline, "jobs outlive their sweep"
        time.sleep(0.5)
