"""What is found out about a user's loss before anything is sampled: that it can be sampled, and how it rises from w*."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.specs.text import listed
from lambda_hat.targets import full_data
from lambda_hat.targets.full_data import compiled_losses, euclidean_centre, params_gradient
from lambda_hat.targets.target import Dataset, Objective, chunk_size
from lambda_hat.targets.user_arrays import WEIGHT

Star = dict[str, np.ndarray]

#: Random batches in which the losses of samples are compared with those in other batches, and the samples of each.
NUM_BATCHES, BATCH = 16, 32
#: How far the two may differ, relative to the spread of the losses: what a network in float32 makes of other shapes. A network
#: that computes in 16 bits rounds relative to the losses themselves.
RELATIVE, RELATIVE_16_BIT = 1e-3, 3e-2
#: And relative to the losses themselves, a hundred roundings of float32.
ROUNDINGS = 100 * float(np.finfo(np.float32).eps)
#: And in nats, where only w* itself can be looked at, whose losses may be all rounding.
ABSOLUTE = 1e-4
#: By how much the parameters are moved for it, relative to each tensor's size: at w* itself many a loss is nearly zero.
MOVE = 0.1
#: Random directions along which the degree of the loss is measured.
NUM_DIRECTIONS = 3


def check_losses(losses: np.ndarray, alone: bool) -> None:
    """Raises InvalidInput unless all are finite; alone: whether each is of a batch of one, since the loss is a mean."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if alone and len(bad) == len(losses):
        raise InvalidInput(
            f"A scalar loss is taken of each sample alone, where it must be a number; got {losses[0]} for all {len(losses)}. "
            "A variance or a ranking needs several samples: return the losses of the samples, (B,), each of its own sample."
        )
    if len(bad):
        raise InvalidInput(
            f"loss_fn must be finite at params; got {losses[bad[0]]} for {len(bad)} of {len(losses)} samples, first for sample "
            f"{bad[0]}. Look at that sample, or train with a lower learning rate."
        )


def check_gradient(objective: Objective, star: Star, dataset: Dataset) -> None:
    """Raises InvalidInput unless the gradient of L_n at w* is finite: no sampler leaves a point where it is not."""
    gradient = params_gradient(objective, star, euclidean_centre(objective, star, dataset))
    bad = [name for name, array in gradient.items() if not np.isfinite(array).all()]
    if not any(array.any() for array in gradient.values()):
        rng = np.random.default_rng(0)
        moved = {name: _moved(array, rng) for name, array in star.items()}
        nearby = params_gradient(objective, moved, euclidean_centre(objective, moved, dataset))
        if not any(array.any() for array in nearby.values()):
            raise InvalidInput(
                "The loss must depend on params; its gradient is 0 in all of them, at params and near them. Let loss_fn use "
                "the params that it is given."
            )
    if bad:
        raise InvalidInput(
            f"The gradient of the loss at params must be finite; got NaN or infinity in {listed(bad)}. A norm, a square root "
            "or a logarithm has none at zero, as at an exact fit: square it, or add a small number inside it."
        )


