"""The artifact store: what it keeps, what it refuses, and that damage is never read as a result."""

import hashlib
import json
import os
import subprocess
import sys
import uuid
from datetime import datetime
from pathlib import Path

import fsspec
import ml_dtypes
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lambda_hat.specs.spec import ALGORITHM_VERSION, ID_PATTERN, InvalidInput, canonical_json
from lambda_hat.store.arrays import pack_arrays, unpack_arrays
from lambda_hat.store.manifest import (
    Address,
    ArtifactError,
    StoreUnavailable,
    curvature_address,
    diagnosis_address,
    run_address,
    study_address,
    sweep_address,
    target_address,
    trials_address,
)
from lambda_hat.store.store import Store

TARGET, OTHER_TARGET = "tgt_00000000000000aa", "tgt_00000000000000bb"
RUN, OTHER_RUN = "run_00000000000000cc", "run_0000000000000ddd"
SWEEP = "swp_00000000000000ee"
ADDRESSES = [target_address(TARGET), run_address(TARGET, RUN), diagnosis_address(TARGET, RUN), sweep_address(SWEEP)]
FILES = {"params.npz": b"weights" * 100, "plots/trace.png": b"\x89PNG", "empty": b""}
SPEC = {"sampler": {"kind": "sgld", "step_size": 1e-4}, "widths": [4, 8]}


@pytest.fixture(params=["local", "file", "memory"])
def store(request, tmp_path):
    if request.param == "memory":
        yield Store(f"memory://{uuid.uuid4().hex}")
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
    else:
        yield Store(f"file://{tmp_path}/a store" if request.param == "file" else str(tmp_path / "a [store]*"))


@pytest.fixture
def local(tmp_path):
    return Store(str(tmp_path / "store"))


def folder(store: Store, address: Address) -> Path:
    return Path(store.uri) / address.folder


def edit(store: Store, address: Address, **changes) -> None:
    """Changes a manifest and makes its checksum fit again, as a forger would."""
    path = folder(store, address) / "manifest.json"
    content = json.loads(path.read_text()) | changes
    del content["manifest_sha256"]
    content["manifest_sha256"] = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    path.write_text(canonical_json(content))


def everything(root: str | Path) -> set[str]:
    return {str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()}


# Round trip


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: address.kind)
def test_what_is_published_is_read(store, address):
    assert not store.exists(address)
    published = store.publish(address, FILES, spec=SPEC, summary={"llc": 2.5})
    manifest = store.manifest(address)
    assert manifest == published
    assert (manifest.address, manifest.spec, manifest.summary) == (address, SPEC, {"llc": 2.5})
    assert manifest.algorithm_version == ALGORITHM_VERSION
    assert datetime.fromisoformat(manifest.created_at).utcoffset().total_seconds() == 0
    assert {file.name: (file.size, file.sha256) for file in manifest.files} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()
    }
    assert {name: store.read(address, name) for name in FILES} == FILES
    assert list(store.verify()) == [(address, None)]


def test_a_second_store_object_sees_it(store):
    store.publish(ADDRESSES[0], FILES, spec=SPEC, summary={})
    assert Store(store.uri).read(ADDRESSES[0], "params.npz") == FILES["params.npz"]


def test_artifacts_of_all_kinds_live_side_by_side(store):
    for address in ADDRESSES:
        store.publish(address, {"kind": address.kind.encode()}, spec={}, summary={})
    assert [store.read(address, "kind").decode() for address in ADDRESSES] == [address.kind for address in ADDRESSES]
    assert [address for address, problem in store.verify() if problem is None] == ADDRESSES


def test_an_artifact_may_have_no_files(store):
    store.publish(ADDRESSES[3], {}, spec={}, summary={"runs": [RUN]})
    assert store.manifest(ADDRESSES[3]).summary == {"runs": [RUN]}


