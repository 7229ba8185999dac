"""Adapters change the network as the merged weights would, and they alone have gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.decoder import DecoderSpec, decoder
from lambda_hat.targets.policies.generate import generate, token_statistics
from lambda_hat.targets.policies.lora import LoraSpec, init_adapters, merge
from lambda_hat.targets.policies.policy import Policy

NETWORK = decoder(DecoderSpec(width=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=16), 7)
SPEC = LoraSpec(rank=2, alpha=3.0, matrices=("layer_1/query", "*/down", "unembedding"))
TOKENS = np.random.default_rng(0).integers(7, size=(2, 5)).astype(np.int32)


#: A policy's function is an argument, with all arrays that it holds.
call = jax.jit(lambda apply, params, tokens: apply(params, tokens))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape) / 3, NETWORK.init((0,), np.float64))


def test_new_adapters_change_nothing(params):
    adapters = init_adapters(SPEC, params, (0,))
    assert set(adapters) == {"layer_1/query", "layer_0/down", "layer_1/down", "unembedding"}
    assert {name: leaf.shape for name, leaf in adapters["unembedding"].items()} == {"a": (16, 2), "b": (2, 7)}
    apply = Policy(NETWORK, params, SPEC, adapters).apply
    np.testing.assert_array_equal(call(apply, adapters, TOKENS), jax.jit(NETWORK.apply)(params, TOKENS))


def test_the_adapted_network_is_the_merged_one(params):
    rng = np.random.default_rng(2)
    adapters = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), init_adapters(SPEC, params, (0,)))
    merged = merge(SPEC, params, adapters)
    np.testing.assert_allclose(
        merged["unembedding"]["w"],
        params["unembedding"]["w"] + 1.5 * adapters["unembedding"]["a"] @ adapters["unembedding"]["b"],
        rtol=1e-12,
    )
    policy = Policy(NETWORK, params, SPEC, adapters)
    logits = call(policy.apply, adapters, TOKENS)
    np.testing.assert_allclose(logits, jax.jit(NETWORK.apply)(merged, TOKENS), rtol=1e-9, atol=1e-10)
    assert np.max(np.abs(logits - jax.jit(NETWORK.apply)(params, TOKENS))) > 0.1
    samples = generate(NETWORK, policy.full, jax.random.split(jax.random.key(0), 2), TOKENS, np.array([5, 3], np.int32), 3)
    log_probs, _ = jax.jit(token_statistics, static_argnums=0)(NETWORK.apply, merged, samples.tokens)
    np.testing.assert_allclose(samples.log_probs, np.where(samples.mask, log_probs, 0), rtol=1e-9, atol=1e-10)


def test_the_frozen_network_is_no_constant_of_the_program(params):
    adapters = init_adapters(SPEC, params, (0,))
    apply = Policy(NETWORK, params, SPEC, adapters).apply
    assert isinstance(apply, Partial)
    assert not jax.make_jaxpr(call)(apply, adapters, TOKENS).consts
    compiled = call._cache_size()
    other = jax.tree.map(lambda leaf: 2 * leaf, params)
    call(apply, adapters, TOKENS)
    call(Policy(NETWORK, other, SPEC, adapters).apply, adapters, TOKENS)
    assert call._cache_size() == max(compiled, 1)


def test_only_adapters_have_gradients(params):
    adapters = init_adapters(SPEC, params, (0,))
    policy = Policy(NETWORK, params, SPEC, adapters)

    def loss(apply):
        return lambda params: jnp.mean(jnp.square(apply(params, TOKENS)))

    gradient = jax.jit(jax.grad(loss(policy.apply)))(adapters)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapters)
    # By the chain rule, with B = 0: dL/dA = 0 and dL/dB = scale A^T dL/dW.
    of_weights = jax.jit(jax.grad(loss(NETWORK.apply)))(params)
    for module, leaves in gradient.items():
        np.testing.assert_array_equal(leaves["a"], 0)
        np.testing.assert_allclose(leaves["b"], 1.5 * adapters[module]["a"].T @ of_weights[module]["w"], rtol=1e-9, atol=1e-12)


def test_matrices_must_exist(params):
    with pytest.raises(InvalidInput, match=r"got 'layer_9/query', and there are layer_0/down, "):
        init_adapters(LoraSpec(matrices=("layer_9/query",)), params, (0,))
