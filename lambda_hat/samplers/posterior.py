"""The local tempered posterior around w*: exp(-nbeta L_n(w) - localization/2 |u|^2) of the offset u from w*."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.samplers.metric import Metric, relative_scales, usual_nbeta
from lambda_hat.specs.spec import Spec
from lambda_hat.targets.full_data import Centre, euclidean_centre, full_difference, params_gradient
from lambda_hat.targets.selection import Selection, index_of
from lambda_hat.targets.target import Dataset, Objective, Params

#: Times by which nbeta may differ from n / log n without a word: beta = 1 and the usual scans of temperatures are within.
FAR = 10.0


class PosteriorSpec(Spec):
    """Temperature, localisation, and which parameters move.

    w = w* + scale * u on the selected parameters, and the density of u is exp(-nbeta L_n(w) - localization/2 |u|^2). With the
    euclidean metric scale = 1, the usual definition. The relative metric measures each parameter tensor in units of its own
    (`relative_scales`), so that the llc of a ReLU network does not change when its layers are rescaled against each other.
    """

    nbeta: float | None = Field(None, gt=0, description="n times the inverse temperature; none = n / log n")
    localization: float = Field(1.0, ge=0, description="strength gamma of the pull towards w*")
    metric: Metric | Literal["auto"] = Field(
        "auto", description="units of the offsets: euclidean, or relative to each tensor; auto = as suits the target"
    )
    parameters: tuple[str, ...] = Field(
        ("*",),
        min_length=1,
        description='the parameters that move, others stay at w*; patterns like "hidden_0/*" or "head/w[0]"',
    )

    def resolve_nbeta(self, num_data: int) -> float:
        """nbeta, or the WBIC choice n / log n."""
        return usual_nbeta(num_data) if self.nbeta is None else self.nbeta

    def doubt(self, num_data: int) -> str:
        """What is odd about nbeta, in a sentence; "" where nothing is."""
        usual = usual_nbeta(num_data)
        if self.nbeta is None or usual / FAR <= self.nbeta <= usual * max(FAR, math.log(num_data)):
            return ""
        return (
            f"posterior.nbeta is n times the inverse temperature beta, n / log n = {usual:.4g} where it is left out; got "
            f"{self.nbeta:.4g}, as of beta = {self.nbeta / num_data:.2g}"
        )


class Posterior(NamedTuple):
    """The posterior as functions of the flat offset u from w*, shape (d,).

    logdensity_fn: -nbeta (L_n(w) - L_n(w*)) - localization/2 |u|^2, scalar.
    minibatch_difference_and_grad: (u, rng_key, batch_size, control_variates=False) -> (L_B(w) - L_B(w*), g_B), on a fresh batch
      of samples drawn with replacement; g_B is the gradient of L_B with respect to u. The difference is paired (both losses on
      the same samples), so it is unbiased for L_n(w) - L_n(w*) and far less noisy than L_B(w) - L_n(w*). With control
      variates c = g_n(w*) - g_B(w*) the gradient is g_B(w) + c and the difference L_B(w) - L_B(w*) + c u: also unbiased, and
      exact to first order in u, for twice the work.
    num_data: number of samples n.
    """

    logdensity_fn: Callable[[jax.Array], jax.Array]
    minibatch_difference_and_grad: Callable[..., tuple[jax.Array, jax.Array]]
    nbeta: jax.Array
    localization: jax.Array
    num_data: int

    def loss_difference(self, position: jax.Array, logdensity: jax.Array) -> jax.Array:
        """L_n(w) - L_n(w*), recovered from the log density at u without another pass over the data."""
        pull = 0.5 * self.localization * jnp.sum(jnp.square(position))
        return -(logdensity + pull) / self.nbeta


def make_centre(
    objective: Objective, params_star: Params, dataset: Dataset, metric: Metric, selection: Selection, with_gradient: bool
) -> Centre:
    """What chains around `params_star` share, computed on the device."""
    params_star, dataset = jax.device_put((params_star, dataset))
    centre = euclidean_centre(objective, params_star, dataset)
    if metric == "relative":
        centre = centre._replace(scales=[jnp.asarray(scale) for scale in relative_scales(objective, centre)])
    if not with_gradient:
        return centre
    gradient = jax.tree.leaves(params_gradient(objective, params_star, centre))
    parts = [
        scale * leaf[index_of(index)].reshape(-1)
        for leaf, scale, index in zip(gradient, centre.scales, selection, strict=True)
        if index is not None
    ]
    return centre._replace(gradient=jnp.concatenate(parts))


def make_posterior(
    objective: Objective, centre: Centre, selection: Selection, nbeta: jax.Array, localization: jax.Array
) -> Posterior:
    """The posterior around `centre` at one temperature and localisation."""

    def logdensity_fn(position: jax.Array) -> jax.Array:
        pull = 0.5 * localization * jnp.sum(jnp.square(position))
        return -nbeta * full_difference(objective, centre.params(position, selection), centre) - pull

    def difference(position: jax.Array, batch: Dataset, losses: jax.Array) -> jax.Array:
        return jnp.mean(objective.per_sample_loss(centre.params(position, selection), batch) - losses)

    def minibatch(
        position: jax.Array, rng_key: jax.Array, batch_size: int, control_variates: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        indices = jax.random.randint(rng_key, (batch_size,), 0, centre.losses.shape[0])
        batch, losses = centre.dataset.take(indices), centre.losses[indices]
        value, gradient = jax.value_and_grad(difference)(position, batch, losses)
        if control_variates:
            correction = centre.gradient - jax.grad(difference)(jnp.zeros_like(position), batch, losses)
            value, gradient = value + correction @ position, gradient + correction
        return value, gradient

    return Posterior(logdensity_fn, minibatch, nbeta, localization, centre.losses.shape[0])
