"""Losses and gradients on all the data, in bounded memory, relative to w*."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lambda_hat.targets.selection import Selection, to_params
from lambda_hat.targets.target import Dataset, Objective, Params, chunk_size

#: Samples whose losses are computed at a time where all the data are used: bounds memory, and is plenty for speed.
CHUNK_SAMPLES = 4096


class Centre(NamedTuple):
    """What is computed once around w* and shared by all chains.

    scales: units of the offsets, a scalar for each tensor of params_star. losses: of the samples at w*, (n,).
    gradient: of L_n at w* with respect to u, (d,); () where control variates do not need it.
    """

    params_star: Params
    scales: list[jax.Array]
    dataset: Dataset
    losses: jax.Array
    gradient: jax.Array

    def params(self, position: jax.Array, selection: Selection) -> Params:
        """w at the offset u, (d,), of the selected parameters."""
        return to_params(position, self.params_star, self.scales, selection)


def reduce_chunks(function: Callable[[Dataset, jax.Array], Any], dataset: Dataset, losses: jax.Array, combine: Any) -> Any:
    """`function` of (samples, their losses at w*) on at most CHUNK_SAMPLES at a time, under `combine` of (the results of full
    chunks, the rest's): memory is bounded by a chunk's, in gradients too."""
    n = losses.shape[0]
    size = chunk_size(n, CHUNK_SAMPLES)
    if n == size:
        return function(dataset, losses)
    whole = n // size * size

    @jax.checkpoint
    def of_part(samples: Any, own_losses: jax.Array) -> Any:
        return function(Dataset(samples, dataset.constants), own_losses)

    def of_chunk(start: jax.Array) -> Any:
        # Sliced one by one: the data cut into chunks beforehand would be a copy of them.
        return of_part(*jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), (dataset.samples, losses)))

    results = jax.lax.map(of_chunk, jnp.arange(0, whole, size))
    if whole == n:
        return combine(results, None)
    return combine(results, of_part(*jax.tree.map(lambda x: x[whole:], (dataset.samples, losses))))


def per_sample_losses(objective: Objective, params: Params, dataset: Dataset) -> jax.Array:
    """The losses of all samples, (n,), in bounded memory."""
    none = jnp.zeros(dataset.num_data, jax.tree.leaves(params)[0].dtype)
    return reduce_chunks(
        lambda part, _: objective.per_sample_loss(params, part),
        dataset, none,
        lambda parts, rest: parts.reshape(-1) if rest is None else jnp.concatenate([parts.reshape(-1), rest]),
    )  # fmt: skip


compiled_losses = jax.jit(per_sample_losses, static_argnums=0)


def full_difference(objective: Objective, params: Params, centre: Centre) -> jax.Array:
    """L_n(w) - L_n(w*) on all the data, in bounded memory."""
    if objective.loss is not None:
        return objective.loss(params, centre.dataset) - objective.loss(centre.params_star, centre.dataset)
    total = reduce_chunks(
        lambda part, losses: jnp.sum(objective.per_sample_loss(params, part) - losses),
        centre.dataset, centre.losses,
        lambda parts, rest: jnp.sum(parts) + (0 if rest is None else rest),
    )  # fmt: skip
    return total / centre.losses.shape[0]


@functools.partial(jax.jit, static_argnums=0)
def params_gradient(objective: Objective, params: Params, centre: Centre) -> Params:
    """The gradient of L_n at `params`, which need not be those of `centre`, in bounded memory."""
    return jax.grad(lambda params: full_difference(objective, params, centre))(params)


def fewest_copies(try_with: Callable[[int], Any]) -> int:
    """Copies of a sample that are the smallest batch on which a loss works, where the loss of that sample alone is wanted: more
    than one if it drops axes of length one or cuts its batch into parts."""
    for copies in (1, 2, 4, 8, 16):
        with contextlib.suppress(Exception):  # whatever a user's code raises
            try_with(copies)
            return copies
    return 32


def euclidean_centre(objective: Objective, params_star: Params, dataset: Dataset) -> Centre:
    """What is computed around `params_star` in the euclidean metric, without the gradient."""
    losses = compiled_losses(objective, params_star, dataset)
    ones = [jnp.ones((), losses.dtype) for _ in jax.tree.leaves(params_star)]
    return Centre(params_star, ones, dataset, losses, jnp.zeros((), losses.dtype))