def test_publishing_again_writes_nothing(local):
    first = local.publish(ADDRESSES[0], FILES, spec=SPEC, summary={"llc": 1.0})
    before = everything(local.uri)
    assert local.publish(ADDRESSES[0], {"other": b"x"}, spec={}, summary={}) == first
    assert everything(local.uri) == before


def test_what_json_has_no_word_for_is_null(store):
    summary = {
        "rhat": float("nan"),
        "deep": [float("inf"), {"x": -np.float64("inf")}],
        "loss": np.float64(0.1),
        3: {10: 1, 9: 2},
    }
    manifest = store.publish(ADDRESSES[1], {}, spec={}, summary=summary)
    assert manifest.summary == {"rhat": None, "deep": [None, {"x": None}], "loss": 0.1, "3": {"10": 1, "9": 2}}
    assert store.manifest(ADDRESSES[1]) == manifest


def test_what_json_cannot_hold_writes_nothing(local):
    with pytest.raises(TypeError, match="not JSON serializable"):
        local.publish(ADDRESSES[0], FILES, spec={}, summary={"llc": np.float32(1)})
    assert not Path(local.uri).exists()


def test_url_names_the_file(store):
    store.publish(ADDRESSES[2], FILES, spec={}, summary={})
    url = store.url(ADDRESSES[2], "plots/trace.png")
    with fsspec.open(url) as file:
        assert file.read() == FILES["plots/trace.png"]


def test_a_relative_path_is_resolved_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("results")
    store.publish(ADDRESSES[0], FILES, spec={}, summary={})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.uri == str(tmp_path / "results")
    assert store.exists(ADDRESSES[0])


@pytest.mark.parametrize("uri", ["", "  ", "s3://", "memory://", "nope://x", "gs://bucket/folder"])
def test_a_uri_nothing_can_open_is_refused(uri):
    with pytest.raises(InvalidInput, match=f"A store's URI .*got {uri!r}"):
        Store(uri)


# Damage


def test_nothing_is_visible_before_the_manifest(local):
    """What a writer leaves that is killed just before its last step."""
    address = ADDRESSES[0]
    local.publish(address, FILES, spec=SPEC, summary={})
    (folder(local, address) / "manifest.json").rename(folder(local, address) / "manifest.json.0123.tmp")
    assert local.manifest(address) is None
    with pytest.raises(ArtifactError, match=r"once its manifest is; found none at .*Compute it"):
        local.read(address, "params.npz")
    assert list(local.verify()) == []
    assert len(local.catalogue("target")) == 0
    local.publish(address, FILES, spec=SPEC, summary={})
    assert local.read(address, "params.npz") == FILES["params.npz"]


def test_a_manifest_torn_anywhere_is_not_seen(local):
    address = ADDRESSES[1]
    local.publish(address, FILES, spec=SPEC, summary={"llc": 1.0})
    path = folder(local, address) / "manifest.json"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert local.manifest(address) is None
    [(_, problem)] = local.verify()
    assert "whole, unedited and in its place" in problem
    with pytest.raises(ArtifactError, match="whole, unedited"):
        local.read(address, "params.npz")
    local.publish(address, FILES, spec=SPEC, summary={"llc": 1.0})
    assert [problem for _, problem in local.verify()] == [None]


def test_a_manifest_with_any_byte_changed_is_not_seen(local):
    address = ADDRESSES[1]
    local.publish(address, {"a": b"x"}, spec={"step": 0.25}, summary={"llc": 1.0})
    path = folder(local, address) / "manifest.json"
    whole = path.read_bytes()
    for index, byte in enumerate(whole):
        path.write_bytes(whole[:index] + bytes([byte ^ 1]) + whole[index + 1 :])
        assert local.manifest(address) is None, whole[index:]