def check_independence(
    objective: Objective, together: Callable[[Any, Dataset], Any] | None, star: Star, dataset: Dataset, in_16_bit: bool
) -> None:
    """Checks that a sample has a loss of its own, whatever batch it is in, on batches drawn from all over the data.

    Args:
      together: the loss as the user wrote it, if it returns the mean of a batch; then that must be the mean, weighted by the
        samples' weights, of the losses that `objective` finds of each sample alone: in these batches and in all the data.

    Raises:
      InvalidInput: it is not so.
    """
    rng = np.random.default_rng(0)
    point = {name: _moved(array, rng) for name, array in star.items()}
    losses, allowed = np.asarray(compiled_losses(objective, point, dataset), np.float64), 0.0
    if not np.isfinite(losses).all():
        point, allowed = star, ABSOLUTE
        losses = np.asarray(compiled_losses(objective, star, dataset), np.float64)
    size_of_loss = float(np.mean(np.abs(losses)))
    allowed += ROUNDINGS * size_of_loss + RELATIVE * float(np.mean(np.abs(losses - np.median(losses))))
    if in_16_bit:
        allowed += RELATIVE_16_BIT * size_of_loss
    n = len(losses)
    size = min(BATCH, n // 2)
    if n < 4 and not _bears(together or objective.per_sample_loss, point, dataset, size):
        size = n
    batches = rng.permutation(n)[: min(NUM_BATCHES, n // size) * size].reshape(-1, size)
    if together is None:
        other = np.asarray(_of_batches(objective.per_sample_loss, point, dataset, batches), np.float64)
        _refuse_beyond(
            allowed, other, losses[batches],
            f"A sample's loss must not depend on the rest of its batch; got {{}} in a batch of {size} and {{}} in one of {n}. "
            "Evaluate the network as it is used: no dropout, batch normalisation by its running averages. Do not divide by a "
            "sum over the batch: return each sample's own loss, and give what the samples count as weights.",
        )  # fmt: skip
        return
    weights = np.asarray(dataset.samples.get(WEIGHT, np.ones(n)), np.float64)
    whole = chunk_size(n, full_data.CHUNK_SAMPLES)
    for parts in (batches, np.arange(n // whole * whole).reshape(-1, whole)):
        parts = parts[weights[parts].sum(axis=1) > 0]
        _refuse_beyond(
            allowed,
            np.asarray(_of_batches(together, point, dataset, parts), np.float64),
            losses[parts].sum(axis=1) / weights[parts].sum(axis=1),
            f"A scalar loss must be the mean over its batch of the samples' own losses; got {{}} for a batch of "
            f"{parts.shape[1]} and {{}} as the mean of its samples one at a time. Take the mean of the losses, without "
            "dropout or batch statistics. If samples count differently (rows of different numbers of tokens, class weights), "
            "give what they count as weights, and the loss may be the mean that is weighted so.",
        )


def _bears(function: Callable[[Any, Dataset], Any], params: Any, dataset: Dataset, size: int) -> bool:
    """Whether a batch may be so small."""
    try:
        jax.eval_shape(lambda params: function(params, dataset.take(np.arange(size))), params)
    except Exception:  # whatever a user's code raises
        return False
    return True


def _moved(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size = math.sqrt(float(np.mean(np.square(array, dtype=np.float64)))) or 1.0
    return array + (MOVE * size * rng.standard_normal(array.shape)).astype(array.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _of_batches(function: Callable[[Any, Dataset], Any], params: Any, dataset: Dataset, batches: jax.Array) -> jax.Array:
    """function(params, batch) of each row of indices."""
    return jax.lax.map(lambda indices: jnp.asarray(function(params, dataset.take(indices))), batches)


def _refuse_beyond(allowed: float, found: np.ndarray, expected: np.ndarray, message: str) -> None:
    off = np.abs(found - expected)
    worst = np.unravel_index(np.argmax(off), off.shape)
    if not off[worst] <= allowed:
        raise InvalidInput(message.format(f"{found[worst]:.4g}", f"{expected[worst]:.4g}"))


def loss_degree(objective: Objective, star: Star, dataset: Dataset, losses: np.ndarray) -> float:
    """The degree k with which L_n rises from w*, L_n(w* + a v) - L_n(w*) ~ a^k, at the size it has under the posterior.

    At most 2, which a smooth loss has where it is not degenerate; 1 of absolute errors and norms at an exact fit. A loss of
    degree k has an llc of at most d/k. Measured along random directions and their opposites, at an amplitude a where the loss
    rises by about 1/nbeta, and at half of it; 2 where it does not rise.

    Args:
      losses: of the samples at w*, (n,).
    """
    n = len(losses)
    if n > full_data.CHUNK_SAMPLES:
        dataset = dataset.spread(full_data.CHUNK_SAMPLES)
        losses = np.asarray(compiled_losses(objective, star, dataset))
    rng = np.random.default_rng(1)
    directions = [{name: _moved(array, rng) - array for name, array in star.items()} for _ in range(NUM_DIRECTIONS)]

    def rise(amplitude: float) -> float:
        points = [
            {name: array + (side * v[name]).astype(array.dtype) for name, array in star.items()}
            for v in directions for side in (amplitude, -amplitude)
        ]  # fmt: skip
        rises = [np.asarray(compiled_losses(objective, point, dataset)) - losses for point in points]
        return float(np.mean(rises, dtype=np.float64))

    amplitude, enough = 1 / MOVE, math.log(n) / n
    while not (rises := rise(amplitude)) <= enough and amplitude > np.finfo(losses.dtype).eps:
        amplitude /= 4
    less = rise(amplitude / 2)
    return min(2.0, math.log2(rises / less)) if rises > less > 0 else 2.0
