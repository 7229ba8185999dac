"""Ids depend on all that changes numbers and on nothing else."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lambda_hat.llc.run import RunSpec
from lambda_hat.specs import spec as spec_module
from lambda_hat.specs.spec import InvalidInput, canonical_json, check_id, content_id

RUNS = {
    "mlp": {"target": {"family": "mlp"}, "sampler": {"kind": "sgld"}},
    "digits": {"target": {"family": "digits", "seed": 3, "precision": "float64"}, "sampler": {"kind": "hmc"}},
    "quadratic": {"target": {"family": "quadratic", "dim": 4}, "sampler": {"kind": "mclmc", "seed": 1}},
    "dln": {
        "target": {"family": "dln", "widths": [10, 10, 10], "rank": 5},
        "posterior": {"nbeta": 1000, "localization": 0.5},
        "sampler": {"kind": "sgld", "preconditioner": "rmsprop", "step_size": 1e-7},
    },
}

# Change these only together with ALGORITHM_VERSION, or because a spec gained, lost or renamed a field: either way every
# stored result is computed again.
GOLDEN = {
    "mlp": ("tgt_5282921384a53e0a", "run_917dbd8dae2b705f"),
    "digits": ("tgt_9428ca06a75126df", "run_ed7eff1e7f684146"),
    "quadratic": ("tgt_6a98966b29f9a769", "run_e0e57d988d11c4a5"),
    "dln": ("tgt_8ae7c30198159f0a", "run_736d4a3af1075531"),
}


@pytest.mark.parametrize("name", RUNS)
def test_golden_ids(name):
    run = RunSpec.from_dict(RUNS[name])
    assert (run.target_id, run.run_id) == GOLDEN[name]


@pytest.mark.parametrize("value", ["a" * 10_000, list(range(10_000)), {"a": "b" * 10_000}, ("x" * 500, [1] * 500)])
def test_messages_cut_long_values(value):
    error = InvalidInput(f"A value must be short; got {value!r}. Shorten it.")
    assert len(str(error)) < 500
    assert str(error).startswith("A value must be short; got ")
    assert str(error).endswith("Shorten it.")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_messages_keep_what_is_short():
    message = (
        "A store's URI names a folder; got '/tmp/"
        + "a" * 100
        + "' and [1, 2, 3]: use a path like ./artifacts. "
        + (
            "Each sample's own loss, the samples' weights and whatever else is one's own are no quotations, however far apart. "
            * 3
        )
    )
    assert str(InvalidInput(message)) == message


def _changed(value):
    """A different valid value of the same kind, or None where there is no general one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.5
    return None


def _leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.mark.parametrize("name", RUNS)
def test_every_field_is_in_the_id(name):
    base = RunSpec.from_dict(RUNS[name])
    seen = {base.run_id}
    for path, value in _leaves(base.model_dump(mode="json")):
        fields = base.model_dump(mode="json")
        place = fields
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = _changed(value)
        if place[path[-1]] is None:
            continue
        try:
            run = RunSpec.from_dict(fields)
        except ValidationError:  # the changed value is out of range, e.g. rank above a width
            continue
        if run == base:  # a zero halved
            continue
        assert run.run_id not in seen, path
        assert (run.target_id != base.target_id) == (path[0] == "target"), path
        seen.add(run.run_id)
    assert len(seen) > 10


def test_precision_and_algorithm_version_are_in_the_id(monkeypatch):
    run = RunSpec.from_dict(RUNS["mlp"])
    other = RunSpec.from_dict({**RUNS["mlp"], "target": {"family": "mlp", "precision": "float64"}})
    assert other.target_id != run.target_id
    target_id, run_id = run.target_id, run.run_id
    monkeypatch.setattr(spec_module, "ALGORITHM_VERSION", spec_module.ALGORITHM_VERSION + 1)
    assert run.target_id != target_id
    assert run.run_id != run_id


def test_equal_numbers_have_equal_ids():
    fields = {**RUNS["dln"], "posterior": {"localization": 0.50, "nbeta": 1e3}}
    assert RunSpec.from_dict(fields) == RunSpec.from_dict(RUNS["dln"])
    assert RunSpec.from_dict(fields).run_id == RunSpec.from_dict(RUNS["dln"]).run_id
    assert canonical_json({"b": -0.0, "a": 1e-05}) == '{"a":1e-05,"b":0.0}'


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(json_values)
def test_canonical_json_round_trips(value):
    text = canonical_json(value)
    assert text.isascii()
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_key_order_does_not_matter(value):
    assert content_id("tgt", value) == content_id("tgt", dict(reversed(value.items())))


@pytest.mark.parametrize(
    "text", ["", "tgt_", "tgt_0123456789abcdeg", "../tgt_0123456789abcdef", "tgt_0123456789abcdef/..", "x"]
)
def test_check_id_refuses(text):
    with pytest.raises(InvalidInput, match="16 hexadecimal digits"):
        check_id(text)


def test_specs_are_frozen_and_strict():
    run = RunSpec.from_dict(RUNS["mlp"])
    with pytest.raises(ValidationError, match="frozen"):
        run.sampler.num_chains = 3
    for bad in ({"num_chains": "4"}, {"num_chains": True}, {"num_chains": 4.0}, {"num_chain": 4}, {"step_size": "1e-3"}):
        with pytest.raises(ValidationError):
            RunSpec.from_dict({**RUNS["mlp"], "sampler": {"kind": "sgld", **bad}})
    with pytest.raises(ValidationError, match="batch_size must be at most"):
        RunSpec.from_dict({"target": {"family": "quadratic", "data": {"n_data": 100}}, "sampler": {"kind": "sgld"}})