@pytest.mark.parametrize(
    "text", [b"[]", b"null", b"{}", b'"x"', b"\xff", b"[" * 100_000, b'{"manifest_sha256": []}', b"1" * 5000]
)
def test_foreign_json_is_not_a_manifest(local, text):
    folder(local, ADDRESSES[0]).mkdir(parents=True)
    (folder(local, ADDRESSES[0]) / "manifest.json").write_bytes(text)
    assert local.manifest(ADDRESSES[0]) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "found no file"),
        (lambda path: path.write_bytes(b"short"), "found 5 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "found 701 bytes"),
    ],
    ids=["missing", "short", "long"],
)
def test_an_artifact_with_a_file_missing_or_of_another_size_is_not_seen(local, damage, reason):
    local.publish(ADDRESSES[0], FILES, spec=SPEC, summary={})
    damage(Path(local.url(ADDRESSES[0], "params.npz")))
    assert local.manifest(ADDRESSES[0]) is None
    with pytest.raises(ArtifactError, match=f"{reason}.*Compute it again"):
        local.read(ADDRESSES[0], "empty")
    assert reason in dict(local.verify())[ADDRESSES[0]]
    local.publish(ADDRESSES[0], FILES, spec=SPEC, summary={})
    assert list(local.verify()) == [(ADDRESSES[0], None)]


def test_changed_bytes_of_the_same_size_are_not_read(local):
    for address in ADDRESSES:
        local.publish(address, FILES, spec=SPEC, summary={})
    path = Path(local.url(ADDRESSES[0], "params.npz"))
    path.write_bytes(path.read_bytes().replace(b"w", b"W", 1))
    with pytest.raises(ArtifactError, match=r"as its manifest says.*Delete .*manifest\.json and compute it again"):
        local.read(ADDRESSES[0], "params.npz")
    assert local.read(ADDRESSES[0], "plots/trace.png") == FILES["plots/trace.png"]
    assert [address for address, problem in local.verify() if problem] == ADDRESSES[:1]
    (folder(local, ADDRESSES[0]) / "manifest.json").unlink()  # the remedy
    local.publish(ADDRESSES[0], FILES, spec=SPEC, summary={})
    assert all(problem is None for _, problem in local.verify())


def test_an_unknown_name_is_an_error_that_lists_the_names(store):
    store.publish(ADDRESSES[0], FILES, spec=SPEC, summary={})
    for method in (store.read, store.url):
        with pytest.raises(ArtifactError, match=r"got 'parms.npz', .* has params.npz, plots/trace.png, empty"):
            method(ADDRESSES[0], "parms.npz")


def test_a_manifest_of_another_artifact_is_not_seen(local):
    local.publish(target_address(TARGET), FILES, spec=SPEC, summary={})
    local.publish(run_address(TARGET, RUN), FILES, spec=SPEC, summary={})
    for origin, copy in [
        (target_address(TARGET), target_address(OTHER_TARGET)),
        (run_address(TARGET, RUN), run_address(OTHER_TARGET, RUN)),
        (run_address(TARGET, RUN), run_address(TARGET, OTHER_RUN)),
        (run_address(TARGET, RUN), diagnosis_address(TARGET, RUN)),
    ]:
        folder(local, copy).mkdir(parents=True, exist_ok=True)
        os.symlink(folder(local, origin) / "files", folder(local, copy) / "files")
        (folder(local, copy) / "manifest.json").write_bytes((folder(local, origin) / "manifest.json").read_bytes())
        assert local.manifest(copy) is None
        assert "it is the manifest of" in dict(local.verify())[copy]


# Escape

FRAGMENTS = [
    "..",
    ".",
    "/",
    "\\",
    "~",
    "\0",
    "%2e",
    "C:",
    "s3://",
    "tgt_",
    "run_",
    "swp_",
    "00000000000000aa",
    "a",
    "A",
    "０",
    "\n",
    "*",
]
hostile = st.one_of(
    st.text(max_size=24), st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), st.from_regex(ID_PATTERN)
)


