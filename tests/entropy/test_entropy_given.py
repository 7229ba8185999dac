"""What a user gives to the entropy wing is refused where it would end in a wrong number, or is right: a row for each kind."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from test_entropy_sequences import batch_of, tiny_policy

from lambda_hat.entropy.adamw import AdamW, aggregate_gradient, take_apart
from lambda_hat.entropy.attribution import Training, attribution_matrix, entropy_changes, gradient_norms
from lambda_hat.entropy.estimators import evaluate, orders
from lambda_hat.entropy.sequences import Batch, all_token_stats, check_batch
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.decoder import DecoderSpec, decoder
from lambda_hat.targets.policies.lora import LoraSpec, init_adapters, merge
from lambda_hat.targets.policies.policy import Policy

APPLY, PARAMS = tiny_policy()
BATCH = batch_of([1, 2, 3, 0], [1, 2, 0], [1, 3, 2, 2, 0], [1, 3, 1, 1, 1], [1, 1, 2, 0])
WEIGHTS = np.array([0.3, -0.2, 0.5, -0.4, 0.25])
HYPER = AdamW(0.9, 0.999, 1e-8, 0.1)
MOMENTS = jax.tree.map(lambda leaf: 0.1 * np.square(leaf), PARAMS)
STATE = optax.ScaleByAdamState(np.int32(3), MOMENTS, MOMENTS)
ZEROS = np.zeros(BATCH.tokens_BT.shape)
PAIR = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), PARAMS)


def training(batch=BATCH, weights=WEIGHTS):
    return Training(batch, weights, take_apart(HYPER, STATE, PARAMS, MOMENTS))


def replaced(array, index, value):
    changed = np.array(array)
    changed[index] = value
    return changed


def with_hidden(tree, change):
    """The tree with its tensor hidden/w changed."""
    return tree | {"hidden": tree["hidden"] | {"w": change(tree["hidden"]["w"])}}


#: Everything that takes sequences, as a function of them.
ENTRANCES = {
    "all_token_stats": lambda batch: all_token_stats(APPLY, PARAMS, batch),
    "aggregate_gradient": lambda batch: aggregate_gradient(APPLY, PARAMS, batch, WEIGHTS),
    "evaluate": lambda batch: evaluate(APPLY, PARAMS, PAIR, np.ones(2), batch),
    "orders": lambda batch: orders(APPLY, PARAMS, PAIR, batch, ZEROS),
    "gradient_norms": lambda batch: gradient_norms(APPLY, PARAMS, training(batch)),
    "attribution_matrix, training": lambda batch: attribution_matrix(APPLY, PARAMS, training(batch), BATCH, ZEROS),
    "attribution_matrix, evaluation": lambda batch: attribution_matrix(APPLY, PARAMS, training(), batch, ZEROS),
    "entropy_changes, training": lambda batch: entropy_changes(APPLY, PARAMS, training(batch), BATCH, 0.1),
    "entropy_changes, evaluation": lambda batch: entropy_changes(APPLY, PARAMS, training(), batch, 0.1),
}
LEFT = Batch(
    np.array([[9, 9, 1, 2, 3, 0], [9, 1, 3, 2, 2, 0], [1, 3, 1, 1, 1, 0], [1, 2, 3, 1, 1, 0], [9, 9, 1, 1, 2, 0]]),
    np.tile(np.arange(6) >= 4, (5, 1)),
)


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (BATCH._replace(tokens_BT=replaced(BATCH.tokens_BT, (3, 4), 4)), "from 0 to 3, .* got 4 in sequence 3 at 4"),
        (BATCH._replace(tokens_BT=replaced(BATCH.tokens_BT, (0, 0), -100)), "got -100 in sequence 0 at 0"),
        (BATCH._replace(tokens_BT=BATCH.tokens_BT + 0.5), "whole numbers, .* of float64"),
        (LEFT, "padded on the right; some begin with up to 2 tokens 9 .* check_batch with attention_BT"),
    ],
)
def test_sequences(entrance, batch, message):
    with pytest.raises(InvalidInput, match=message):
        ENTRANCES[entrance](batch)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WEIGHTS[:4], r"weights must hold a number for each sequence, \(5,\); got \(4,\)"),
        (np.append(WEIGHTS, 0.1), r"got \(6,\)"),
        (WEIGHTS[None], r"got \(1, 5\)"),
        (replaced(WEIGHTS, 2, np.nan), "weights must be finite; got 1 of 5"),
    ],
)
def test_weights(weights, message):
    for call in (
        lambda: aggregate_gradient(APPLY, PARAMS, BATCH, weights),
        lambda: gradient_norms(APPLY, PARAMS, training(weights=weights)),
        lambda: attribution_matrix(APPLY, PARAMS, training(weights=weights), BATCH, ZEROS),
        lambda: entropy_changes(APPLY, PARAMS, training(weights=weights), BATCH, 0.1),
    ):
        with pytest.raises(InvalidInput, match=message):
            call()


def test_baselines_and_probabilities():
    with pytest.raises(InvalidInput, match=r"baselines_BT must hold a number for each token, \(5, 5\); got \(5, 4\)"):
        orders(APPLY, PARAMS, PAIR, BATCH, ZEROS[:, 1:])
    with pytest.raises(InvalidInput, match=r"weights_B must hold .* got \(3,\)"):
        orders(APPLY, PARAMS, PAIR, BATCH, ZEROS, weights_B=np.ones(3))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"mu": with_hidden(MOMENTS, lambda w: w[:, :4])}, r"mu .* for 'hidden/w' shape \(10, 6\); got shape \(10, 4\)"),
        ({"nu": {name: leaf for name, leaf in MOMENTS.items() if name != "out"}}, "nu .* for 'out/b' .* got no such tensor"),
        ({"mu": MOMENTS | {"more": np.ones(2)}}, r"mu .* for 'more' no such tensor; got shape \(2,\)"),
        ({"nu": with_hidden(MOMENTS, lambda w: replaced(w, (0, 1), np.nan))}, "nu, hidden/w, must be finite; got 1 of 60"),
        ({"mu": with_hidden(MOMENTS, lambda w: w * np.inf)}, "mu, hidden/w, must be finite; got 60 of 60"),
        ({"nu": with_hidden(MOMENTS, lambda w: -w)}, "nu are means of squares, at least 0; .* in 'hidden/w'"),
    ],
)
def test_moments(state, message):
    with pytest.raises(InvalidInput, match=message):
        take_apart(HYPER, STATE._replace(**state), PARAMS, MOMENTS)


def test_tensors_that_are_not_finite():
    broken = with_hidden(PARAMS, lambda w: replaced(w, (2, 3), np.nan))
    for call in (
        lambda: all_token_stats(APPLY, broken, BATCH),
        lambda: aggregate_gradient(APPLY, broken, BATCH, WEIGHTS),
        lambda: take_apart(HYPER, STATE, broken, MOMENTS),
    ):
        with pytest.raises(InvalidInput, match="params, hidden/w, must be finite; got 1 of 60"):
            call()
    with pytest.raises(InvalidInput, match="The gradient, hidden/w, must be finite"):
        take_apart(HYPER, STATE, PARAMS, broken)
    other = Training(BATCH, WEIGHTS, training().update._replace(preconditioner={"w": np.ones(3)}))
    with pytest.raises(InvalidInput, match="The update must have the parameters' tensors"):
        gradient_norms(APPLY, PARAMS, other)


def test_sequences_padded_on_the_left_are_right_with_their_attention():
    own = LEFT._replace(tokens_BT=np.where(LEFT.tokens_BT == 9, 0, LEFT.tokens_BT))
    found = check_batch(own, LEFT.tokens_BT != 9)
    assert found.tokens_BT[0].tolist()[:4] == [1, 2, 3, 0]
    rows = [[token for token in row if token != 9] for row in LEFT.tokens_BT.tolist()]
    for row, tokens, mask in zip(rows, *found, strict=True):
        alone = all_token_stats(APPLY, PARAMS, Batch(np.array([row]), np.arange(len(row))[None] >= len(row) - 2))
        together = all_token_stats(APPLY, PARAMS, Batch(tokens[None], mask[None]))
        np.testing.assert_allclose(together.logp_BT[:, : len(row)], alone.logp_BT, rtol=1e-12)
    for attention, message in ((np.eye(6)[:5], "one run with its completion"), (np.ones((5, 5)), "one shape")):
        with pytest.raises(InvalidInput, match=message):
            check_batch(own, attention)


def test_prompts_that_begin_alike_are_no_padding():
    for rows in ([[2, 2, 1, 0], [2, 1, 2, 0]], [[2, 2, 1, 0], [3, 3, 1, 0], [2, 3, 1, 0]], [[1, 2, 2, 0], [1, 2, 3, 0]]):
        batch_of(*rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own | {"unembedding": {"a": np.ones((8, 3)), "b": np.ones((3, 7))}}, "rank=2; got a, .8, 3., b, .3, 7."),
        (lambda own: own | {"layer_0/down": own["unembedding"]}, r"'layer_0/down' must be a, \(16, 2\), and b, \(2, 8\)"),
        (lambda own: own | {"layer_7/query": own["unembedding"]}, "got some of 'layer_7/query', which has none"),
    ],
)
def test_adapters(change, message):
    network = decoder(DecoderSpec(width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=16), 7)
    base = network.init((0,), np.float32)
    spec = LoraSpec(rank=2, matrices=("unembedding",))
    adapters = change(init_adapters(spec, base, (0,)))
    for call in (
        lambda: Policy(network, base, spec, adapters).full,
        lambda: all_token_stats(Policy(network, base, spec, adapters).apply, adapters, batch_of([1, 2, 3, 0])),
        lambda: merge(spec, base, adapters),
    ):
        with pytest.raises(InvalidInput, match=message):
            call()
