"""The gradient noise scale: how many samples it takes until a minibatch's gradient is more signal than noise."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lambda_hat.batch_size.curvature import mean_loss
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.target import Dataset, Objective, Params, Target


class NoiseScale(NamedTuple):
    """B_simple = tr(Sigma) / |G|^2 in samples, its two parts, and their standard errors.

    G is the gradient of L_n, Sigma the covariance of single samples' gradients over the n samples. Where no gradient is seen
    above the noise, |G|^2 is not positive and the noise scale is infinite, its error NaN.

    Along gradient flow it grows as the loss falls. Of a network that SGD has trained at eta and B, G is also the gradient of
    the displacement by its own noise, so that it grows up to about 2 B / (eta h) only, h = tr(H Sigma) / tr(Sigma), and falls
    where sharpness rises (docs/batch-size.md).
    """

    noise_scale: float
    error: float
    gradient_norm_squared: float
    gradient_norm_squared_error: float
    trace_covariance: float
    trace_covariance_error: float


def gradient_noise_scale(
    target: Target,
    key: jax.Array,
    small_batch: int = 32,
    num_small: int = 32,
    num_repeats: int = 32,
    all_data: bool = True,
) -> NoiseScale:
    """B_simple at w* by the unbiased estimate from small and big batches (McCandlish et al. 2018, arXiv 1812.06162, A.1).

    With E|G_B|^2 = |G|^2 + tr(Sigma) / B for a batch of B, sizes b and B give
      |G|^2 = (B |G_B|^2 - b |G_b|^2) / (B - b),   tr(Sigma) = (|G_b|^2 - |G_B|^2) / (1/b - 1/B),
    each averaged over all batches before the ratio is taken. A big batch is the `num_small` small ones together. Samples are
    drawn with replacement, so that both are unbiased for the n samples at hand, with no correction for a finite population.
    Where |G|^2 is below about tr(Sigma) / (B sqrt(num_repeats)), as it is at the end of training, its estimate is all noise.

    With all the data as the big batch that noise is gone, for one pass over them: G is exact, and
      tr(Sigma) = b |G_b - G|^2.

    Args:
      small_batch: b. num_small: B / b, at least 2. num_repeats: big batches, at least 2; the error is the jackknife's over
        them. all_data: whether G is that of all the data, instead of a big batch's.

    Raises:
      InvalidInput: one of the numbers is out of range. FloatingPointError: a gradient is not finite.
    """
    if small_batch < 1 or num_small < 2 or num_repeats < 2:
        raise InvalidInput(
            "A noise scale takes small batches of at least 1 sample, at least 2 of them in a big one, and at least 2 big ones; "
            f"got small_batch={small_batch}, num_small={num_small}, num_repeats={num_repeats}. Raise them."
        )
    with jax.enable_x64(target.spec.precision == "float64"), jax.default_matmul_precision("highest"):
        params, dataset = jax.device_put((target.params_star, target.dataset))
        shape = (num_small, small_batch)
        keys = jax.random.split(key, num_repeats)
        parts = _estimates(target.spec.objective(), shape, all_data, params, dataset, keys)
        squared, trace = (np.asarray(values, np.float64) for values in parts)
    if not np.isfinite(squared + trace).all():
        raise FloatingPointError(
            f"A noise scale is of finite gradients; those of {target.target_id} are not. Leave out trials that diverged."
        )
    errors = [float(np.std(values, ddof=1)) / math.sqrt(num_repeats) for values in (squared, trace)]
    ratio, error = _ratio(trace, squared)
    return NoiseScale(ratio, error, float(squared.mean()), errors[0], float(trace.mean()), errors[1])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _estimates(
    objective: Objective, shape: tuple[int, int], all_data: bool, params: Params, dataset: Dataset, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """|G|^2 and tr(Sigma) from one big batch for each key, (keys,)."""
    num_small, small_batch = shape
    flat, unravel = ravel_pytree(params)

    def loss(flat: jax.Array, batch: Dataset) -> jax.Array:
        return jnp.mean(objective.per_sample_loss(unravel(flat), batch))

    whole = jax.grad(lambda flat: mean_loss(objective, unravel(flat), dataset))(flat) if all_data else None

    def of_big_batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        indices = jax.random.randint(key, shape, 0, dataset.num_data)
        gradients = jax.vmap(lambda own: jax.grad(loss)(flat, dataset.take(own)))(indices)
        if whole is not None:
            return jnp.sum(jnp.square(whole)), small_batch * jnp.sum(jnp.square(gradients - whole[None])) / num_small
        big = jnp.mean(gradients, axis=0)
        # The same as (|G_b|^2 - |G_B|^2) / (1/b - 1/B), without the difference of two numbers that may be nearly equal.
        trace = small_batch * jnp.sum(jnp.square(gradients - big[None])) / (num_small - 1)
        return jnp.sum(jnp.square(big)) - trace / (num_small * small_batch), trace

    return jax.lax.map(of_big_batch, keys)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """The ratio of the means and its jackknife standard error; infinite, and NaN, if the denominator's mean is not positive."""
    count = len(numerator)
    above, below = float(numerator.sum()), float(denominator.sum())
    if below <= 0:
        return math.inf, math.nan
    without = (above - numerator) / (below - denominator)
    return above / below, math.sqrt((count - 1) / count * float(np.sum(np.square(without - without.mean()))))
