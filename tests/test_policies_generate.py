"""Completions are drawn from the policy, with its own probabilities."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lambda_hat.policies.decoder import DecoderSpec, decoder
from lambda_hat.policies.generate import _generate, generate, sequences, token_statistics
from lambda_hat.policies.tasks import enumerate_completions
from lambda_hat.policies.tokenizer import EOS, PAD

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
    completions, own = enumerate_completions(VOCAB, LENGTH)
    number = len(completions)
    tokens, mask = sequences(np.tile(prompt, (number, 1)), np.full(number, length, np.int32), completions)
    log_probs, _ = STATISTICS(NETWORK.apply, params, tokens)
    return completions, own, np.exp(np.sum(np.where(mask, log_probs, 0), axis=1))


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
