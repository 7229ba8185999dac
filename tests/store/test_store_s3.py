"""The store on s3://, on a light S3 server of this process; tests/integration/test_s3.py has a real one."""

import json
import logging
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import fsspec
import pytest
from moto.server import DomainDispatcherApplication, ThreadedMotoServer, create_backend_app

from lambda_hat.cli import main
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.manifest import (
    ArtifactError,
    StoreUnavailable,
    diagnosis_address,
    run_address,
    sweep_address,
    target_address,
)
from lambda_hat.store.storage import Storage
from lambda_hat.store.store import Store

TARGET, OTHER_TARGET = "tgt_00000000000000aa", "tgt_00000000000000bb"
RUN, OTHER_RUN = "run_00000000000000cc", "run_0000000000000ddd"
SWEEP = "swp_00000000000000ee"
ADDRESSES = [target_address(TARGET), run_address(TARGET, RUN), diagnosis_address(TARGET, RUN), sweep_address(SWEEP)]
FILES = {"params.npz": b"weights" * 100, "plots/trace.png": b"\x89PNG", "empty": b""}
SPEC = {"sampler": {"kind": "sgld", "step_size": 1e-4}, "widths": [4, 8]}


@pytest.fixture(scope="module", autouse=True)
def _environment(tmp_path_factory):
    """No credentials, endpoint or settings but this file's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("AWS_", "LAMBDA_HAT_")):
                patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("AWS_ACCESS_KEY_ID", "light")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        yield


@pytest.fixture(scope="module")
def server(_environment):
    """Its address, which stands in the environment as for any of AWS's tools."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        fsspec.filesystem("s3").mkdir("bucket")
        yield url
    server.stop()


@pytest.fixture
def store(server, tmp_path):
    return Store(f"s3://bucket/{uuid.uuid4().hex}", cache=str(tmp_path / "cache"))


def everything(store: Store) -> dict[str, bytes]:
    """What lies below the store's URI, asked of S3 without lambda_hat."""
    fs, root = fsspec.core.url_to_fs(store.uri, use_listings_cache=False, skip_instance_cache=True)
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def aged(store: Store, path: str, by: timedelta) -> None:
    """Makes the server believe that it has an object for longer."""
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    key = f"{store.uri.removeprefix('s3://bucket/')}/{path}"
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets["bucket"].keys[key].last_modified -= by


# What it keeps


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: address.kind)
def test_what_is_published_is_read(store, address):
    assert not store.exists(address)
    assert store.publish(address, FILES, spec=SPEC, summary={"llc": 2.5}) == store.manifest(address)
    again = Store(store.uri)
    assert {name: again.read(address, name) for name in FILES} == FILES
    assert list(again.verify()) == [(address, None)]
    assert store.publish(address, {"other": b""}, spec={}, summary={}).attempt == store.manifest(address).attempt
    url = store.url(address, "plots/trace.png")
    assert url.startswith(f"{store.uri}/{address.folder}/files/")
    with fsspec.open(url) as file:
        assert file.read() == FILES["plots/trace.png"]
    with pytest.raises(ArtifactError, match=r"got 'parms\.npz'"):
        store.read(address, "parms.npz")


def test_a_store_that_is_tried_is_left_as_it_was(store):
    store.publish(ADDRESSES[0], FILES, spec={}, summary={})
    before = everything(store)
    store.check_writable()
    assert everything(store) == before


def test_a_bucket_is_a_store(server):
    fsspec.filesystem("s3").mkdir("whole")
    for uri in ("s3://whole", "s3://whole/"):
        store = Store(uri)
        store.publish(ADDRESSES[0], FILES, spec={}, summary={})
        assert store.uri == "s3://whole"
        assert list(store.verify()) == [(ADDRESSES[0], None)]
        assert list(store.clean(hours=0)) == []


