"""Completions are drawn from the policy, with its own probabilities."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lambda_hat.entropy.exact import enumerate_completions
from lambda_hat.targets.policies.decoder import DecoderSpec, decoder
from lambda_hat.targets.policies.generate import _generate, generate, sequences, token_statistics
from lambda_hat.targets.policies.tokenizer import EOS, PAD

VOCAB, LENGTH = 5, 3
NETWORK = decoder(DecoderSpec(width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=8), VOCAB)
PROMPTS = np.array([[1, 3, 4], [1, 4, PAD], [1, 2, 3], [1, PAD, PAD]], np.int32)
LENGTHS = np.array([3, 2, 3, 1], np.int32)
STATISTICS = jax.jit(token_statistics, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    """Weights large enough that tokens differ in probability and depend on those before."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), NETWORK.init((0,), np.float64))


def keys(seed, number):
    return jax.random.split(jax.random.key(seed), number)


def exact(params, prompt, length):
    """Every completion and its probability, by the full forward pass."""
    tokens, mask = enumerate_completions([prompt[:length]], VOCAB, LENGTH, EOS).batch
    log_probs, _ = STATISTICS(NETWORK.apply, params, tokens)
    return tokens[:, length:], mask[:, length:], np.exp(np.sum(np.where(mask, log_probs, 0), axis=1))


NUMBER = 8000  # sequences of a batch; one size, so that one program serves


def draw(params, seed, rows, **how):
    """NUMBER sequences of the prompts `rows` in turn, and which prompt each has."""
    rows = np.resize(rows, NUMBER)
    return jax.tree.map(
        np.asarray, generate(NETWORK, params, keys(seed, NUMBER), PROMPTS[rows], LENGTHS[rows], LENGTH, **how)
    ), rows


@pytest.mark.parametrize("row", [0, 1])
def test_frequencies_are_the_exact_probabilities(params, row):
    completions, own, probabilities = exact(params, PROMPTS[row], LENGTHS[row])
    assert np.sum(probabilities) == pytest.approx(1, abs=1e-12)
    samples, _ = draw(params, 1, [row])
    drawn_mask = np.take_along_axis(samples.mask, LENGTHS[row] + np.arange(LENGTH)[None], axis=1)
    codes = np.where(drawn_mask, samples.completions, VOCAB) @ (VOCAB + 1) ** np.arange(LENGTH)
    known = np.where(own, completions, VOCAB) @ (VOCAB + 1) ** np.arange(LENGTH)
    counts = np.array([np.sum(codes == code) for code in known])
    assert np.sum(counts) == NUMBER
    errors = np.sqrt(NUMBER * probabilities * (1 - probabilities))
    frequent = NUMBER * probabilities > 20
    assert np.sum(frequent) > 10
    z = (counts - NUMBER * probabilities)[frequent] / errors[frequent]
    # Of some dozens of standard normals: none above 4, squares of mean one.
    assert np.max(np.abs(z)) < 4
    assert np.mean(z**2) == pytest.approx(1, abs=4 * np.sqrt(2 / np.sum(frequent)))


