"""The files in deployments/: what they name exists, their parameters make plans, and Prefect's schemas accept them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import prefect
import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.flows import load_flow_from_entrypoint
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.utilities.schema_tools import is_valid_schema, validate

from lambda_hat.batch_size.plan import make_study
from lambda_hat.entropy.plan import make_entropy_plan
from lambda_hat.llc.plan import make_plan
from lambda_hat.specs.settings import load_settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deployments"
DOCUMENT = (ROOT / "docs" / "deployment.md").read_text()

FILES = sorted(FOLDER.glob("*.yaml"))
TEMPLATES = sorted(FOLDER.glob("*.json"))
DEPLOYMENTS = [pytest.param(path, deployment, id=deployment["name"])
               for path in FILES for deployment in yaml.safe_load(path.read_text())["deployments"]]  # fmt: skip


def template(kind: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{kind}.json").read_text())


def prefects_own(kind: str) -> dict[str, Any]:
    """The base job template Prefect ships for this kind of pool, of packages that are not installed too."""
    path = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"
    packages = json.loads(path.read_text())
    return next(workers[kind] for workers in packages.values() if kind in workers)["default_base_job_configuration"]


def test_every_file_is_in_the_document():
    for path in FOLDER.iterdir():
        assert f"deployments/{path.name}" in DOCUMENT


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_prefect_understands_the_file(path):
    content = yaml.safe_load(path.read_text())
    PrefectYamlModel.model_validate(content)
    assert [list(step) for step in content["pull"]] == [["prefect.deployments.steps.set_working_directory"]]


@pytest.mark.parametrize(("path", "deployment"), DEPLOYMENTS)
def test_deployment(path, deployment):
    """Its flow is there, its parameters and those of its schedules are the flow's and make a plan, its queue is made."""
    flow = load_flow_from_entrypoint(str(ROOT / deployment["entrypoint"]))
    settings = load_settings(str(ROOT / "settings.toml"))
    for chosen in ({}, *(schedule.get("parameters", {}) for schedule in deployment.get("schedules", []))):
        parameters = deployment.get("parameters", {}) | chosen
        flow.validate_parameters(parameters)
        plan = {"sweep": make_plan, "batch_size": make_study, "entropy": make_entropy_plan}[flow.name]
        assert plan(settings, parameters.get("experiment"), parameters.get("overrides", ()))
    pool = deployment["work_pool"]
    assert f"prefect work-pool create {pool['name']} --type " in DOCUMENT
    if queue := pool.get("work_queue_name"):
        assert f"prefect work-queue create {queue} --pool {pool['name']} --limit 1\n" in DOCUMENT
    assert path.name == "containers.yaml" or not validate(pool.get("job_variables", {}), prefects_own("process")["variables"])


def test_every_flow_can_be_deployed():
    deployed = {deployment.values[1]["entrypoint"] for deployment in DEPLOYMENTS if deployment.values[0].name == "prefect.yaml"}
    assert deployed == {"flows/sweep.py:sweep", "flows/batch_size.py:batch_size", "flows/entropy.py:entropy"}


def test_each_gpu_is_one_queues():
    gpus = [deployment.values[1] for deployment in DEPLOYMENTS if deployment.values[0].name == "gpus.yaml"]
    for index, deployment in enumerate(gpus):
        pool = deployment["work_pool"]
        assert (deployment["name"], pool["work_queue_name"]) == (f"gpu-{index}", f"gpu-{index}")
        assert pool["job_variables"]["env"]["CUDA_VISIBLE_DEVICES"] == str(index)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_base_job_template(path):
    """Prefect's server takes it; it sets what the worker knows; its defaults are of the types it states."""
    mine, original = template(path.stem), prefects_own(path.stem)
    WorkPoolCreate(name=path.stem, type=path.stem, base_job_template=mine)
    is_valid_schema(mine["variables"])
    assert mine["job_configuration"].keys() <= original["job_configuration"].keys()
    variables = mine["variables"]["properties"]
    assert set(re.findall(r"{{ (\w+) }}", json.dumps(mine["job_configuration"]))) == set(variables)
    defaults = {name: variable["default"] for name, variable in variables.items() if "default" in variable}
    assert validate(defaults, mine["variables"]) == []
    common = {name: value for name, value in defaults.items() if name in original["variables"]["properties"]}
    assert validate(common, original["variables"]) == []


def test_slurm_script_parses():
    subprocess.run(["bash", "-n", str(FOLDER / "slurm-worker.sbatch")], check=True)
