"""One AdamW step taken apart, against Optax's own step."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_entropy_sequences import batch_of, tiny_policy

from lambda_hat.entropy.adamw import AdamW, adam_state, aggregate_gradient, precondition, sequence_gradients, take_apart
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.decoder import DecoderSpec, decoder
from lambda_hat.targets.policies.lora import LoraSpec, init_adapters
from lambda_hat.targets.policies.objective import policy_loss
from lambda_hat.targets.policies.policy import Policy

BATCH = batch_of([1, 2, 3, 0], [1, 2, 0], [1, 3, 2, 2, 0], [1, 3, 1, 1, 1], [1, 1, 2, 0])
WEIGHTS = np.array([0.3, -0.2, 0.5, -0.4, 0.25])
ETA = 3e-3

pytestmark = pytest.mark.usefixtures("library_promotion")


def worst(found, expected):
    """The largest difference over all tensors, relative to each tensor's largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(b)) for a, b in pairs)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def parts(apply, params, batch, weights, preconditioner):
    return precondition(preconditioner, sequence_gradients(apply, params, batch, weights))


def decays(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


@pytest.mark.parametrize(
    ("x64", "masked", "max_norm"), [(True, False, math.inf), (True, True, 0.05), (False, False, 0.05), (False, True, math.inf)]
)
def test_equals_optax(x64, masked, max_norm):
    with jax.enable_x64(x64):
        dtype, tolerance = (np.float64, 1e-12) if x64 else (np.float32, 5e-7)
        apply, params = tiny_policy(dtype)
        hyper = AdamW(0.9, 0.99, 1e-6, 0.1, max_norm)
        mask = decays(params) if masked else None
        adamw = optax.adamw(ETA, hyper.beta1, hyper.beta2, hyper.epsilon, weight_decay=hyper.weight_decay, mask=mask)
        optimizer = adamw if max_norm == math.inf else optax.chain(optax.clip_by_global_norm(max_norm), adamw)
        step = jax.jit(optimizer.update)
        state = jax.jit(optimizer.init)(params)
        for number in range(6):
            batch = batch_of(*(np.roll(row, number) for row in BATCH.tokens_BT))
            gradient = aggregate_gradient(apply, params, batch, WEIGHTS, chunk_size=2)
            found = take_apart(hyper, adam_state(state), params, gradient, mask)
            updates, state = step(gradient, state, params)
            assert worst(jax.tree.map(lambda v: ETA * np.asarray(v), found.full), updates) < tolerance
            assert (float(found.clip) < 1) == (max_norm < found.gradient_norm)
            each = flat(
                jax.tree.map(
                    lambda v: np.sum(v, axis=0), parts(apply, params, batch, WEIGHTS.astype(dtype), found.preconditioner)
                )
            )
            full = flat(found.full)
            assert np.linalg.norm(flat(found.baseline) + each - full) < (1e-13 if x64 else 1e-6) * np.linalg.norm(full)
            params = jax.tree.map(lambda p, u: p + np.asarray(u), params, updates)
        assert int(adam_state(state).count) == 6


def test_adapters_equal_optax():
    """Of a decoder with adapters: the step is theirs alone, and of it are the parts."""
    with jax.enable_x64(True):
        lora, network = LoraSpec(rank=2, matrices=("*/query", "*/down")), decoder(DecoderSpec(width=8, num_layers=1), 4)
        base = network.init((0,), np.float64)
        # B is not 0, as after an update, so that A has gradients.
        adapters = jax.tree.map(lambda leaf: leaf + 0.1, init_adapters(lora, base, (1,)))
        apply = Policy(network, base, lora, adapters).apply
        optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(ETA, 0.9, 0.99, 1e-6, weight_decay=0.1))
        state = jax.jit(optimizer.init)(adapters)
        for _ in range(2):
            gradient = aggregate_gradient(apply, adapters, BATCH, WEIGHTS)
            found = take_apart(AdamW(0.9, 0.99, 1e-6, 0.1, 0.01), adam_state(state), adapters, gradient)
            updates, state = jax.jit(optimizer.update)(gradient, state, adapters)
            assert jax.tree.structure(found.full) == jax.tree.structure(adapters)
            assert worst(jax.tree.map(lambda v: ETA * np.asarray(v), found.full), updates) < 1e-12
            assert float(found.clip) < 1
            each = parts(apply, adapters, BATCH, WEIGHTS, found.preconditioner)
            total = flat(found.baseline) + flat(jax.tree.map(lambda v: np.sum(v, axis=0), each))
            assert np.linalg.norm(total - flat(found.full)) < 1e-13 * np.linalg.norm(flat(found.full))
            adapters = jax.tree.map(lambda p, u: p + np.asarray(u), adapters, updates)


def test_gradients_add_up_in_any_chunks():
    apply, params = tiny_policy()
    each = parts(apply, params, BATCH, WEIGHTS, jax.tree.map(np.ones_like, params))
    whole = jax.tree.map(lambda leaf: np.sum(leaf, axis=0), each)
    for chunk_size in (2, 8):
        assert worst(aggregate_gradient(apply, params, BATCH, WEIGHTS, chunk_size), whole) < 1e-13
    # One gradient by itself is the definition's.
    alone = jax.jit(jax.grad(lambda params: policy_loss(apply, params, *(array[1:2] for array in BATCH), WEIGHTS[1:2])))
    assert worst(jax.tree.map(lambda leaf: leaf[1], each), alone(params)) < 1e-13


def test_no_gradient_is_all_baseline():
    apply, params = tiny_policy()
    optimizer = optax.adamw(ETA, weight_decay=0.1)
    gradient = aggregate_gradient(apply, params, BATCH, WEIGHTS)
    state = jax.jit(optimizer.update)(gradient, jax.jit(optimizer.init)(params), params)[1]
    found = take_apart(AdamW(0.9, 0.999, 1e-8, 0.1, 1.0), adam_state(state), params, jax.tree.map(np.zeros_like, params))
    assert float(found.clip) == 1.0
    assert worst(found.baseline, found.full) == 0


def test_another_optimizer_is_refused():
    with pytest.raises(InvalidInput, match="got 0"):
        adam_state(optax.sgd(0.1, 0.9).init({"w": jnp.ones(2)}))
