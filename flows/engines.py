"""Where a flow's tasks run: threads, processes of this machine, a standing Dask cluster, or jobs of Slurm (docs/engines.md)."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.settings import get_current_settings
from prefect.states import Crashed, State
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.progress import stop_tasks
from lambda_hat.specs.settings import Runtime
from lambda_hat.specs.spec import InvalidInput

DEVICES = "CUDA_VISIBLE_DEVICES"


@contextmanager
def engine(runtime: Runtime) -> Iterator[None]:
    """Tasks that the flow submits inside run where the settings say, whatever task runner the flow has.

    Raises:
      InvalidInput: the engine does not start with these settings; nothing has been submitted.
    """
    context = FlowRunContext.get()
    assert context is not None, "only a running flow submits tasks"
    assert context.flow_run is not None
    with _task_runner(runtime) as runner:
        if runtime.engine != "threads":
            _start(runner, runtime)
        try:
            with context.model_copy(update={"task_runner": runner}):
                yield
        except BaseException:  # Ctrl-C, SIGTERM, an error of the flow itself
            stop_tasks(context.flow_run.id)
            raise


def _task_runner(runtime: Runtime) -> TaskRunner[Any]:
    if runtime.engine == "threads":
        return ThreadPoolTaskRunner(max_workers=runtime.max_workers)
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")  # or a cluster's own lines would drown those of the sweep
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        from prefect_dask import DaskTaskRunner

        if runtime.engine == "slurm":
            import dask_jobqueue  # noqa: F401

            signal.signal(signal.SIGINT, interrupt)  # it sets its own, by which Ctrl-C would end a sweep as if it had finished
    except ImportError as error:
        raise InvalidInput(
            f"Engines other than threads need packages of their own; got runtime.engine = {runtime.engine!r}, and {error}. "
            "Install them with `pip install -e '.[cluster]'`, or use threads."
        ) from error
    if runtime.engine == "processes":
        return DaskTaskRunner(cluster_class="distributed.SpecCluster", cluster_kwargs=_processes(runtime))
    if get_current_settings().api.url is None:
        raise InvalidInput(
            f"runtime.engine = {runtime.engine!r} needs a Prefect server that its workers reach; got no PREFECT_API_URL. "
            "Start one with `prefect server start --host 0.0.0.0`, with a password (docs/deployment.md, Passwords), and set "
            "PREFECT_API_URL=http://HOST:4200/api."
        )
    if runtime.engine == "dask":
        return DaskTaskRunner(address=runtime.dask_address)
    # One task at a time in each worker: job_cpu says how many cores it has.
    arguments = {"cores": 1, "processes": 1, "scheduler_options": {"dashboard_address": None}, **runtime.slurm}
    workers = {"minimum": runtime.max_workers, "maximum": runtime.max_workers}  # replaced when they die
    return DaskTaskRunner(cluster_class="dask_jobqueue.SLURMCluster", cluster_kwargs=arguments, adapt_kwargs=workers)


def _processes(runtime: Runtime) -> dict[str, Any]:
    """Arguments of a cluster of worker processes, each with one thread for tasks and one GPU, if there are GPUs."""
    from distributed import Nanny, Scheduler

    named = os.environ.get(DEVICES)
    devices = [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))] if named is None else named.split(",")
    devices = [] if runtime.platform == "cpu" else [device for device in devices if device not in ("", "-1")]
    if devices and len(devices) < runtime.max_workers:
        raise InvalidInput(
            f"Each worker process has its own GPU; got runtime.max_workers = {runtime.max_workers} and {len(devices)} GPUs. "
            f"Set max_workers = {len(devices)}, or engine = 'threads', or platform = 'cpu'."
        )
    common: dict[str, str] = {}
    if get_current_settings().api.url is None:
        from prefect.server.api.server import SubprocessASGIServer  # all of the server

        common["PREFECT_API_URL"] = SubprocessASGIServer().api_url  # the flow's, or every worker would start its own
    workers = {}
    for index in range(runtime.max_workers):
        env = common | ({DEVICES: devices[index]} if devices else {})
        # memory_limit: Dask would restart a worker that uses more than its share.
        options = {"nthreads": 1, "env": env, "memory_limit": 0, "host": "127.0.0.1"}
        workers[index] = {"cls": Nanny, "options": options}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": None}}
    return {"workers": workers, "scheduler": scheduler, "silence_logs": logging.WARNING}


def _start(runner: Any, runtime: Runtime) -> None:
    """Starts a Dask task runner's cluster, or connects to it."""
    try:
        _ = runner.client
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        where = {"dask": f"runtime.dask_address = {runtime.dask_address!r}", "slurm": f"runtime.slurm = {runtime.slurm}"}
        raise InvalidInput(
            f"runtime.engine = {runtime.engine!r} must start; got {where.get(runtime.engine, 'no processes')}, "
            f"with which it says: {error}. Correct the settings, or use another engine."
        ) from error


def submit_ahead(task: Any, *arguments: Any) -> PrefectFuture[Any]:
    """Submits a task to run before those that wait already; on Dask alone, whose workers can."""
    import dask

    with dask.annotate(priority=1):
        return task.submit(*arguments)


def final_state(future: PrefectFuture[Any]) -> State:
    """Waits for the end of a task; its state, Crashed where it has none because its workers died."""
    future.wait()
    error = future.wrapped_future.exception()  # type: ignore[attr-defined]  # of Prefect's run of the task, not of the task
    return future.state if error is None else Crashed(message=f"The task's worker died: {error}")
