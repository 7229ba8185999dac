"""Sweeps on Dask: a standing cluster gives the numbers of threads; workers that die are survived or reported."""

import contextlib
import os
import signal
import sys
import time

import pytest
from prefect import flow, task
from programs import environment, free_ports, wait_for
from sweeps import Sweeps, prefect_server, program

from flows.engines import engine, final_state
from flows.progress import ENDED
from lambda_hat.specs.settings import Runtime

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dask")


@pytest.fixture(scope="module")
def sweeps(folder):
    with prefect_server(folder) as url:
        yield Sweeps(folder, url)


@pytest.fixture
def cluster(folder):
    """The address of a scheduler with two workers, each a process with one thread for tasks, and the workers' logs."""
    [port] = free_ports(1)
    address = f"tcp://127.0.0.1:{port}"
    env = environment(folder / "elsewhere")  # Prefect's results, kept there, are not the flow's to read
    dask = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-dashboard",
    ]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    logs = [folder / f"dask-worker-{index}.log" for index in range(2)]
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(program(folder / "scheduler.log", *dask, env=env))
        wait_for(lambda: "Scheduler at" in (folder / "scheduler.log").read_text(), scheduler, folder / "scheduler.log")
        for log in logs:
            process = stack.enter_context(program(log, *worker, "--local-directory", str(folder), env=env))
            wait_for(lambda log=log: "Registered to" in log.read_text(), process, log)
        yield address, logs


def test_a_standing_cluster_gives_the_numbers_of_threads(sweeps, cluster):
    address, logs = cluster
    threads = sweeps.finish("threads")
    on_dask = {"LAMBDA_HAT_RUNTIME__ENGINE": "dask", "LAMBDA_HAT_RUNTIME__DASK_ADDRESS": address}
    dask = sweeps.finish("dask", **on_dask)
    assert (threads.status, dask.status) == (0, 0)
    assert [row["status"] for row in dask.rows] == ["computed"] * 4
    sweeps.assert_same_draws("threads", "dask")
    assert all("Task run 'sample " in log.read_text() for log in logs), "one worker had all the work"
    # Of a failed target the other's runs know nothing.
    failed = sweeps.finish("dask", "--experiment", "diverges", **on_dask)
    assert failed.status == 1
    assert [row["status"] for row in failed.rows] == ["failed", "cached"]
    assert "FloatingPointError" in failed.rows[0]["remedy"]


def test_ctrl_c_stops_the_workers_of_a_standing_cluster(sweeps, cluster):
    """What they run, at the end of a chunk; the next sweep does not wait for it."""
    address, logs = cluster
    on_dask = {"LAMBDA_HAT_RUNTIME__ENGINE": "dask", "LAMBDA_HAT_RUNTIME__DASK_ADDRESS": address}
    overrides = "target=bowl", "sampler=sgld", "sampler.num_draws=10000000"  # far longer than this waits
    with sweeps.start("stopped", *overrides, **on_dask) as process:
        store = sweeps.folder / "stopped"
        wait_for(lambda: any(store.glob("targets/*/runs/*/checkpoint")), process, sweeps.log("stopped"))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    deadline = time.monotonic() + 30
    while not any(f"Interrupted: {ENDED}" in log.read_text() for log in logs):
        assert time.monotonic() < deadline, [log.read_text()[-2000:] for log in logs]
        time.sleep(0.1)


@task
def die():
    os._exit(1)


@task
def live():
    return "alive"


@flow
def one_dies():
    with engine(Runtime(engine="processes", platform="cpu")):
        return [final_state(future) for future in (die.submit(), live.submit())]


def test_a_task_that_kills_its_workers_fails_alone(prefect_home):
    dead, alive = one_dies()
    assert (dead.name, alive.name) == ("Crashed", "Completed")
    assert "worker died" in dead.message