@settings(max_examples=400, deadline=None)
@given(hostile, hostile)
def test_no_id_leads_out_of_the_store(first, second):
    for make, ids, prefixes in [
        (target_address, (first,), ("tgt_",)),
        (run_address, (first, second), ("tgt_", "run_")),
        (diagnosis_address, (TARGET, second), ("tgt_", "run_")),
        (sweep_address, (second,), ("swp_",)),
    ]:
        if all(ID_PATTERN.fullmatch(text) and text.startswith(prefix) for text, prefix in zip(ids, prefixes, strict=True)):
            relative = Path(make(*ids).folder)
            assert Path(os.path.normpath(relative)) == relative
            assert relative.parts[0] in ("targets", "sweeps")
        else:
            with pytest.raises(InvalidInput):
                make(*ids)


@pytest.mark.parametrize(
    ("kind", "id_", "target_id"),
    [("target", TARGET, "../.."), ("target", TARGET, None), ("sweep", SWEEP, "../.."), ("run", RUN, None), ("run", 3, TARGET)],
)
def test_an_address_made_by_hand_is_checked_too(kind, id_, target_id):
    with pytest.raises(InvalidInput):
        Address(kind, id_, target_id)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=24), st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)))
def test_no_file_name_leads_out_of_its_attempt(name):
    store = Store("memory://names")
    try:
        manifest = store.publish(ADDRESSES[0], {name: b"x"}, spec={}, summary={})
    except InvalidInput:
        assert MemoryFileSystem.store == {}
    else:
        place = f"/names/{ADDRESSES[0].folder}/files/{manifest.attempt}/{name}"
        assert os.path.normpath(place) == place
        assert set(MemoryFileSystem.store) == {place, f"/names/{ADDRESSES[0].folder}/manifest.json"}
        assert store.read(ADDRESSES[0], name) == b"x"
    finally:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "../../../../../secret",
        "{root}/secret",
        "a/../../secret",
        "..\\secret",
        "./secret",
        "a//b",
        "",
        "a/",
        "a\n",
    ],
)
def test_a_forged_manifest_names_no_file_outside(local, tmp_path, name):
    address = ADDRESSES[0]
    manifest = local.publish(address, {"a": b"x"}, spec={}, summary={})
    for place in (tmp_path / "secret", folder(local, address) / "files/secret"):
        place.write_bytes(b"s")
    file = {"name": name.format(root=tmp_path), "size": 1, "sha256": hashlib.sha256(b"s").hexdigest()}
    edit(local, address, files=[file])
    assert local.manifest(address) is None
    with pytest.raises(ArtifactError):
        local.read(address, file["name"])
    edit(local, address, files=[file | {"name": "a", "sha256": manifest.files[0].sha256}])
    assert local.exists(address), "the forger's checksum fits, so it was the name that was refused"


def test_a_forged_manifest_names_no_other_attempt_folder(local):
    manifest = local.publish(ADDRESSES[0], {"a": b"x"}, spec={}, summary={})
    edit(local, ADDRESSES[0], attempt=f"../files/{manifest.attempt}")
    assert (folder(local, ADDRESSES[0]) / "files" / f"../files/{manifest.attempt}/a").exists()
    assert local.manifest(ADDRESSES[0]) is None


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "sweep"},
        {"id": "../x"},
        {"target_id": OTHER_TARGET},
        {"files": [{"name": "a", "size": -1, "sha256": "0" * 64}]},
        {"files": None},
        {"spec": []},
    ],
    ids=str,
)
def test_a_forged_manifest_is_checked_field_by_field(local, change):
    local.publish(ADDRESSES[0], {"a": b"x"}, spec={}, summary={})
    edit(local, ADDRESSES[0], **change)
    assert local.manifest(ADDRESSES[0]) is None


# Failing writes


def test_a_full_disk_leaves_nothing(tmp_path):
    """The kernel refuses the write; once within the second data file, once within the manifest."""
    script = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from lambda_hat.store.manifest import StoreUnavailable, target_address
