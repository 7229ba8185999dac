"""The local tempered posterior around w*: exp(-nbeta L_n(w) - localization/2 |w - w*|^2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from pydantic import Field

from lambda_hat.spec import Spec
from lambda_hat.target import Dataset, Objective, Params


class PosteriorSpec(Spec):
    """Temperature and localisation."""

    nbeta: float | None = Field(None, gt=0, description="n times the inverse temperature; none = n / log n")
    localization: float = Field(1.0, ge=0, description="strength gamma of the pull towards w*")

    def resolve_nbeta(self, num_data: int) -> float:
        """nbeta, or the WBIC choice n / log n (Watanabe 2013)."""
        return num_data / math.log(num_data) if self.nbeta is None else self.nbeta


class Posterior(NamedTuple):
    """The posterior as functions of the flat position w, shape (d,).

    logdensity_fn: -nbeta (L_n(w) - L_n(w*)) - localization/2 |w - w*|^2, scalar.
    minibatch_difference_and_grad: (w, rng_key, batch_size) -> (L_B(w) - L_B(w*), grad L_B(w)) on a fresh batch of samples drawn
      with replacement. The difference is paired (both losses on the same samples), so it is unbiased for
      L_n(w) - L_n(w*) and far less noisy than L_B(w) - L_n(w*).
    """

    logdensity_fn: Callable[[jax.Array], jax.Array]
    minibatch_difference_and_grad: Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]
    position_star: jax.Array
    nbeta: jax.Array
    localization: jax.Array

    def loss_difference(self, position: jax.Array, logdensity: jax.Array) -> jax.Array:
        """L_n(w) - L_n(w*), recovered from the log density at w without another pass over the data."""
        pull = 0.5 * self.localization * jnp.sum(jnp.square(position - self.position_star))
        return -(logdensity + pull) / self.nbeta


def make_posterior(
    objective: Objective,
    params_star: Params,
    dataset: Dataset,
    star_losses: jax.Array,
    nbeta: jax.Array,
    localization: jax.Array,
) -> Posterior:
    """The posterior around `params_star`; `star_losses`, shape (n,), are the samples' losses there."""
    position_star, unravel = ravel_pytree(params_star)
    n = star_losses.shape[0]

    def difference(position: jax.Array, batch: Dataset, batch_star_losses: jax.Array) -> jax.Array:
        return jnp.mean(objective.per_sample_loss(unravel(position), batch) - batch_star_losses)

    def full_difference(position: jax.Array) -> jax.Array:
        if objective.loss is None:
            return difference(position, dataset, star_losses)
        return objective.loss(unravel(position), dataset) - objective.loss(params_star, dataset)

    def logdensity_fn(position: jax.Array) -> jax.Array:
        pull = 0.5 * localization * jnp.sum(jnp.square(position - position_star))
        return -nbeta * full_difference(position) - pull

    def minibatch(position: jax.Array, rng_key: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
        indices = jax.random.randint(rng_key, (batch_size,), 0, n)
        return jax.value_and_grad(difference)(position, dataset.take(indices), star_losses[indices])

    return Posterior(logdensity_fn, minibatch, position_star, nbeta, localization)
