"""The decoder computes what its equations say, whole or token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from lambda_hat.targets.policies.decoder import Cache, DecoderSpec, decoder, rotate

SPEC = DecoderSpec(width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=20)
VOCAB = 11
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(3, 7)).astype(np.int32)


def in_float64(spec, vocab=VOCAB, seed=0):
    """The decoder and parameters with scales and biases that differ from their initial values."""
    network = decoder(spec, vocab)
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape), network.init((0,), np.float64))
    return network, noisy


def by_numpy(spec, params, tokens):
    """Logits of one sequence, (T, V), head by head and position by position."""
    dim, group = spec.head_dim, spec.num_heads // spec.num_kv_heads

    def norm(name, x):
        return params[name]["scale"] * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + spec.norm_epsilon)

    def linear(name, x):
        return x @ params[name]["w"] + params[name].get("b", 0.0)

    def turned(vector, position):
        # Complex numbers of the coordinates i and i + D/2.
        z = vector[: dim // 2] + 1j * vector[dim // 2 :]
        z = z * np.exp(1j * position * spec.rope_base ** (-2 * np.arange(dim // 2) / dim))
        return np.concatenate([z.real, z.imag])

    x = params["embedding"]["embeddings"][tokens]
    for layer in range(spec.num_layers):
        h = norm(f"layer_{layer}/attention_norm", x)
        query, key, value = (linear(f"layer_{layer}/{name}", h) for name in ("query", "key", "value"))
        mixed = np.zeros_like(query)
        for head in range(spec.num_heads):
            own, shared = (slice(i * dim, (i + 1) * dim) for i in (head, head // group))
            for t in range(len(tokens)):
                keys = [turned(key[s, shared], s) for s in range(t + 1)]
                scores = np.exp([turned(query[t, own], t) @ k / np.sqrt(dim) for k in keys])
                mixed[t, own] = scores / scores.sum() @ value[: t + 1, shared]
        x = x + linear(f"layer_{layer}/output", mixed)
        h = norm(f"layer_{layer}/mlp_norm", x)
        gate = linear(f"layer_{layer}/gate", h)
        x = x + linear(f"layer_{layer}/down", gate / (1 + np.exp(-gate)) * linear(f"layer_{layer}/up", h))
    x = norm("norm", x)
    return x @ params["embedding"]["embeddings"].T if spec.tied_embeddings else linear("unembedding", x)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "tied_embeddings": True, "rope_base": 50.0}])
def test_logits_are_those_of_an_independent_implementation(changes):
    spec = SPEC.model_copy(update=changes)
    network, params = in_float64(spec)
    logits = jax.jit(network.apply)(params, TOKENS)
    np.testing.assert_allclose(logits, [by_numpy(spec, params, row) for row in TOKENS], rtol=1e-10, atol=1e-10)


def test_logits_do_not_depend_on_later_tokens():
    network, params = in_float64(SPEC)
    changed = TOKENS.copy()
    changed[:, 4:] = (changed[:, 4:] + 1) % VOCAB
    before, after = jax.jit(network.apply)(params, TOKENS), jax.jit(network.apply)(params, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(np.abs(before[:, 4:] - after[:, 4:]).max(-1) > 1e-3)


def test_steps_with_a_cache_give_the_logits_of_the_whole_sequence():
    network, params = in_float64(SPEC)
    step = jax.jit(network.step)
    whole = jax.jit(network.apply)(params, TOKENS)
    # Prompts of 3, 1 and 2 tokens, padded to 3 with what lies in TOKENS there, then one token at a time from each one's end.
    lengths = np.array([3, 1, 2], np.int32)
    first, cache = step(params, network.init_caches(3, 7, np.float64), TOKENS[:, :3], np.zeros(3, np.int32))
    np.testing.assert_allclose(first, whole[:, :3], rtol=1e-10, atol=1e-12)
    poison = np.where(np.arange(7) >= lengths[:, None, None, None], 1e3, 0.0)
    cache = tuple(Cache(layer.keys + poison, layer.values + poison.swapaxes(2, 3)) for layer in cache)
    for t in range(4):
        positions = lengths + t
        logits, cache = step(params, cache, TOKENS[np.arange(3), positions][:, None], positions)
        np.testing.assert_allclose(logits[:, 0], whole[np.arange(3), positions], rtol=1e-10, atol=1e-12)


def test_rotated_products_depend_on_the_distance_alone():
    q, k = np.random.default_rng(1).standard_normal((2, 1, 1, 1, 8))

    def product(s, t):
        at = [np.array([[position]], np.int32) for position in (s, t)]
        return float(jnp.sum(rotate(q, at[0], 100.0) * rotate(k, at[1], 100.0)))

    assert product(9, 4) == pytest.approx(product(5, 0), rel=1e-12)
    assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-3)
    assert product(3, 3) == pytest.approx(float(np.sum(q * k)), rel=1e-12)


def test_grouped_queries_are_attention_with_repeated_heads():
    network, params = in_float64(SPEC)
    repeated = {name: dict(leaves) for name, leaves in params.items()}
    for layer in range(SPEC.num_layers):
        for name in ("key", "value"):
            leaves = repeated[f"layer_{layer}/{name}"]
            heads = leaves["w"].reshape(16, SPEC.num_kv_heads, SPEC.head_dim)
            leaves["w"] = np.repeat(heads, 2, axis=1).reshape(16, 16)
    full = decoder(SPEC.model_copy(update={"num_kv_heads": 4}), VOCAB)
    logits = jax.jit(network.apply)(params, TOKENS)
    np.testing.assert_allclose(jax.jit(full.apply)(repeated, TOKENS), logits, rtol=1e-10, atol=1e-12)


def test_initial_parameters():
    network = decoder(SPEC.model_copy(update={"width": 64, "attention_bias": True}), 300)
    params, wide = network.init((1, 2), np.float32), network.init((1, 2), np.float64)
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(wide), strict=True):
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, other.astype(np.float32))
    assert np.all(params["norm"]["scale"] == 1)
    assert np.all(params["layer_0/query"]["b"] == 0)
    # Standard deviations 1/sqrt(in), of thousands of normals.
    assert np.std(params["embedding"]["embeddings"]) == pytest.approx(1 / 8, rel=0.03)
    assert np.std(params["layer_0/gate"]["w"]) == pytest.approx(1 / 8, rel=0.1)


def test_half_precision_is_near():
    network, params = in_float64(SPEC)
    low = jax.jit(network.apply)(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), TOKENS)
    assert low.dtype == jnp.bfloat16
    # bfloat16 has 8 bits of mantissa; logits are of order one.
    np.testing.assert_allclose(low.astype(np.float64), jax.jit(network.apply)(params, TOKENS), atol=0.15)


def test_no_sequences_have_no_logits():
    network, params = in_float64(SPEC)
    assert jax.eval_shape(network.apply, params, TOKENS[:0]).shape == (0, 7, VOCAB)


def test_heads_must_fit():
    with pytest.raises(ValidationError, match="even multiple of num_heads, 4"):
        DecoderSpec(width=20)
    with pytest.raises(ValidationError, match="multiple of num_kv_heads, 3"):
        DecoderSpec(num_kv_heads=3)