from lambda_hat.store import Store
store, address = Store({str(tmp_path / "store")!r}), target_address({TARGET!r})
for files, summary in [({{"small": b"x", "big": bytes(1_000_000)}}, {{}}), ({{"small": b"x"}}, {{"text": "x" * 1_000_000}})]:
    try:
        store.publish(address, files, spec={{}}, summary=summary)
    except StoreUnavailable as error:
        print(type(error.__cause__).__name__, error.__cause__.errno, store.exists(address), list(store.verify()))
store.save_checkpoint(address, b"first")
try:
    store.save_checkpoint(address, bytes(1_000_000))
except StoreUnavailable:
    print(store.load_checkpoint(address))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["OSError 27 False []", "OSError 27 False []", "b'first'"]
    assert everything(tmp_path) == {f"store/{ADDRESSES[0].folder}/checkpoint"}
    assert list((tmp_path / "store" / ADDRESSES[0].folder / "files").iterdir()) == []
    Store(str(tmp_path / "store")).publish(ADDRESSES[0], FILES, spec={}, summary={})
    assert list(Store(str(tmp_path / "store")).verify()) == [(ADDRESSES[0], None)]


class Unreliable(MemoryFileSystem):
    """A remote store whose n-th PUT fails, before or after it has taken effect."""

    protocol = "unreliable"
    store: dict = {}  # noqa: RUF012 (the base class keeps it so)
    pseudo_dirs = [""]  # noqa: RUF012
    fails_at, arrives = 0, False

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        type(self).fails_at -= 1
        if self.fails_at != 0 or self.arrives:
            super().pipe_file(path, value, mode=mode, **kwargs)
        if self.fails_at == 0:
            raise TimeoutError("no answer")


@pytest.fixture
def unreliable():
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    yield Store("unreliable://x")
    Unreliable.store.clear()


@pytest.mark.parametrize("arrives", [False, True])
@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_put_that_fails_shows_all_or_nothing(unreliable, fails_at, arrives):
    Unreliable.fails_at, Unreliable.arrives = fails_at, arrives
    with pytest.raises(StoreUnavailable, match=r"unreliable://x does not: no answer\. Check the network"):
        unreliable.publish(ADDRESSES[0], FILES, spec=SPEC, summary={})
    published = fails_at == 4 and arrives
    assert unreliable.exists(ADDRESSES[0]) is published
    assert [problem for _, problem in unreliable.verify()] == ([None] if published else [])
    if fails_at < 4:
        assert Unreliable.store == {}
    unreliable.publish(ADDRESSES[0], FILES, spec=SPEC, summary={})
    assert {name: unreliable.read(ADDRESSES[0], name) for name in FILES} == FILES


def test_an_unreachable_store_is_an_error_not_an_absence(tmp_path, monkeypatch):
    store = Store("unreliable://x")
    monkeypatch.setattr(Unreliable, "cat_file", lambda self, path, **_: (_ for _ in ()).throw(TimeoutError("no answer")))
    for call in (store.exists, store.manifest, store.load_checkpoint):
        with pytest.raises(StoreUnavailable, match="no answer"):
            call(ADDRESSES[0])


def test_a_folder_that_cannot_be_used_says_so(tmp_path):
    """A file stands where the store needs a folder; a folder where it needs a file."""
    store = Store(str(tmp_path / "store"))
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreUnavailable, match=r"store does not: .*Check the folder's permissions and the space on its disk"):
        store.publish(ADDRESSES[0], FILES, spec={}, summary={})
    (tmp_path / "store").unlink()
    (folder(store, ADDRESSES[1]) / "checkpoint").mkdir(parents=True)
    with pytest.raises(StoreUnavailable, match="Is a directory"):
        store.save_checkpoint(ADDRESSES[1], b"draws")


# What killed work leaves


