"""A sweep into a real S3 server, through its death, and back out again. OpenStack Swift is installed by pip for this."""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from programs import CHECKOUT, NUMBERS, environment
from swift import NotInstallable, Swift, swift

from lambda_hat.cli import main
from lambda_hat.store.manifest import Address, run_address, target_address
from lambda_hat.store.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Every run takes a second or more, so that the server's death finds it at work.
SETTINGS = """
[store]
uri = "unused"
cache = "{folder}/cache"
[store.options]
{options}
[runtime]
platform = "cpu"
compilation_cache = "{folder}/programs"
progress_seconds = 1e-9

[presets.target.bowl]
family = "quadratic"
dim = 6
data = {{ n_data = 1000 }}

[presets.sampler.sgld]
kind = "sgld"
step_size = 1e-4
batch_size = 128
num_draws = 6000
num_burnin_steps = 2000
num_steps_bw_draws = 10
[presets.sampler.hmc]
kind = "hmc"
num_draws = 4000

[experiments.default]
sweeps = [["target=bowl", "sampler=sgld,hmc"]]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("s3")


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Swift]:
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(swift(folder / "swift"))
        except NotInstallable as error:
            pytest.skip(str(error))
        fsspec.filesystem("s3", **server.options).mkdir("lambda-hat")
        yield server


@pytest.fixture(scope="module")
def settings(folder, server) -> Path:
    """With the server's address and credentials, for commands in this process."""
    path = folder / "settings.toml"
    options = "\n".join(f'{name} = "{value}"' for name, value in server.options.items())
    path.write_text(SETTINGS.format(folder=folder, options=options))
    return path


def environment_of(folder: Path, server: Swift) -> dict[str, str]:
    """Nothing of this process's AWS either; AWS's variables for the server."""
    # Starting takes long on a busy machine.
    outside = environment(folder, HOME=str(folder / "home"), PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="120")
    return {name: value for name, value in outside.items() if not name.startswith("AWS_")} | server.environment


class Sweep:
    """`python flows/sweep.py`, with nothing but AWS's variables to find the server, as users have them."""

    def __init__(self, folder: Path, server: Swift, store_uri: str, **variables: str) -> None:
        settings, self.log_file = folder / "environment.toml", folder / f"{uuid.uuid4().hex}.log"
        settings.write_text(SETTINGS.format(folder=folder, options=""))
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "flows/sweep.py", "--json", "--settings", settings, "--store", store_uri],
                cwd=CHECKOUT,
                env=environment_of(folder, server) | variables,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def finish(self) -> tuple[int, list[dict]]:
        """Its status and rows."""
        try:
            out = self.process.communicate(timeout=400)[0]
        finally:
            self.kill()
        return self.process.returncode, json.loads(out) if out else []

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def start(folder, server) -> Callable[..., Sweep]:
    return functools.partial(Sweep, folder, server)


@pytest.fixture(scope="module")
def sweep(start) -> Callable[[str], list[dict]]:
    """Runs one to its end: the rows."""

    def sweep(store_uri: str) -> list[dict]:
        started = start(store_uri)
        status, rows = started.finish()
        assert status == 0, started.log[-3000:]
        return rows

    return sweep


@pytest.fixture(scope="module")
def undisturbed(sweep, folder) -> SimpleNamespace:
    """The same sweep into a folder, for comparison."""
    uri = str(folder / "local")
    return SimpleNamespace(rows=sweep(uri), store=Store(uri))


def objects(server: Swift, uri: str) -> dict[str, str]:
    """SHA-256 of everything below a URI, asked of the server without lambda_hat."""
    fs = fsspec.filesystem("s3", **server.options, use_listings_cache=False)
    root = uri.removeprefix("s3://")
    return {path.removeprefix(f"{root}/"): hashlib.sha256(fs.cat_file(path)).hexdigest() for path in fs.find(root)}


def numbers(rows: list[dict]) -> list[dict]:
    return [{name: row[name] for name in NUMBERS} for row in rows]


def content(store: Store) -> dict[Address, dict[str, str]]:
    """SHA-256 of the draws and of the targets' files."""
    problems = dict(store.verify())
    assert set(problems.values()) == {None}
    return {
        address: {file.name: file.sha256 for file in store.manifest(address).files}
        for address in problems
        if address.kind in ("target", "run")
    }


