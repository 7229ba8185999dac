"""Sequences and their statistics, on policies small enough to write out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from lambda_hat.entropy.sequences import Batch, all_token_stats, check_batch
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.objective import group_advantages, policy_loss, sequence_weights

VOCABULARY, END = 4, 0
#: Prompts of two lengths; completions have at most three tokens.
PROMPTS = [[1, 2], [1, 3, 2]]


def tiny_policy(dtype=np.float64, seed=0, width=6):
    """An embedding and one hidden layer over the last two tokens: (apply, params)."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": rng.normal(size=(VOCABULARY, 5)),
        "hidden": {"w": rng.normal(size=(10, width)) / 3, "b": rng.normal(size=width) / 3},
        "out": {"w": rng.normal(size=(width, VOCABULARY)), "b": rng.normal(size=VOCABULARY) / 3},
    }
    return tiny_apply, jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def tiny_apply(params, tokens_BT):
    embedded = jnp.asarray(params["embed"])[tokens_BT]
    before = jnp.pad(embedded, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    hidden = jnp.tanh(jnp.concatenate([before, embedded], axis=-1) @ params["hidden"]["w"] + params["hidden"]["b"][None, None])
    return hidden @ params["out"]["w"] + params["out"]["b"][None, None]


def batch_of(*rows, prompt_length=2):
    """Sequences as lists; their prompts are of one length."""
    width = max(map(len, rows))
    tokens = np.array([[*row, *[END] * (width - len(row))] for row in rows], np.int32)
    mask = np.array([[prompt_length <= t < len(row) for t in range(width)] for row in rows])
    return check_batch(Batch(tokens, mask))


@pytest.mark.parametrize("chunk_size", [2, 64])
def test_statistics_against_numpy(chunk_size):
    apply, params = tiny_policy()
    batch = batch_of([1, 2, 3, 0], [1, 3, 2, 2, 0], [1, 1, 0])
    found = all_token_stats(apply, params, batch, chunk_size)
    logits = np.asarray(apply(params, batch.tokens_BT))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found.logp_BT.shape == (3, 5)
    for b, t in np.ndindex(3, 5):
        inside = batch.mask_BT[b, t]
        q = p[b, t - 1]
        assert found.logp_BT[b, t] == pytest.approx(np.log(q[batch.tokens_BT[b, t]]) if inside else 0, rel=1e-12)
        assert found.entropies_BT[b, t] == pytest.approx(-np.sum(q * np.log(q)) if inside else 0, rel=1e-12)


def test_padding_changes_nothing():
    apply, params = tiny_policy()
    short, long = batch_of([1, 2, 3, 0]), batch_of([1, 2, 3, 0], [1, 2, 3, 3, 3, 3, 0])
    for one, other in zip(all_token_stats(apply, params, short, 1), all_token_stats(apply, params, long, 1), strict=True):
        np.testing.assert_allclose(one[0], other[0, :4], rtol=1e-14)
        assert not other[0, 4:].any()


def test_half_precision_logits_are_summed_in_single():
    apply, params = tiny_policy(np.float32)
    stats = all_token_stats(lambda *args: apply(*args).astype(jnp.bfloat16), params, batch_of([1, 2, 3, 0]), 1)
    assert stats.logp_BT.dtype == stats.entropies_BT.dtype == jnp.float32


def test_what_a_policy_holds_is_an_argument():
    """A base model's arrays are no constants of the program, and another base needs no other program."""
    apply, params = tiny_policy()
    batch = batch_of([1, 2, 3, 0])
    held = Partial(lambda base, delta, tokens: apply(jax.tree.map(jnp.add, base, delta), tokens), params)
    zero = jax.tree.map(np.zeros_like, params)
    np.testing.assert_allclose(all_token_stats(held, zero, batch).logp_BT, all_token_stats(apply, params, batch).logp_BT)


def test_advantages():
    rewards = np.array([[1.0, 0, 0, 0], [2, 2, 4, 4]])
    np.testing.assert_allclose(group_advantages(rewards), [[0.75, -0.25, -0.25, -0.25], [-1, -1, 1, 1]], rtol=1e-12)


def test_loss_is_the_definition():
    apply, params = tiny_policy()
    rows = [[1, 2, 3, 0], [1, 2, 0], [1, 3, 2, 2, 0], [1, 3, 1, 1, 1]]
    batch = batch_of(*rows)
    advantages = np.array([0.5, -0.5, 1.0, -1.0])
    weights = sequence_weights(advantages.reshape(2, 2), batch.mask_BT.sum(1).reshape(2, 2)).ravel()
    logp = all_token_stats(apply, params, batch).logp_BT
    prompts = [
        sum(-advantages[i] * logp[i].sum() for i in (0, 1)) / (2 * 2),
        sum(-advantages[i] * logp[i].sum() for i in (2, 3)) / (2 * 3),
    ]
    assert float(jax.jit(policy_loss, static_argnums=0)(apply, params, *batch, weights)) == pytest.approx(
        np.mean(prompts), rel=1e-12
    )


def test_wrong_batches_are_refused():
    tokens = np.ones((1, 4), np.int32)
    for mask in ([[1, 1, 0, 0]], [[0, 0, 0, 0]], [[0, 1, 0, 1]]):
        with pytest.raises(InvalidInput, match="one run"):
            check_batch(Batch(tokens, np.array(mask)))
    with pytest.raises(InvalidInput, match="one shape"):
        check_batch(Batch(tokens, np.ones((1, 3))))