def test_clean(local):
    for address in ADDRESSES:
        local.publish(address, FILES, spec={}, summary={})
    before = everything(local.uri)
    left = [
        f"{ADDRESSES[0].folder}/files/{'0' * 32}/params.npz",
        f"{ADDRESSES[1].folder}/files/{'1' * 32}/params.npz.{'2' * 32}.tmp",
        f"{ADDRESSES[2].folder}/manifest.json.{'3' * 32}.tmp",
        f"{ADDRESSES[1].folder}/checkpoint",
        f"{target_address(OTHER_TARGET).folder}/runs/{RUN}/diagnosis/files/{'4' * 32}/plots/trace.png",
    ]
    kept = [
        f"{run_address(TARGET, OTHER_RUN).folder}/checkpoint",
        f"{ADDRESSES[0].folder}/notes.tmp",
        f"{ADDRESSES[0].folder}/files/mine/params.npz",
        f"targets/mine/files/{'5' * 32}/params.npz",
        "checkpoint",
    ]
    for path in [*left, *kept]:
        file = Path(local.uri, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"12345")
        os.utime(file, (1e9, 1e9))
    fresh = f"{ADDRESSES[0].folder}/files/{'6' * 32}/params.npz"  # of an artifact that is being made again
    Path(local.uri, fresh).parent.mkdir()
    Path(local.uri, fresh).write_bytes(b"")
    named = {f"{local.uri}/{path.split('/params.npz')[0].split('/plots')[0]}" for path in left}
    assert {path for path, _ in local.clean(24, dry_run=True)} == named
    assert everything(local.uri) == {*before, *left, *kept, fresh}
    assert dict(local.clean(24)) == dict.fromkeys(named, 5)
    assert everything(local.uri) == {*before, *kept, fresh}
    assert not any(Path(path).exists() for path in named)
    assert [problem for _, problem in local.verify()] == [None] * 4
    assert [path for path, _ in local.clean(0)] == [f"{local.uri}/{fresh.removesuffix('/params.npz')}"]
    assert list(local.clean(0)) == []


def test_clean_leaves_what_a_damaged_manifest_may_name(local):
    local.publish(ADDRESSES[0], FILES, spec={}, summary={})
    for text in (b"", b"[]", b"{", b"\xff", b"{}"):
        (folder(local, ADDRESSES[0]) / "manifest.json").write_bytes(text)
        assert list(local.clean(0)) == []


def test_clean_leaves_the_checkpoint_of_work_done_again(local):
    local.publish(ADDRESSES[1], FILES, spec={}, summary={})
    local.save_checkpoint(ADDRESSES[1], b"draws")
    Path(local.url(ADDRESSES[1], "params.npz")).unlink()
    assert list(local.clean(0)) == []
    assert local.load_checkpoint(ADDRESSES[1]) == b"draws"


def test_clean_takes_no_name_for_a_pattern(tmp_path):
    """`*` and `[]` in a store's name stand for themselves."""
    for store, other in (
        (Store(str(tmp_path / "a*[b]")), Store(str(tmp_path / "a1b"))),
        (Store("memory://a*[b]"), Store("memory://a1b")),
    ):
        for each in (store, other):
            each.publish(ADDRESSES[0], FILES, spec={}, summary={})
            path = f"{each._path(ADDRESSES[0])}/files/{'0' * 32}/params.npz"
            each._storage._fs.makedirs(path.rsplit("/", 1)[0])
            each._storage._fs.pipe_file(path, b"12345")
        assert [size for _, size in store.clean(0)] == [5]
        assert [size for _, size in other.clean(0, dry_run=True)] == [5]
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_clean_of_an_absent_store(store):
    assert list(store.clean(0)) == []


# Copies