def test_a_sweep_and_again(server, sweep, settings, undisturbed, folder, capsys):
    uri = "s3://lambda-hat/studies/first"
    first = sweep(uri)
    assert [row["status"] for row in first] == ["computed"] * 2
    assert numbers(first) == numbers(undisturbed.rows)
    store = Store(uri, server.options)
    assert content(store) == content(undisturbed.store)
    before = objects(server, uri)
    assert not [path for path in before if path.endswith("checkpoint")]

    assert [row["status"] for row in sweep(uri)] == ["cached"] * 2
    assert objects(server, uri) == before

    def command(*arguments: str) -> str:
        assert main([*arguments, "--settings", str(settings)]) == 0
        return capsys.readouterr().out

    count = 1 + 2 + 2 + 1
    assert command("verify", "--store", uri) == f"{count} artifacts checked, 0 damaged, in {uri}\n"
    # Into a folder that is a store with the same bytes and the same results.
    pulled = str(folder / "pulled")
    copied = json.loads(command("pull", "--store", uri, "--to", pulled, "--json"))
    assert (copied["copied"], copied["damaged"]) == (count, 0)
    files = {path.relative_to(pulled): path for path in Path(pulled).rglob("*") if path.is_file()}
    assert {str(name): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == before
    assert copied["bytes"] == sum(path.stat().st_size for name, path in files.items() if name.name != "manifest.json")
    assert json.loads(command("pull", "--store", uri, "--to", pulled, "--json"))["copied"] == 0
    results = ("results", "--format", "csv", "--store")
    assert command(*results, pulled) == command(*results, uri)
    assert "<html" in store.read(store.find("swp_"), "report.html").decode()[:200]
    assert command("verify", "--store", pulled) == f"{count} artifacts checked, 0 damaged, in {pulled}\n"


def test_the_server_dies(server, start, sweep, undisturbed):
    """Killed while runs are sampled, then back with what it had; the sweep's next call ends with the same numbers."""
    uri = "s3://lambda-hat/studies/killed"
    target = undisturbed.rows[0]["target_id"]
    runs = [run_address(target, row["run_id"]) for row in undisturbed.rows]
    store = Store(uri, server.options)
    disturbed = start(uri)
    try:
        deadline = time.monotonic() + 180
        while not any(store.load_checkpoint(run) for run in runs):
            assert disturbed.process.poll() is None, disturbed.log[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.kill()
        refused = start(uri)
        assert refused.finish() == (2, [])
        server.start()
        status, _ = disturbed.finish()
    finally:
        disturbed.kill()
    assert status in (0, 1, 2), disturbed.log[-3000:]
    assert refused.log.count("\n") == 1, refused.log
    assert re.search(rf"^error: .*{uri} does not: Could not connect .*Check the network, endpoint", refused.log)
    assert store.exists(target_address(target)), "what was finished is kept"
    rows = sweep(uri)
    assert numbers(rows) == numbers(undisturbed.rows)
    assert content(store) == content(undisturbed.store)
    print(f"the sweep whose server died ended with {status}")


@pytest.mark.parametrize(
    ("uri", "variables", "words"),
    [
        ("s3://lambda-hat/x", {"AWS_SECRET_ACCESS_KEY": "hunter2"}, ["signature", "Check AWS_ACCESS_KEY_ID"]),
        ("s3://lambda-hat/x", {"AWS_ACCESS_KEY_ID": "who:ever"}, ["signature", "Check AWS_ACCESS_KEY_ID"]),
        ("s3://no-bucket/x", {}, ["The specified bucket does not exist", "aws s3 mb"]),
    ],
    ids=["secret", "key", "bucket"],
)
def test_no_work_without_access(server, start, uri, variables, words):
    refused = start(uri, **variables)
    assert refused.finish() == (2, [])
    assert refused.log.startswith("error: ")
    assert refused.log.count("\n") == 1
    assert all(word in refused.log for word in [uri, *words]), refused.log
    assert not any(secret in refused.log for secret in ("hunter2", server.secret))


def test_gc_of_uploads_cut_off(server):
    store = Store("s3://lambda-hat/uploads", server.options)
    fs = fsspec.filesystem("s3", **server.options)
    ids = [
        fs.call_s3("create_multipart_upload", Bucket="lambda-hat", Key=key)["UploadId"] for key in ("uploads/a/b", "other/a/b")
    ]
    assert list(store.clean(hours=1)) == [], "it began just now"
    time.sleep(2)  # S3 counts in seconds, rounded up
    assert list(store.clean(hours=0)) == [(f"s3://lambda-hat/uploads/a/b, upload {ids[0]}", 0)]
    assert [upload["UploadId"] for upload in fs.list_multipart_uploads("lambda-hat")] == ids[1:]


def test_large_files_arrive_in_parts(server, folder):
    """Above 100 MB s3fs cuts them up."""
    store = Store("s3://lambda-hat/large", server.options, cache=str(folder / "cache"))
    address = target_address("tgt_00000000000000aa")
    data = os.urandom(120 << 20)
    store.publish(address, {"params.npz": data}, spec={}, summary={})
    assert store.read(address, "params.npz") == data
    assert list(store.verify()) == [(address, None)]


def test_the_document_works_as_typed(server, folder):
    """The commands and the script of docs/storage.md."""
    text = (CHECKOUT / "docs" / "storage.md").read_text()
    commands = [
        line for block in re.findall(r"^```shell\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for line in block.splitlines()
    ]
    (script,) = re.findall(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(commands) == 5
    fsspec.filesystem("s3", **server.options).mkdir("my-bucket")
    place = folder / "document"
    place.mkdir()
    variables = environment_of(folder, server) | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LAMBDA_HAT_SETTINGS": str(CHECKOUT / "settings.toml"),
    }

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def files(name: str) -> dict[str, bytes]:
        return {str(path.relative_to(place / name)): path.read_bytes() for path in (place / name).rglob("*") if path.is_file()}

    for command in commands:
        if not command.startswith("aws") or shutil.which("aws"):
            assert run("bash", "-c", command.replace("python flows/", f"python {CHECKOUT}/flows/"))
    (shown,) = run(sys.executable, "-c", script).splitlines()
    (run_id,) = os.listdir(place / "fetched")
    assert shown == f"{run_id} hmc ['trace.npz']"
    pulled = files("pulled")
    assert [data for path, data in pulled.items() if path.endswith("trace.npz")] == list(files("fetched").values())
    if shutil.which("aws"):
        assert files("synced") == pulled
