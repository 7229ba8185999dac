"""Engines: settings to task runner, and what is refused before any work. test_sweep.py and tests/integration run them."""

import gc
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Failed
from prefect.task_engine import TaskRunTimeoutError

from flows import engines
from flows.progress import Interrupted
from flows.tasks import worth_retrying
from lambda_hat.specs.settings import Runtime
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.manifest import ArtifactError, StoreUnavailable

CHECKOUT = Path(__file__).parents[2]
URL = "http://127.0.0.1:4200/api"
SLURM = {"memory": "4GB", "queue": "gpu", "job_cpu": 8, "job_extra_directives": ["--gres=gpu:1"]}


@pytest.fixture
def server():
    with temporary_settings({PREFECT_API_URL: URL}):
        yield


def test_threads():
    runner = engines._task_runner(Runtime(max_workers=3))
    assert (type(runner).__name__, runner._max_workers) == ("ThreadPoolTaskRunner", 3)


def test_threads_need_no_dask():
    code = """
import sys
sys.modules["dask"] = sys.modules["distributed"] = sys.modules["prefect_dask"] = None
import flows.sweep
from flows.engines import _task_runner
from lambda_hat.specs.settings import Runtime
_task_runner(Runtime())
"""
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with pytest.raises(InvalidInput, match=r"runtime.engine = 'processes', and .*prefect_dask.*\.\[cluster\]"):
        engines._task_runner(Runtime(engine="processes"))


def test_standing_cluster(server):
    runner = engines._task_runner(Runtime(engine="dask", dask_address="tcp://host:8786"))
    assert (runner.address, runner.cluster_class) == ("tcp://host:8786", None)


def test_slurm(server):
    interrupt = signal.getsignal(signal.SIGINT)
    runner = engines._task_runner(Runtime(engine="slurm", max_workers=3, slurm=SLURM))
    assert runner.cluster_class == "dask_jobqueue.SLURMCluster"
    assert signal.getsignal(signal.SIGINT) is interrupt
    assert runner.adapt_kwargs == {"minimum": 3, "maximum": 3}
    cluster = runner.resolved_cluster_class(**runner.cluster_kwargs)
    try:
        script = cluster.job_script()
    finally:
        cluster.close()
    assert {"#SBATCH -p gpu", "#SBATCH --mem=4G", "#SBATCH --cpus-per-task=8", "#SBATCH --gres=gpu:1"} <= {*script.splitlines()}
    assert " --nthreads 1 " in script  # one task at a time


@pytest.mark.parametrize("engine", [{"engine": "dask", "dask_address": "tcp://host:8786"}, {"engine": "slurm", "slurm": SLURM}])
def test_workers_elsewhere_need_a_server(engine):
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(InvalidInput, match=r"needs a Prefect server that its workers reach; got no PREFECT_API_URL"),
    ):
        engines._task_runner(Runtime(**engine))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Dask closes clusters it has not made whole
@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({"engine": "slurm", "slurm": {**SLURM, "memroy": "4GB"}}, ["runtime.slurm = ", "memroy"]),
        ({"engine": "slurm", "slurm": {**SLURM, "interface": "nothere0"}}, ["runtime.slurm = ", "nothere0"]),
        ({"engine": "slurm", "slurm": {"memory": "lots"}}, ["runtime.slurm = ", "lots"]),
        ({"engine": "dask", "dask_address": "tcp://127.0.0.1:1"}, ["runtime.dask_address = 'tcp://127.0.0.1:1'"]),
        ({"engine": "dask", "dask_address": "nothing://here"}, ["runtime.dask_address = 'nothing://here'", "nothing"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_does_not_start(server, runtime, words):
    import dask

    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        settings = Runtime(**runtime)
        with engines._task_runner(settings) as runner, pytest.raises(InvalidInput) as error:
            engines._start(runner, settings)
    message = str(error.value)
    assert all(word in message for word in [*words, "must start"]), message
    del error, runner
    gc.collect()


@pytest.mark.parametrize(
    ("variable", "platform", "expected"),
    [
        ("3,5", "auto", ["3", "5"]),
        ("GPU-a,GPU-b,GPU-c", "gpu", ["GPU-a", "GPU-b"]),
        ("3,5", "cpu", [None, None]),
        ("", "auto", [None, None]),
        ("-1", "auto", [None, None]),
    ],
)
def test_one_gpu_for_each_process(server, monkeypatch, variable, platform, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    runner = engines._task_runner(Runtime(engine="processes", max_workers=2, platform=platform))
    workers = runner.cluster_kwargs["workers"].values()
    assert [worker["options"]["env"].get("CUDA_VISIBLE_DEVICES") for worker in workers] == expected
    assert [worker["options"]["nthreads"] for worker in workers] == [1, 1]


def test_too_few_gpus(server, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(InvalidInput, match=r"got runtime.max_workers = 2 and 1 GPUs\. Set max_workers = 1"):
        engines._task_runner(Runtime(engine="processes", max_workers=2))


def _unavailable(cause: Exception) -> StoreUnavailable:
    try:
        raise StoreUnavailable("the storage cannot be reached") from cause
    except StoreUnavailable as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(28, "No space left on device"), True),
        (_unavailable(ConnectionRefusedError()), True),
        (_unavailable(PermissionError("wrong credentials")), False),
        (PermissionError(), False),
        (FileNotFoundError(), False),
        (TaskRunTimeoutError(), False),
        (ArtifactError(), False),
        (InvalidInput("a rule"), False),
        (Interrupted(), False),
        (FloatingPointError(), False),
        (TypeError(), False),
    ],
    ids=lambda value: repr(value),
)
def test_what_is_worth_retrying(error, expected):
    assert worth_retrying(None, None, Failed(data=error)) is expected