def test_related(store):
    runs = [run_address(TARGET, RUN), run_address(TARGET, OTHER_RUN), run_address(OTHER_TARGET, OTHER_RUN)]
    for address in [*runs, target_address(TARGET), diagnosis_address(TARGET, RUN)]:
        store.publish(address, {}, spec={}, summary={})
    store.publish(sweep_address(SWEEP), {}, spec={"run_ids": [OTHER_RUN]}, summary={})
    both = [(run, diagnosis_address(run.target_id, run.id)) for run in runs]
    targets = [target_address(TARGET), target_address(OTHER_TARGET)]
    assert set(store.related(targets[0])) == {targets[0], curvature_address(TARGET), *both[0], *both[1]}
    assert set(store.related(runs[2])) == {targets[1], *both[2]}
    assert set(store.related(sweep_address(SWEEP))) == {sweep_address(SWEEP), *targets, *both[1], *both[2]}
    study, trials = study_address("sty_00000000000000dd"), trials_address("trl_00000000000000ee")
    store.publish(study, {}, spec={"trials_ids": [trials.id], "target_ids": [TARGET], "run_ids": [RUN]}, summary={})
    assert set(store.related(study)) == {study, trials, targets[0], curvature_address(TARGET), *both[0]}


def test_copy(store, local):
    store.publish(ADDRESSES[2], FILES, spec=SPEC, summary={"llc": 2.5})
    assert local.copy(ADDRESSES[2], store) == sum(map(len, FILES.values()))
    assert local.manifest(ADDRESSES[2]) == store.manifest(ADDRESSES[2])
    assert list(local.verify()) == [(ADDRESSES[2], None)]
    assert local.copy(ADDRESSES[2], store) is None
    with pytest.raises(ArtifactError, match="found none"):
        local.copy(ADDRESSES[0], store)
    assert not folder(local, target_address(TARGET)).joinpath("manifest.json").exists()


# Two writers


def test_a_writer_that_is_overtaken_does_no_harm(store):
    """The second writer publishes after the first has looked and before it has written anything."""

    class Slow(dict):
        def items(self):
            self.overtaken_by = self.__dict__.get("overtaken_by") or store.publish(ADDRESSES[0], FILES, spec=SPEC, summary={})
            return super().items()

    files = Slow(FILES)
    manifest = store.publish(ADDRESSES[0], files, spec=SPEC, summary={})
    assert manifest.attempt != files.overtaken_by.attempt
    assert store.manifest(ADDRESSES[0]) == manifest
    assert {name: store.read(ADDRESSES[0], name) for name in FILES} == FILES
    overtaken = f"{store.uri}/{ADDRESSES[0].folder}/files/{files.overtaken_by.attempt}"
    assert fsspec.core.url_to_fs(overtaken)[0].exists(overtaken), "readers that hold the first manifest still read its files"


# Listing


def test_catalogue_of_an_absent_store_is_empty(store):
    for kind in ("target", "run", "diagnosis", "sweep"):
        frame = store.catalogue(kind)
        assert list(frame.columns) == ["id", "target_id", "created_at"]
        assert len(frame) == 0


def test_catalogue_flattens_specs_and_summaries(store):
    store.publish(
        run_address(OTHER_TARGET, OTHER_RUN), FILES, spec=SPEC, summary={"llc": 2.5, "ess": {"bulk": 100}, "id": "ignored"}
    )
    store.publish(run_address(TARGET, RUN), {}, spec={"sampler": {"kind": "hmc"}}, summary={"llc": float("nan")})
    store.publish(target_address(TARGET), {}, spec={}, summary={})
    frame = store.catalogue("run")
    assert frame["id"].tolist() == [OTHER_RUN, RUN], "oldest first, not by id"
    assert frame["target_id"].tolist() == [OTHER_TARGET, TARGET]
    assert frame["created_at"].is_monotonic_increasing
    assert frame["spec.sampler.kind"].tolist() == ["sgld", "hmc"]
    assert frame["spec.widths"].iloc[0] == (4, 8)
    assert frame["llc"].dtype == float
    assert frame["llc"].iloc[0] == 2.5
    assert frame["llc"].isna().tolist() == [False, True]
    assert frame["ess.bulk"].iloc[0] == 100
    assert store.catalogue("target")["id"].tolist() == [TARGET]
    assert len(store.catalogue("sweep")) == len(store.catalogue("diagnosis")) == 0