def test_probabilities_and_entropies_are_those_of_the_full_forward_pass(params):
    samples, _ = draw(params, 2, range(4))
    log_probs, entropies = STATISTICS(NETWORK.apply, params, samples.tokens)
    np.testing.assert_allclose(samples.log_probs, np.where(samples.mask, log_probs, 0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(samples.entropies, np.where(samples.mask, entropies, 0), rtol=1e-10, atol=1e-12)


def test_sequences_are_prompts_then_completions_up_to_the_end_token(params):
    samples, rows = draw(params, 3, range(4))
    ended = 0
    for row, tokens, mask, completion in list(zip(rows, samples.tokens, samples.mask, samples.completions, strict=True))[:100]:
        length = LENGTHS[row]
        np.testing.assert_array_equal(tokens[:length], PROMPTS[row, :length])
        np.testing.assert_array_equal(tokens[length : length + LENGTH], completion)
        size = list(completion).index(EOS) + 1 if EOS in completion else LENGTH
        ended += size < LENGTH
        np.testing.assert_array_equal(mask, (np.arange(len(tokens)) >= length) & (np.arange(len(tokens)) < length + size))
        assert np.all(tokens[length + size :] == PAD)
    assert ended > 5
    tokens, mask = sequences(PROMPTS[rows], LENGTHS[rows], samples.completions)
    np.testing.assert_array_equal(tokens, samples.tokens)
    np.testing.assert_array_equal(mask, samples.mask)


def test_any_token_may_end_a_completion(params):
    end = 4
    samples = generate(
        NETWORK, params, keys(6, NUMBER), PROMPTS[np.zeros(NUMBER, int)], np.full(NUMBER, 3, np.int32), LENGTH, end_token=end
    )
    default, _ = draw(params, 6, [0])
    for completion, other, mask in list(zip(samples.completions, default.completions, np.asarray(samples.mask), strict=True))[
        :200
    ]:
        size = list(completion).index(end) + 1 if end in completion else LENGTH
        np.testing.assert_array_equal(mask[3:], np.arange(LENGTH) < size)
        assert np.all(completion[size:] == PAD)
        # The same draws, but for where they stop.
        both = min(size, list(other).index(EOS) + 1 if EOS in other else LENGTH)
        np.testing.assert_array_equal(completion[:both], other[:both])
    assert {EOS, end} <= set(np.unique(samples.completions[:, 0]))
    # Several may, each of them.
    several = generate(
        NETWORK, params, keys(6, NUMBER), PROMPTS[np.zeros(NUMBER, int)], np.full(NUMBER, 3, np.int32), LENGTH,
        end_token=np.array([end, EOS], np.int32),
    )  # fmt: skip
    for completion, other in zip(np.asarray(several.completions), np.asarray(samples.completions), strict=True):
        size = min((list(other).index(token) + 1 for token in (end, EOS) if token in other), default=LENGTH)
        np.testing.assert_array_equal(completion, [*other[:size], *[PAD] * (LENGTH - size)])
    # The end token may be the one that pads.
    tokens, mask = sequences(
        np.array([[3, 4]], np.int32), np.array([2], np.int32), np.array([[3, PAD, PAD]], np.int32), end_token=PAD
    )
    assert mask.tolist() == [[False, False, True, True, False]]
    assert tokens.tolist() == [[3, 4, 3, PAD, PAD]]


def test_a_sequence_does_not_depend_on_its_batch_and_prompts_do_not_recompile(params):
    together, _ = draw(params, 4, range(4))
    compiled = _generate._cache_size()
    draw(params, 5, [2, 0], temperature=0.7)
    assert _generate._cache_size() == compiled
    order = np.array([7, 1, 4, 2])
    few = generate(NETWORK, params, keys(4, NUMBER)[order], PROMPTS[order % 4], LENGTHS[order % 4], LENGTH)
    np.testing.assert_array_equal(few.tokens, together.tokens[order])


def test_temperature_and_nucleus_restrict_the_draws(params):
    log_probs = jax.nn.log_softmax(jax.jit(NETWORK.apply)(params, PROMPTS[:1])[0, 2])
    sharper = np.exp(log_probs / 0.5) / np.sum(np.exp(log_probs / 0.5))
    samples, _ = draw(params, 5, [0], temperature=0.5)
    counts = np.bincount(samples.completions[:, 0], minlength=VOCAB)
    assert np.all(np.abs(counts - NUMBER * sharper) < 4 * np.sqrt(NUMBER * sharper * (1 - sharper)) + 1)
    # The recorded probability is the policy's own.
    np.testing.assert_allclose(samples.log_probs[:, 3], log_probs[samples.completions[:, 0]], rtol=1e-10)
    order = np.argsort(-log_probs)
    two = float(np.sum(np.exp(log_probs)[order[:2]]))
    samples, _ = draw(params, 5, [0], top_p=two - 1e-3)
    assert set(np.unique(samples.completions[:, 0])) == set(order[:2].tolist())
    samples, _ = draw(params, 5, [0], top_p=1e-9)
    assert set(np.unique(samples.completions[:, 0])) == {int(order[0])}
