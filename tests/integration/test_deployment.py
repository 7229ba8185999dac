"""docs/deployment.md as its reader types it: a real server, a real worker, sweeps from deployments, to the end or cancelled."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import slurm
from deployed import Terminals, documented, flow_run_id, terminals, wait_for
from programs import CHECKOUT

from flows.progress import ENDED
from lambda_hat.llc import artifacts
from lambda_hat.llc.plan import make_plan
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.settings import load_settings
from lambda_hat.store.manifest import diagnosis_address, run_address, target_address
from lambda_hat.store.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """A new folder, or what TEST_STORE_URI names, such as s3://bucket/prefix."""
    return Store(os.environ.get("TEST_STORE_URI", str(tmp_path_factory.mktemp("deployment") / "store")))


@pytest.fixture(scope="module")
def reader(store, tmp_path_factory):
    """Someone who has typed the section on passwords, and then the first one."""
    with terminals(tmp_path_factory.mktemp("terminals"), store.uri) as reader:
        for command in [*documented("Passwords"), *documented("Server, pool, worker")]:
            reader.type(command)
        yield reader


def specs(*overrides: str) -> list[RunSpec]:
    return make_plan(load_settings(str(CHECKOUT / "settings.toml")), None, overrides)


def overrides_in(command: str) -> list[str]:
    """Those of a documented `prefect deployment run`."""
    return re.findall(r'"([^"]*)"', command)


def state(reader: Terminals, run: str) -> dict[str, Any]:
    found = reader.api(f"flow_runs/{run}")
    assert isinstance(found, dict)
    return found


def wait_until_final(reader: Terminals, run: str) -> dict[str, Any]:
    final = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
    return wait_for(lambda: found if (found := state(reader, run))["state_type"] in final else None, "the end of a sweep", 300)


def test_server_wants_its_password(reader):
    assert httpx.post(f"{reader.url}/api/deployments/filter", json={}).status_code == 401
    found = reader.api("deployments/filter", {})
    assert {deployment["name"] for deployment in found} >= {"sweep", "nightly"}


def test_a_sweep_runs_to_its_end(reader, store):
    run, logs, _ = documented("Running a sweep")
    printed = reader.type(run)
    assert "Flow run finished successfully in 'Completed'." in printed
    for spec in specs(*overrides_in(run)):
        for address in (
            target_address(spec.target_id),
            run_address(spec.target_id, spec.run_id),
            diagnosis_address(spec.target_id, spec.run_id),
        ):
            assert store.exists(address)
    assert [problem for _, problem in store.verify() if problem] == []
    reader.type(f"export FLOW_RUN_ID={flow_run_id(printed)}")
    assert "quadratic by hmc: computed" in wait_for(lambda: reader.type(logs), "the log")


def test_a_second_run_computes_nothing(reader, store):
    def made() -> dict[str, str]:
        return {address.folder: store.manifest(address).created_at for address, _ in store.verify()}

    before = made()
    assert "'Completed'" in reader.type(documented("Running a sweep")[0])
    assert made() == before


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        ('overrides=["sampler.stepsize=1"]', "Did you mean 'sampler.step_size'?"),
        ("experiment=defualt", "Did you mean 'default'?"),
        ("store_uri=nothing://here", "got 'nothing://here'"),
    ],
)
def test_wrong_parameters_fail_with_the_reason(reader, parameter, words):
    run = flow_run_id(reader.type(f"prefect deployment run sweep/sweep --param '{parameter}' --watch", status=1))
    found = state(reader, run)
    assert found["state_type"] == "FAILED"
    assert words in found["state"]["message"]
    reader.type(f"export FLOW_RUN_ID={run}")
    assert wait_for(lambda: words in reader.type(documented("Running a sweep")[1]), "the log")


def test_parameters_of_the_wrong_type_are_refused_at_once(reader):
    printed = reader.type("prefect deployment run sweep/sweep --param overrides=target=quadratic", status=1)
    assert "Validation failed for field 'overrides'" in printed


