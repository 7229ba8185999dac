"""The gradient noise scale, against all per-sample gradients of a small network."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from test_curvature import diagonal, network

from lambda_hat.batch_size import noise_scale as module
from lambda_hat.batch_size.noise_scale import gradient_noise_scale
from lambda_hat.specs.spec import InvalidInput


@functools.partial(jax.jit, static_argnums=0)
def gradient(objective, params, batch):
    """Of the batch's mean loss, (d,)."""
    return ravel_pytree(jax.grad(lambda params: jnp.mean(objective.per_sample_loss(params, batch)))(params))[0]


def gradient_at(target, indices):
    return np.asarray(gradient(target.spec.objective(), target.params_star, target.dataset.take(np.asarray(indices))))


def exact(target):
    """tr(Sigma) and |G|^2 over the samples at hand."""
    gradients = np.stack([gradient_at(target, [index]) for index in range(target.dataset.num_data)])
    mean = np.mean(gradients, axis=0)
    return np.mean(np.sum(np.square(gradients - mean[None]), axis=1)), np.sum(np.square(mean))


@pytest.mark.parametrize("all_data", [False, True])
def test_estimates_are_within_their_errors(all_data):
    target = network()
    trace, squared = exact(target)
    runs = [gradient_noise_scale(target, jax.random.key(seed), 4, 8, 64, all_data) for seed in range(200)]
    # The parts are unbiased: means over the runs are within their own standard errors.
    for name, value in (("trace_covariance", trace), ("gradient_norm_squared", squared)):
        found = np.array([getattr(run, name) for run in runs])
        errors = np.array([getattr(run, f"{name}_error") for run in runs])
        if all_data and name == "gradient_norm_squared":
            np.testing.assert_allclose(found, value, rtol=1e-10)
            np.testing.assert_allclose(errors, 0, atol=1e-14)
            continue
        assert abs(found.mean() - value) < 3.5 * found.std() / 200**0.5
        assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(found.std(), rel=0.2)
    # Two standard errors cover 95 % of a normal estimate; a ratio is a little skewed. 200 runs: +- 1.7 %.
    covered = [abs(run.noise_scale - trace / squared) < 2 * run.error for run in runs]
    assert 0.89 < np.mean(covered) < 0.99


def test_one_estimate_against_the_definition():
    """The two sizes' formulas as the paper has them, on the very batches."""
    target = network()
    small, num_small, repeats = 4, 3, 5
    found = gradient_noise_scale(target, jax.random.key(3), small, num_small, repeats, all_data=False)
    squared, trace = [], []
    for key in jax.random.split(jax.random.key(3), repeats):
        batches = np.asarray(jax.random.randint(key, (num_small, small), 0, target.dataset.num_data))
        g_small = np.mean([np.sum(np.square(gradient_at(target, batch))) for batch in batches])
        g_big, big = np.sum(np.square(gradient_at(target, batches.reshape(-1)))), small * num_small
        squared.append((big * g_big - small * g_small) / (big - small))
        trace.append((g_small - g_big) / (1 / small - 1 / big))
    assert found.gradient_norm_squared == pytest.approx(np.mean(squared), rel=1e-10)
    assert found.trace_covariance == pytest.approx(np.mean(trace), rel=1e-10)
    assert found.noise_scale == pytest.approx(np.mean(trace) / np.mean(squared), rel=1e-10)


def test_float32_and_one_program():
    target = network("float32")
    trace, squared = exact(network())
    found = gradient_noise_scale(target, jax.random.key(0))
    assert abs(found.noise_scale - trace / squared) < 4 * found.error
    compiled = module._estimates._cache_size()
    gradient_noise_scale(target, jax.random.key(1))
    assert module._estimates._cache_size() == compiled


def test_no_gradient_above_the_noise_is_an_infinite_scale():
    still = gradient_noise_scale(diagonal([1.0, 2.0]), jax.random.key(0))
    assert still.noise_scale == np.inf
    assert np.isnan(still.error)


def test_what_cannot_be_measured_is_said():
    with pytest.raises(InvalidInput, match="num_small=1"):
        gradient_noise_scale(network(), jax.random.key(0), num_small=1)
    with pytest.raises(FloatingPointError, match="diverged"):
        gradient_noise_scale(diagonal([1.0, np.nan]), jax.random.key(0))
