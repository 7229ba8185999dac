"""Whatever is typed, configured or found in a store is either understood or refused in words: no other error, no write outside.

`make test` tries a few hundred inputs, `make test-faults` ten thousand.
"""

import contextlib
import json
import os
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lambda_hat.cli import main
from lambda_hat.llc.plan import make_plan, spec_from_json
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.settings import load_settings
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.manifest import ArtifactError, run_address, target_address
from lambda_hat.store.store import Store

CHECKOUT = Path(__file__).parents[2]
SETTINGS = (CHECKOUT / "settings.toml").read_text()
SPEC = RunSpec.from_dict({"target": {"family": "mlp"}, "sampler": {"kind": "sgld"}}).model_dump_json()

KEYS = (
    "target", "sampler", "posterior", "target.mlp.model.width", "model.depth", "data.n_data", "training", "sampler.seed",
    "sampler.sgld.step_size", "posterior.nbeta", "posterior.parameters", "target.checkpoint", "observables", "",
)  # fmt: skip
VALUES = (
    "mlp", "sgld,hmc", "1", "1e400", "-0", "range(0,9)", "range(1,1e9)", "[1,2]", "[[1]]", "none", "'a b'", "auto", "all",
    "\x00",
)  # fmt: skip


def mutated(text: str) -> st.SearchStrategy[str]:
    """The text with a few pieces cut, doubled or replaced."""
    places = st.integers(0, len(text))
    pieces = st.one_of(st.text(max_size=8), st.sampled_from([*VALUES, '"', "=", "[", "{", "\n", "1e999", "../..", "null"]))
    edit = st.tuples(places, st.integers(0, 12), pieces)

    def apply(edits: list[tuple[int, int, str]]) -> str:
        changed = text
        for place, length, piece in edits:
            changed = changed[:place] + piece + changed[place + length :]
        return changed

    return st.lists(edit, min_size=1, max_size=4).map(apply)


overrides = st.one_of(
    st.text(max_size=40),
    st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)).map("=".join),
    st.tuples(st.sampled_from(KEYS), st.text(max_size=20)).map("=".join),
    mutated("sampler.sgld.step_size=1e-5,range(0,3),[1,2]"),
)
names = st.one_of(
    st.text(max_size=30), st.text("0123456789abcdef", max_size=20).map("tgt_".__add__), st.text("./~\\\0", max_size=20),
    mutated("run_0123456789abcdef"),
)  # fmt: skip


def examples(count: int):
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


@pytest.fixture(params=[pytest.param(40, id="few"), pytest.param(2000, id="many", marks=pytest.mark.faults)])
def count(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    """Where everything may be written is `root`; nothing else appears beside it."""
    (tmp_path / "root").mkdir()
    yield tmp_path / "root"
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_overrides(count):
    known = load_settings(CHECKOUT / "settings.toml")

    @examples(count)
    @given(st.lists(overrides, max_size=4), st.sampled_from([None, "", "defualt", *known.experiments]))
    def check(texts, experiment):
        with contextlib.suppress(InvalidInput):
            make_plan(known, experiment, texts)

    check()


def test_settings(count, folder):
    file = folder / "settings.toml"

    @examples(count)
    @given(st.one_of(mutated(SETTINGS).map(str.encode), st.binary(max_size=200)))
    def check(content):
        file.write_bytes(content)
        with contextlib.suppress(InvalidInput):
            make_plan(load_settings(file))

    check()


def test_specs(count):
    tree = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
        max_leaves=8,
    )

    @examples(count)
    @given(st.one_of(mutated(SPEC), tree.map(json.dumps)))
    def check(text):
        with contextlib.suppress(InvalidInput):
            assert spec_from_json(text).run_id.startswith("run_")

    check()


def test_manifests(count, folder):
    store = Store(str(folder))
    address = target_address("tgt_0123456789abcdef")
    store.publish(address, {"a.npz": b"a" * 100}, spec={"family": "mlp"}, summary={"llc": 1.0})
    (path,) = folder.glob("targets/*/manifest.json")
    text = path.read_text()

    @examples(count)
    @given(st.one_of(mutated(text).map(lambda changed: changed.encode(errors="replace")), st.binary(max_size=100)))
    def check(content):
        path.write_bytes(content)
        manifest = store.manifest(address)
        if manifest is not None:
            assert json.loads(content) == json.loads(text)
        assert len(store.catalogue("target")) == (manifest is not None)
        ((_, problem),) = store.verify()
        assert (problem is None) == (manifest is not None)
        with contextlib.suppress(ArtifactError):
            assert store.read(address, "a.npz") == b"a" * 100

    check()


def test_ids_and_names(count, folder, capsys):
    store = Store(str(folder))
    before = sorted(os.walk(folder))

    @examples(count)
    @given(names, names)
    def check(text, other):
        with contextlib.suppress(InvalidInput):
            store.find(text)
        for place in (target_address, lambda name: run_address(other, name)):
            with contextlib.suppress(InvalidInput, ArtifactError):
                store.read(place(text), other)
        if not text.startswith("-") and set(text) <= set(string.printable):
            assert main(["show", text, "--store", str(folder), "--settings", str(CHECKOUT / "settings.toml")]) == 2
        capsys.readouterr()

    check()
    assert sorted(os.walk(folder)) == before