def test_a_cancelled_sweep_stops_and_goes_on(reader, store):
    """Sampling stops, and the next flow run goes on from the checkpoint."""
    overrides = ["target=quadratic", "sampler=sgld", "sampler.num_draws=20000"]
    run = "prefect deployment run sweep/sweep --param 'overrides={}'".format(str(overrides).replace("'", '"'))
    planned = specs(*overrides)

    def draws(spec: RunSpec) -> int:
        checkpoint = artifacts._load_checkpoint(store, run_address(spec.target_id, spec.run_id))
        return checkpoint.draws["loss_difference"].shape[1] if checkpoint else 0

    reader.type(f"export FLOW_RUN_ID={flow_run_id(reader.type(run))}")
    wait_for(lambda: all(draws(spec) > 500 for spec in planned), "a checkpoint", 300)
    reader.type(documented("Running a sweep")[2])
    assert wait_until_final(reader, reader.environment["FLOW_RUN_ID"])["state_name"] == "Cancelled"
    # It ended by itself, and not by the SIGKILL that follows half a minute later.
    assert wait_for(lambda: reader.type(documented("Running a sweep")[1]).count(f"Interrupted: {ENDED}"), "the log")
    assert not any(store.exists(run_address(spec.target_id, spec.run_id)) for spec in planned)
    share = min(draws(spec) / (spec.sampler.num_burnin_draws + spec.sampler.num_draws) for spec in planned)
    assert share > 0.03

    again = flow_run_id(reader.type(f"{run} --watch"))
    assert state(reader, again)["state_type"] == "COMPLETED"
    lines = reader.api("logs/filter", {"logs": {"flow_run_id": {"any_": [again]}}, "sort": "TIMESTAMP_ASC"})
    percents = [int(found[1]) for line in lines if (found := re.match(r"[█░]+ +(\d+) % of", line["message"]))]
    assert min(percents) >= int(100 * share), "it started anew"
    assert all(store.exists(diagnosis_address(spec.target_id, spec.run_id)) for spec in planned)


@pytest.mark.skipif(
    tuple(map(int, version("sqlalchemy").split(".")[:2])) >= (2, 1),
    reason="the scheduler of Prefect 3.8.8 fails on SQLAlchemy 2.1: install sqlalchemy<2.1",
)
def test_schedules(reader):
    def schedules(name: str) -> list[dict[str, Any]]:
        return reader.api(f"deployments/name/sweep/{name}")["schedules"]

    ls, resume, pause, create = documented("Schedules")
    [nightly] = schedules("nightly")
    assert (nightly["active"], nightly["slug"]) == (False, "nightly")
    assert nightly["id"] in reader.type(ls)
    reader.type(f"export SCHEDULE_ID={nightly['id']}")
    reader.type(resume)
    assert schedules("nightly")[0]["active"]
    runs = wait_for(lambda: reader.api("flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}), "runs")
    parameters = {"experiment": "default", "overrides": ["target.seed=range(0,3)"]}
    assert all(run["parameters"] == parameters for run in runs), runs[0]["parameters"]
    reader.type(pause)
    assert not schedules("nightly")[0]["active"]
    reader.type(create)
    assert [schedule["active"] for schedule in schedules("sweep")] == [False]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at the environment of processes in /proc")
def test_one_run_per_gpu(reader):
    """The two runs of a GPU follow each other; the other GPU's does not wait; each sees its GPU alone."""
    *prepare, run = documented("GPUs")
    for command in prepare:
        reader.type(command)
    assert flow_run_id(reader.type(run))

    long = 'prefect deployment run sweep/gpu-{} --param \'overrides=["target=quadratic", "sampler=hmc", "sampler.seed={}"]\''
    runs = [flow_run_id(reader.type(long.format(gpu, seed))) for gpu, seed in ((0, 1), (0, 2), (1, 3))]
    for run, gpu in zip(runs, "001", strict=True):
        pid = wait_for(lambda run=run: state(reader, run)["infrastructure_pid"], "a process")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert {f"CUDA_VISIBLE_DEVICES={gpu}".encode(), b"XLA_PYTHON_CLIENT_PREALLOCATE=false"} <= set(environment)
    first, second, other = (wait_until_final(reader, run) for run in runs)
    assert {found["state_type"] for found in (first, second, other)} == {"COMPLETED"}
    assert first["end_time"] < second["start_time"]
    assert other["start_time"] < second["start_time"]


def test_pools_of_containers(reader):
    """The server takes them and their deployments; their workers need Docker and Kubernetes."""
    for command in documented("Containers"):
        reader.type(command)
    pools = {deployment["name"]: deployment["work_pool_name"] for deployment in reader.api("deployments/filter", {})}
    assert (pools["docker"], pools["kubernetes"]) == ("docker", "kubernetes")


@pytest.mark.skipif(bool(slurm.missing()), reason=f"needs {slurm.missing()}: apt-get install slurm-wlm munge")
def test_a_worker_as_a_slurm_job(reader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    *prepare, submit, run = documented("Slurm")
    for command in prepare:
        reader.type(command)
    with slurm.running(folder / "slurm") as environment:
        reader.environment |= {"SLURM_CONF": environment["SLURM_CONF"], "SBATCH_OUTPUT": str(folder / "job.log")}
        reader.type(submit)
        printed = reader.type(run)
        name = state(reader, flow_run_id(printed))["name"]
        reader.type("scancel --name lambda-hat")
        wait_for(lambda: not reader.type("squeue --noheader").strip(), "the end of the job")
    assert "Flow run finished successfully in 'Completed'." in printed
    assert f"Flow run '{name}' - Finished in state Completed()" in (folder / "job.log").read_text()