def test_catalogue_leaves_out_what_is_not_valid(local):
    for target_id in (TARGET, OTHER_TARGET):
        local.publish(target_address(target_id), FILES, spec={}, summary={})
    Path(local.url(target_address(TARGET), "params.npz")).unlink()
    (Path(local.uri) / "targets/notes.txt").write_text("mine")
    (Path(local.uri) / "targets/tgt_zz").mkdir()
    local.save_checkpoint(run_address(OTHER_TARGET, RUN), b"half")
    assert local.catalogue("target")["id"].tolist() == [OTHER_TARGET]
    assert len(local.catalogue("run")) == 0
    assert [address.id for address, _ in local.verify()] == [TARGET, OTHER_TARGET]


def test_find(store):
    for address in [*ADDRESSES, run_address(OTHER_TARGET, OTHER_RUN)]:
        store.publish(address, {}, spec={}, summary={})
    assert store.find(TARGET) == target_address(TARGET)
    assert store.find(RUN) == run_address(TARGET, RUN)
    assert store.find("run_0000000000000d") == run_address(OTHER_TARGET, OTHER_RUN)
    assert store.find("swp_") == sweep_address(SWEEP)
    with pytest.raises(InvalidInput, match=f"fits {RUN}, {OTHER_RUN}"):
        store.find("run_00")
    with pytest.raises(InvalidInput, match=r"fits none.*lambda-hat ls"):
        store.find(OTHER_TARGET)
    for text in ("", "tgt", TARGET + "0", "../x", "run_*"):
        with pytest.raises(InvalidInput, match="16 hexadecimal digits"):
            store.find(text)


# Checkpoints


def test_checkpoint(store):
    address = ADDRESSES[1]
    assert store.load_checkpoint(address) is None
    store.clear_checkpoint(address)
    for data in (b"draw 100", b"", bytes(range(256)) * 1000):
        store.save_checkpoint(address, data)
        assert store.load_checkpoint(address) == data
    assert not store.exists(address)
    store.publish(address, FILES, spec={}, summary={})
    store.clear_checkpoint(address)
    assert store.load_checkpoint(address) is None
    assert list(store.verify()) == [(address, None)]


def test_a_torn_checkpoint_is_ignored(local):
    address = ADDRESSES[1]
    local.save_checkpoint(address, b"state of all chains")
    path = folder(local, address) / "checkpoint"
    whole = path.read_bytes()
    for index in range(len(whole)):
        path.write_bytes(whole[:index])
        assert local.load_checkpoint(address) is None
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        assert local.load_checkpoint(address) is None
    assert everything(folder(local, address)) == {"checkpoint"}


# Arrays


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["file", "allow_pickle", "mlp/~/linear_0/w", "a", "allow_pickle.x", "ü"]),
        hnp.arrays(
            st.one_of(hnp.floating_dtypes(), hnp.integer_dtypes(), hnp.boolean_dtypes(), hnp.unicode_string_dtypes()),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
        ),
    )
)
def test_arrays_round_trip(arrays):
    packed = pack_arrays(arrays)
    assert pack_arrays(arrays) == packed
    loaded = unpack_arrays(packed)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize(
    "array",
    [np.array([{}, []], dtype=object), np.zeros(2, dtype=[("a", float)]), np.zeros(2, dtype=ml_dtypes.bfloat16), {"a": 1}],
    ids=["objects", "structure", "bfloat16", "dict"],
)
def test_arrays_that_would_not_come_back_are_refused(array):
    with pytest.raises(InvalidInput, match=r"'w' has dtype .*convert it first"):
        pack_arrays({"w": array})


def test_pickled_arrays_are_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        unpack_arrays((tmp_path / "a.npz").read_bytes())


def test_the_store_imports_no_heavy_package():
    script = (
        "import lambda_hat.store, sys; print([name for name in ('jax', 'pandas', 'prefect', 's3fs') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