def test_catalogue_and_find(store):
    assert len(store.catalogue("run")) == 0
    for address in [*ADDRESSES, run_address(OTHER_TARGET, OTHER_RUN)]:
        store.publish(address, FILES, spec=SPEC, summary={"llc": 2.5})
    frame = store.catalogue("run")
    assert frame["id"].tolist() == [RUN, OTHER_RUN]
    assert frame["target_id"].tolist() == [TARGET, OTHER_TARGET]
    assert frame["spec.sampler.kind"].tolist() == ["sgld", "sgld"]
    assert store.catalogue("sweep")["id"].tolist() == [SWEEP]
    assert store.find("run_0000000000000d") == run_address(OTHER_TARGET, OTHER_RUN)
    with pytest.raises(InvalidInput, match=f"fits {RUN}, {OTHER_RUN}"):
        store.find("run_00")


def test_what_others_publish_is_seen_at_once(store):
    reader = Store(store.uri)
    assert len(reader.catalogue("target")) == 0
    store.publish(ADDRESSES[0], FILES, spec={}, summary={})
    assert reader.exists(ADDRESSES[0])
    assert len(reader.catalogue("target")) == 1


def test_checkpoint(store):
    assert store.load_checkpoint(ADDRESSES[1]) is None
    store.clear_checkpoint(ADDRESSES[1])
    for data in (b"draw 100", b"", bytes(1000)):
        store.save_checkpoint(ADDRESSES[1], data)
        assert Store(store.uri).load_checkpoint(ADDRESSES[1]) == data
    store.clear_checkpoint(ADDRESSES[1])
    assert everything(store) == {}


def test_damage_is_found(store):
    for address in ADDRESSES:
        store.publish(address, FILES, spec={}, summary={})
    fs = fsspec.filesystem("s3")
    fs.pipe_file(store.url(ADDRESSES[0], "params.npz"), b"Weights" * 100)
    fs.rm_file(store.url(ADDRESSES[1], "empty"))
    fs.pipe_file(f"{store.uri}/{ADDRESSES[2].folder}/manifest.json", b"{}")
    problems = dict(store.verify())
    assert list(problems) == ADDRESSES
    assert "as its manifest says" in problems[ADDRESSES[0]]
    assert "found no file" in problems[ADDRESSES[1]]
    assert "whole, unedited" in problems[ADDRESSES[2]]
    assert problems[ADDRESSES[3]] is None
    assert not store.exists(ADDRESSES[1])
    store.publish(ADDRESSES[1], FILES, spec={}, summary={})
    assert store.read(ADDRESSES[1], "empty") == b""


def test_many_publish_the_same_at_once(store):
    """Threads share the connections of one store, or have their own."""
    barrier = threading.Barrier(4)

    def publish(number: int) -> str:
        own = store if number % 2 else Store(store.uri)
        barrier.wait()
        return own.publish(ADDRESSES[0], FILES, spec={"number": 1}, summary={}).attempt

    with ThreadPoolExecutor(4) as pool:
        attempts = set(pool.map(publish, range(4)))
    manifest = store.manifest(ADDRESSES[0])
    assert manifest.attempt in attempts
    assert len({path.split("/")[3] for path in everything(store) if "/files/" in path}) == len(attempts)
    assert {name: store.read(ADDRESSES[0], name) for name in FILES} == FILES
    assert list(store.verify()) == [(ADDRESSES[0], None)]


def test_processes_publish_at_once(store):
    """Each its five and one that is everybody's."""
    script = f"""
import sys
from lambda_hat.store.manifest import target_address
from lambda_hat.store.storage import Storage
from lambda_hat.store import Store
store = Store({store.uri!r})
for number in [0, *range(int(sys.argv[1]), int(sys.argv[1]) + 5)]:
    store.publish(target_address(f"tgt_{{number:016x}}"), {{"a": str(number).encode()}}, spec={{}}, summary={{}})
"""
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", script, str(start)]) for start in (10, 20)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    found = dict(store.verify())
    assert len(found) == 11
    assert set(found.values()) == {None}
    assert all(store.read(address, "a") == str(int(address.id[4:], 16)).encode() for address in found)


