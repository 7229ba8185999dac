"""The oracle itself: enumerated entropies against a walk through the tree of completions, and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from test_entropy_sequences import END, PROMPTS, VOCABULARY, tiny_policy

from lambda_hat.entropy.exact import completion_probabilities, enumerate_completions, exact_derivatives, exact_entropy
from lambda_hat.specs.spec import InvalidInput

ENUMERATION = enumerate_completions(PROMPTS, VOCABULARY, 3, END)


def direction_like(params, seed=1, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), params)


def moved(params, direction, eta):
    return jax.tree.map(lambda p, d: p + eta * d, params, direction)


def tree_entropy(params, tokens, depth):
    """H of what follows: H of the next token, and the mean of H after it; in numpy."""
    before, last = params["embed"][tokens[-2]], params["embed"][tokens[-1]]
    hidden = np.tanh(np.concatenate([before, last]) @ params["hidden"]["w"] + params["hidden"]["b"])
    logits = hidden @ params["out"]["w"] + params["out"]["b"]
    p = np.exp(logits) / np.exp(logits).sum()
    entropy = -np.sum(p * np.log(p))
    if depth > 1:
        entropy += sum(p[v] * tree_entropy(params, [*tokens, v], depth - 1) for v in range(VOCABULARY) if v != END)
    return entropy


def test_every_completion_once():
    tokens, mask = ENUMERATION.batch
    rows = {(int(i), *row[m]) for i, row, m in zip(ENUMERATION.prompt_ids, tokens, mask, strict=True)}
    # 1 + 3 ended ones, 9 prefixes times 4 last tokens.
    assert len(rows) == len(tokens) == 2 * (1 + 3 + 9 * 4)
    for row, m, prompt in zip(tokens, mask, ENUMERATION.prompt_ids, strict=True):
        start = len(PROMPTS[prompt])
        assert row[:start].tolist() == PROMPTS[prompt]
        completion = row[m]
        assert m[start]
        assert not m[:start].any()
        assert END not in completion[:-1]
        assert completion[-1] == END or len(completion) == 3


def test_probabilities_and_entropy():
    apply, params = tiny_policy()
    probabilities = completion_probabilities(apply, params, ENUMERATION, chunk_size=32)
    assert probabilities.sum() == pytest.approx(1, rel=1e-12)
    expected = np.mean([tree_entropy(params, prompt, 3) for prompt in PROMPTS])
    assert exact_entropy(apply, params, ENUMERATION, chunk_size=32) == pytest.approx(expected, rel=1e-12)
    surprisals = -np.log(2 * probabilities)
    assert np.sum(probabilities * surprisals) == pytest.approx(expected, rel=1e-12)


def test_derivatives_against_finite_differences():
    apply, params = tiny_policy()
    direction = direction_like(params)
    found = exact_derivatives(apply, params, direction, ENUMERATION)
    step = 1e-3
    h = [exact_entropy(apply, moved(params, direction, k * step), ENUMERATION) for k in (-2, -1, 0, 1, 2)]
    assert found.entropy == pytest.approx(h[2], rel=1e-12)
    assert found.first == pytest.approx((h[0] - 8 * h[1] + 8 * h[3] - h[4]) / (12 * step), rel=1e-8)
    assert found.second == pytest.approx((-h[0] + 16 * h[1] - 30 * h[2] + 16 * h[3] - h[4]) / (12 * step**2), rel=1e-5)


def test_single_precision_is_computed_in_double():
    apply, params = tiny_policy(np.float32)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    assert exact_entropy(apply, params, ENUMERATION) == exact_entropy(apply, wide, ENUMERATION)
    # What the policy holds is too.
    held = Partial(lambda base, delta, tokens: apply(jax.tree.map(jnp.add, base, delta), tokens), params)
    zero = jax.tree.map(np.zeros_like, params)
    assert exact_entropy(held, zero, ENUMERATION) == pytest.approx(exact_entropy(apply, wide, ENUMERATION), rel=1e-13)


def test_too_many_are_refused():
    with pytest.raises(InvalidInput, match="fewer prompts"):
        enumerate_completions(PROMPTS, 50, 6, END)
