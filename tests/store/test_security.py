"""No credential is written anywhere, no pickle is read or written, nothing listens to other machines."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from prefect.settings import Settings

from flows import sweep
from lambda_hat.llc import artifacts
from lambda_hat.llc.run import RunSpec
from lambda_hat.store.manifest import ArtifactError, run_address, target_address
from lambda_hat.store.store import Store

ROOT = Path(__file__).parents[2]

#: Where a user may have them: AWS's variables, and the settings' [store.options].
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "AKIAVARIABLE7Q2",
    "AWS_SECRET_ACCESS_KEY": "variable/secret+Zx81",
    "AWS_SESSION_TOKEN": "variable.token.Jk37",
}
OPTIONS = {"key": "AKIAOPTION4W9", "secret": "option/secret+Vm52", "token": "option.token.Pd64"}
#: Of Prefect's server and its clients.
PASSWORD = "admin:password-Ht93"

SETTINGS = """
[store]
uri = "unused"
cache = "{folder}/cache"
options = {{ key = "{key}", secret = "{secret}", token = "{token}" }}
[runtime]
platform = "cpu"
compilation_cache = "{folder}/programs"
progress_seconds = 1e-9
engine = "{engine}"
[presets.target.bowl]
family = "quadratic"
dim = 2
data = {{ n_data = 100 }}
[presets.sampler.hmc]
kind = "hmc"
num_chains = 2
num_draws = 50
num_burnin_steps = 20
[experiments.default]
sweeps = [["target=bowl", "sampler=hmc"]]
"""


@pytest.fixture(
    scope="module", params=["threads", pytest.param("processes", marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def swept(request, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A sweep into S3 by a program that knows the credentials; all it wrote, by name, and where it listened."""
    folder = tmp_path_factory.mktemp("security")
    settings = folder / "settings.toml"
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    fs = fsspec.filesystem("s3", **OPTIONS, endpoint_url=endpoint, use_listings_cache=False)
    fs.mkdir("bucket")
    settings.write_text(SETTINGS.format(folder=folder, engine=request.param, **OPTIONS))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "LAMBDA_HAT_", "AWS_"))}
    environment = kept | VARIABLES | {
        "AWS_ENDPOINT_URL": endpoint, "HOME": str(folder / "home"), "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_LOGGING_LEVEL": "DEBUG", "PREFECT_API_AUTH_STRING": PASSWORD, "PREFECT_SERVER_API_AUTH_STRING": PASSWORD,
    }  # fmt: skip
    command = [sys.executable, "flows/sweep.py", "--json", "--settings", str(settings), "--store", "s3://bucket/studies"]
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True)
        listening: set[str] = set()
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            listening |= listeners(process.pid)
            time.sleep(0.5)
        process.kill()
    assert process.returncode == 0, (folder / "stderr").read_text()[-3000:]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del files["settings.toml"]
    yield SimpleNamespace(files=files, objects={path: fs.cat_file(path) for path in fs.find("bucket")}, listening=listening)
    fs.rm("bucket", recursive=True)  # all servers of this process share their buckets
    server.stop()


def listeners(group: int) -> set[str]:
    """Addresses, in hexadecimal, at which the processes of a group wait for connections; none where there is no /proc."""
    sockets = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[2]) == group:
                sockets |= {os.readlink(link) for link in (folder / "fd").iterdir()}
        except OSError:
            continue  # it has ended
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {words[1].split(":")[0] for words in lines if words[3] == "0A" and f"socket:[{words[9]}]" in sockets}


def test_no_credential_is_written(swept):
    (row,) = json.loads(swept.files["stdout"])
    assert row["status"] == "computed"
    names = "\n".join([*swept.files, *swept.objects])
    for part in ("prefect/prefect.db", "cache/", "programs/", "trace.npz", "report.html", "manifest.json", "result.json"):
        assert part in names
    secrets = [*VARIABLES.values(), *OPTIONS.values(), PASSWORD.split(":")[1]]
    for name, content in (swept.files | swept.objects).items():
        assert [secret for secret in secrets if secret.encode() in content] == [], name


def test_results_of_tasks_are_json(swept):
    kept = {name: content for name, content in swept.files.items() if name.startswith("prefect/storage/")}
    assert len(kept) >= 3
    for content in kept.values():
        assert json.loads(content)["metadata"]["serializer"]["type"] == "json"


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks at sockets in /proc")
def test_only_this_machine_is_listened_to(swept):
    assert swept.listening == {"0100007F"}
    assert Settings.model_fields["server"].default_factory().api.host == "127.0.0.1"


FILES = [path for folder in ("lambda_hat", "flows") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_and_no_shell(path):
    """Nothing that is read can run code."""
    pickles = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "read_pickle", "to_pickle"}
    refused = pickles | {"eval", "exec", "system"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = set()
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {str(node.module).split(".")[0], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Name):
            names = {node.id}
        elif isinstance(node, ast.Attribute):
            names = {node.attr}
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if ast.unparse(node.func) in ("np.load", "numpy.load"):
                assert "allow_pickle" in keywords
            for name in ("allow_pickle", "shell"):
                assert name not in keywords or ast.unparse(keywords[name]) == "False", ast.unparse(node)
        assert not names & refused, ast.unparse(node)


@pytest.mark.parametrize("arguments", [["--from-run", "run_"], ["target=tgt_", "sampler=hmc"]], ids=["run", "target"])
def test_a_store_does_not_choose_what_is_called(tmp_path, arguments, capsys, monkeypatch):
    """Somebody else's store names `os:system`: refused before any work, unless the settings name it too."""
    store, witness = Store(str(tmp_path / "store")), tmp_path / "witness"
    settings = tmp_path / "settings.toml"
    settings.write_text(SETTINGS.format(folder=tmp_path, engine="threads", **OPTIONS).replace("options =", "# options ="))
    target = {"family": "custom", "path": "os:system", "arguments": {"command": f"touch {witness}"}, "data": {"n_data": 10}}
    spec = RunSpec.from_dict({"target": target, "sampler": {"kind": "hmc"}})
    content = spec.target.model_dump(mode="json")
    store.publish(target_address(spec.target_id), {"params.npz": b""}, spec=content, summary={})
    address = run_address(spec.target_id, spec.run_id)
    store.publish(address, {"trace.npz": b""}, spec=spec.model_dump(mode="json"), summary={})
    command = ["sweep.py", *arguments, "--settings", str(settings), "--store", store.uri]
    monkeypatch.setattr(sys, "argv", command)
    assert sweep.main() == 2
    assert "got 'os:system' from the store" in capsys.readouterr().err
    with settings.open("a") as file:
        file.write('[presets.target.mine]\nfamily = "custom"\npath = "os:system"\n')
    monkeypatch.setattr(sys, "argv", [*command, "--dry-run"])
    assert sweep.main() == 0
    assert not witness.exists()


def test_a_target_is_what_its_id_says(tmp_path):
    """Or the store would choose what is called for a target of one's own."""
    store = Store(str(tmp_path))
    mine = RunSpec.from_dict({"target": {"family": "quadratic"}, "sampler": {"kind": "hmc"}}).target
    other = mine.from_dict({"seed": 7}).model_dump(mode="json")
    store.publish(target_address(mine.target_id), {}, spec=other, summary={})
    with pytest.raises(ArtifactError, match="must be the one its id is made from"):
        artifacts.load_target(store, mine.target_id)