# The cache of targets


def cached(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cache").rglob("*") if path.is_file()}


def test_a_target_is_fetched_once(store, tmp_path, monkeypatch):
    for address in ADDRESSES[:2]:
        store.publish(address, FILES, spec={}, summary={})
    manifest = store.manifest(ADDRESSES[0])
    assert store.read(ADDRESSES[0], "params.npz") == FILES["params.npz"]
    assert cached(tmp_path) == {manifest.file("params.npz").sha256: FILES["params.npz"]}
    for name in FILES:
        store.read(ADDRESSES[1], name)
    assert len(cached(tmp_path)) == 1, "only targets are read again and again"
    # The bytes now come from there, whatever object of that store asks.
    fetched = []
    monkeypatch.setattr(
        Storage, "read", lambda self, path, read=Storage.read: fetched.append(path.rsplit("/", 1)[-1]) or read(self, path)
    )
    another = Store(store.uri, cache=str(tmp_path / "cache"))
    assert another.read(ADDRESSES[0], "params.npz") == FILES["params.npz"]
    assert fetched == ["manifest.json"]


@pytest.mark.parametrize("damage", [b"", b"weights", b"Weights" * 100], ids=["empty", "short", "changed"])
def test_a_damaged_cache_is_not_read(store, tmp_path, damage):
    store.publish(ADDRESSES[0], FILES, spec={}, summary={})
    store.read(ADDRESSES[0], "params.npz")
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(damage)
    assert store.read(ADDRESSES[0], "params.npz") == FILES["params.npz"]
    assert path.read_bytes() == FILES["params.npz"]


def test_the_cache_hides_no_damage_from_verify(store):
    store.publish(ADDRESSES[0], FILES, spec={}, summary={})
    store.read(ADDRESSES[0], "params.npz")
    fsspec.filesystem("s3").pipe_file(store.url(ADDRESSES[0], "params.npz"), b"Weights" * 100)
    assert [problem is None for _, problem in store.verify()] == [False]


def test_a_cache_that_cannot_be_written_is_no_error(store, tmp_path):
    (tmp_path / "cache").write_text("a file")
    store.publish(ADDRESSES[0], FILES, spec={}, summary={})
    assert store.read(ADDRESSES[0], "params.npz") == FILES["params.npz"]


def test_no_cache(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    store.publish(ADDRESSES[0], FILES, spec={}, summary={})
    Store(store.uri, cache="").read(ADDRESSES[0], "params.npz")
    assert list(tmp_path.iterdir()) == []
    Store(store.uri).read(ADDRESSES[0], "params.npz")
    assert len(list((tmp_path / ".cache/lambda_hat/targets").iterdir())) == 1


def test_processes_read_one_cache_at_once(store, tmp_path):
    content = os.urandom(3_000_000)
    store.publish(ADDRESSES[0], {"params.npz": content}, spec={}, summary={})
    script = f"""
import hashlib
from lambda_hat.store.manifest import target_address
from lambda_hat.store.storage import Storage
from lambda_hat.store import Store
store = Store({store.uri!r}, cache={str(tmp_path / "cache")!r})
print(hashlib.sha256(store.read(target_address({TARGET!r}), "params.npz")).hexdigest())
"""
    command = [sys.executable, "-W", "error", "-c", script]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert digests == {store.manifest(ADDRESSES[0]).files[0].sha256} == set(cached(tmp_path))


# What is left behind


def test_clean(store):
    for address in ADDRESSES:
        store.publish(address, FILES, spec={}, summary={})
    store.save_checkpoint(ADDRESSES[1], b"of finished work")
    store.save_checkpoint(run_address(OTHER_TARGET, OTHER_RUN), b"of unfinished work")
    before = everything(store)
    debris = {f"{ADDRESSES[0].folder}/files/{'0' * 32}/{name}": data for name, data in FILES.items()}
    debris[f"{target_address(OTHER_TARGET).folder}/files/{'1' * 32}/params.npz"] = b"weights"
    foreign = {"notes.txt": b"mine", f"{ADDRESSES[0].folder}/notes/{'0' * 32}/a": b"mine", "targets/mine/checkpoint": b"mine"}
    fs = fsspec.filesystem("s3")
    for path, data in (debris | foreign).items():
        fs.pipe_file(f"{store.uri}/{path}", data)

    assert list(store.clean(hours=1)) == [], "it may be written now"
    upload = fs.call_s3("create_multipart_upload", Bucket="bucket", Key=f"{store.uri[len('s3://bucket/') :]}/targets/x")
    other = fs.call_s3("create_multipart_upload", Bucket="bucket", Key="elsewhere/x")
    checkpoint = f"{ADDRESSES[1].folder}/checkpoint"
    expected = {
        f"{store.uri}/{ADDRESSES[0].folder}/files/{'0' * 32}": sum(map(len, FILES.values())),
        f"{store.uri}/{target_address(OTHER_TARGET).folder}/files/{'1' * 32}": 7,
        f"{store.uri}/{checkpoint}": len(before[checkpoint]),
        f"{store.uri}/targets/x, upload {upload['UploadId']}": 0,
    }
    assert dict(store.clean(hours=0, dry_run=True)) == expected
    assert everything(store) == before | debris | foreign
    assert dict(store.clean(hours=0)) == expected
    del before[checkpoint]
    assert everything(store) == before | foreign
    assert [each["UploadId"] for each in fs.list_multipart_uploads("bucket")] == [other["UploadId"]]
    assert [problem for _, problem in store.verify()] == [None] * 4
    assert list(store.clean(hours=0)) == []


def test_clean_spares_what_is_newer_than_it_is_told(store):
    store.publish(ADDRESSES[0], {}, spec={}, summary={})
    old, half_old = (f"{ADDRESSES[0].folder}/files/{digit * 32}" for digit in "01")
    fs = fsspec.filesystem("s3")
    for path in (f"{old}/a", f"{old}/b", f"{half_old}/a", f"{half_old}/b"):
        fs.pipe_file(f"{store.uri}/{path}", b"x")
    for path in (f"{old}/a", f"{old}/b", f"{half_old}/a"):
        aged(store, path, timedelta(hours=3))
    assert [path for path, _ in store.clean(hours=2)] == [f"{store.uri}/{old}"]


# Pulling


def test_a_folder_goes_to_s3(store, tmp_path, capsys):
    local = Store(str(tmp_path / "local"))
    for address in ADDRESSES:
        local.publish(address, FILES, spec={}, summary={})
    assert main(["pull", "--store", local.uri, "--to", store.uri]) == 0
    assert capsys.readouterr().out == f"4 artifacts copied, 0 were there, 0 damaged, in {store.uri}\n"
    assert everything(store) == {
        str(path.relative_to(local.uri)): path.read_bytes() for path in Path(local.uri).rglob("*") if path.is_file()
    }


def test_pull(store, tmp_path, capsys):
    """A sweep brings its run and the run's target, and not the others."""
    run_settings = tmp_path / "settings.toml"
    run_settings.write_text(f'[store]\nuri = "{store.uri}"\ncache = ""\n')
    for address in [*ADDRESSES, target_address(OTHER_TARGET), run_address(OTHER_TARGET, OTHER_RUN)]:
        store.publish(address, FILES, spec={"run_ids": [RUN]}, summary={"llc": float("nan")})
    remote = everything(store)
    size = sum(map(len, FILES.values()))

    def pull(*arguments: str) -> tuple[int, dict]:
        status = main(["pull", *arguments, "--to", str(tmp_path / "here"), "--settings", str(run_settings), "--json"])
        return status, json.loads(capsys.readouterr().out)

    def here() -> dict[str, bytes]:
        root = tmp_path / "here"
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    to = {"to": str(tmp_path / "here")}
    assert pull("swp_") == (0, {"copied": 4, "present": 0, "damaged": 0, "bytes": 4 * size} | to)
    assert here() == {path: data for path, data in remote.items() if OTHER_TARGET not in path}
    assert pull(RUN, TARGET) == (0, {"copied": 0, "present": 3, "damaged": 0, "bytes": 0} | to)
    # Cut off before its manifest and one file: only these come again.
    local = Store(str(tmp_path / "here"))
    Path(local.url(ADDRESSES[1], "params.npz")).write_bytes(b"torn")
    (tmp_path / "here" / ADDRESSES[1].folder / "manifest.json").unlink()
    assert pull() == (0, {"copied": 3, "present": 3, "damaged": 0, "bytes": 2 * size + len(FILES["params.npz"])} | to)
    assert here() == remote
    assert [problem for _, problem in local.verify()] == [None] * 6
    assert local.catalogue("run").equals(store.catalogue("run"))
    # Damage is not copied.
    fsspec.filesystem("s3").pipe_file(store.url(ADDRESSES[0], "params.npz"), b"Weights" * 100)
    (tmp_path / "here" / ADDRESSES[0].folder / "manifest.json").unlink()
    Path(local.uri, ADDRESSES[0].folder, "files", store.manifest(ADDRESSES[0]).attempt, "params.npz").unlink()
    status, counts = pull(TARGET)
    assert (status, counts["damaged"], counts["present"]) == (1, 1, 2)
    assert not local.exists(ADDRESSES[0])


# What fails, says so


UNREACHABLE = "http://127.0.0.1:9"  # nothing listens there


COMMANDS = {name: name.split() for name in ("ls", "verify", "results", "show run_", "pull --to x", "gc")}
NO_BUCKET = ("s3://nobucket/x", {}, ["s3://nobucket/x does not: The specified bucket does not exist.", "aws s3 mb"])


def wrong(uri: str, variables: dict[str, str | None], words: list[str], monkeypatch, capsys, command: list[str]) -> None:
    """The command ends with one line that has these words."""
    fsspec.filesystem("s3").clear_instance_cache()  # which has the environment's first credentials
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    assert main([*command, "--store", uri]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


@pytest.mark.parametrize("command", COMMANDS.values(), ids=" ".join)
def test_every_command_says_what_is_wrong(server, monkeypatch, capsys, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    wrong(*NO_BUCKET, monkeypatch, capsys, command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "variables", "words"),
    [
        NO_BUCKET,
        ("s3://bucket/x", {"AWS_ENDPOINT_URL": UNREACHABLE}, ["s3://bucket/x does not: Could not connect", "AWS_ENDPOINT_URL"]),
        ("s3://bucket/x", {"AWS_ACCESS_KEY_ID": None}, ["s3://bucket/x does not: ", "redentials", "AWS_SECRET_ACCESS_KEY"]),
        ("s3://bucket/x", {"AWS_PROFILE": "nobody"}, ["profile (nobody) could not be found", "AWS_PROFILE"]),
        ("s3://bucket/x", {"AWS_ENDPOINT_URL": "nowhere"}, ["Invalid endpoint: nowhere", "correct [store.options]"]),
        ("s3://bucket/x", {"LAMBDA_HAT_STORE__OPTIONS": '{"endpoint": 1}'}, ["unexpected keyword", "correct [store.options]"]),
        ("s3://b+/x", {}, ["Invalid bucket name", "bucket's name"]),
    ],
    ids=["bucket", "endpoint", "credentials", "profile", "url", "option", "name"],
)
def test_what_is_wrong_is_said(server, monkeypatch, capsys, uri, variables, words):
    wrong(uri, variables, words, monkeypatch, capsys, ["verify"])


class Fussy:
    """The light server, but for what `answer` says to a request: a status and a body, or None."""

    def __init__(self, answer: Callable[[dict], tuple[str, bytes] | None]) -> None:
        self.app, self.answer, self.asked = DomainDispatcherApplication(create_backend_app), answer, 0

    def __call__(self, environ, start_response):
        answer = self.answer(environ)
        if answer is None:
            return self.app(environ, start_response)
        self.asked += 1
        start_response(answer[0], [("Content-Type", "application/xml")])
        return [answer[1]]


@pytest.fixture
def fussy(server):
    """A server that answers as told, on the same buckets."""
    from werkzeug.serving import make_server

    started = []

    def start(answer: Callable[[dict], tuple[str, bytes] | None]) -> tuple[Fussy, dict]:
        app = Fussy(answer)
        started.append(make_server("127.0.0.1", 0, app, threaded=True))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return app, {"endpoint_url": f"http://127.0.0.1:{started[-1].server_port}"}

    yield start
    for each in started:
        each.shutdown()
        each.server_close()


def error(code: str, message: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


@pytest.mark.parametrize(("status", "code"), [("503 Slow Down", "SlowDown"), ("500 Internal Server Error", "InternalError")])
def test_a_server_that_is_busy_is_asked_again(store, fussy, status, code):
    left = [2, 1]

    def busy(environ: dict) -> tuple[str, bytes] | None:
        wanted = environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith("params.npz") and left
        return (status, error(code, "Please reduce your request rate.")) if wanted and left.pop() else None

    app, options = fussy(busy)
    Store(store.uri, options).publish(ADDRESSES[0], FILES, spec={}, summary={})
    assert app.asked == 2
    assert store.read(ADDRESSES[0], "params.npz") == FILES["params.npz"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("AccessDenied", "Access Denied"),
        ("InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
        ("ExpiredToken", "The provided token has expired."),
    ],
)
def test_refused_credentials(store, fussy, code, message):
    _, options = fussy(lambda environ: ("403 Forbidden", error(code, message)))
    with pytest.raises(StoreUnavailable, match=rf"{message.rstrip('.')}\. Check AWS_ACCESS_KEY_ID .*list, read and write"):
        Store(store.uri, options)


def test_credentials_that_may_only_read(store, fussy, tmp_path):
    """Reading works; writing fails before anything is visible."""
    refused = ("403 Forbidden", error("AccessDenied", "Access Denied"))
    _, options = fussy(lambda environ: refused if environ["REQUEST_METHOD"] in ("PUT", "DELETE", "POST") else None)
    store.publish(ADDRESSES[0], FILES, spec={}, summary={})
    reader = Store(store.uri, options)
    assert reader.read(ADDRESSES[0], "empty") == b""
    for call in (
        lambda: reader.publish(ADDRESSES[1], FILES, spec={}, summary={}),
        lambda: reader.save_checkpoint(ADDRESSES[1], b""),
        reader.check_writable,
    ):
        with pytest.raises(StoreUnavailable, match="Access Denied"):
            call()
    assert [address for address, _ in reader.verify()] == ADDRESSES[:1]


def test_a_bucket_that_is_gone(server):
    fs = fsspec.filesystem("s3")
    fs.mkdir("fleeting")
    store = Store("s3://fleeting/x")
    fs.rmdir("fleeting")
    with pytest.raises(StoreUnavailable, match="bucket does not exist"):
        store.publish(ADDRESSES[0], FILES, spec={}, summary={})


def test_options_and_variables_of_the_user_win(server, monkeypatch):
    """Over the timeouts and retries that the store sets."""
    from lambda_hat.store.storage import _with_defaults

    ours = _with_defaults("s3://bucket/x", {"anon": True})
    assert ours["anon"] is True
    assert ours["config_kwargs"]["retries"]["mode"] == "standard"
    theirs = {"config_kwargs": {"retries": {"mode": "adaptive", "max_attempts": 9}, "connect_timeout": 60}}
    assert theirs["config_kwargs"].items() <= _with_defaults("s3://bucket/x", theirs)["config_kwargs"].items()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "9")
    assert "retries" not in _with_defaults("s3://bucket/x", {})["config_kwargs"]
    assert "config_kwargs" not in _with_defaults("memory://x", {})
