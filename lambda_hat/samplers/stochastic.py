"""What the samplers on minibatches share: SGLD, SGHMC and SGNHT.

All three take `step_size` in SGLD's convention (drift step_size grad U, noise of variance 2 step_size), so that one step size
suits all: the momenta of the other two have unit variance, and a step of friction 1, which renews them, is SGLD's.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from lambda_hat.samplers.base import Info, SamplerSpec, StepSize
from lambda_hat.samplers.posterior import Posterior

#: Fewest steps of burn-in in which a step size is found.
MIN_SEARCH = 400


class StochasticSpec(SamplerSpec):
    """Fields of the samplers on minibatches."""

    num_draws: int = Field(2000, ge=4, description="recorded draws per chain, after burn-in")
    num_burnin_steps: int = Field(10_000, ge=0, description="steps before the first draw, rounded up to whole draws")
    num_steps_bw_draws: int = Field(20, ge=1, description="steps per recorded draw; a draw averages their losses")
    step_size: StepSize = Field("auto", description="drift per unit gradient of the potential; auto = found in burn-in")
    batch_size: int = Field(256, ge=1, description="samples per gradient, drawn with replacement; at most n")
    gradient: Literal["plain", "control_variates"] = Field(
        "control_variates", description="plain: the minibatch's; control_variates: less its own at w* plus all the data's there"
    )
    eval_every: int = Field(0, ge=0, description="evaluate the loss on all the data every so many draws; 0 = never")

    @model_validator(mode="after")
    def _fits_length(self) -> Self:
        if self.step_size == "auto" and self.num_burnin_steps < MIN_SEARCH:
            raise ValueError(
                f"num_burnin_steps must be at least {MIN_SEARCH} with step_size=auto, which is searched in burn-in; "
                f"got {self.num_burnin_steps}"
            )
        if self.eval_every > self.num_draws:
            raise ValueError(
                f"eval_every must be at most num_draws, {self.num_draws}, or 0 for never; got {self.eval_every}: no draw would "
                "be evaluated"
            )
        return self

    @property
    def num_search_steps(self) -> int:
        """Steps of burn-in in which the step size is searched and tried; 0 where it is given."""
        return self.num_burnin_steps if self.step_size == "auto" else 0

    def minibatch(self) -> Minibatch:
        return Minibatch(self.batch_size, self.gradient == "control_variates")

    def gradients_per_step(self, num_data: int) -> float:
        return self.minibatch().work(num_data)


class Minibatch(NamedTuple):
    """How the gradient of a step is estimated."""

    batch_size: int
    control_variates: bool

    def work(self, num_data: int) -> float:
        """Full-data gradient equivalents of one estimate."""
        return (1 + self.control_variates) * self.batch_size / num_data

    def __call__(self, rng_key: jax.Array, position: jax.Array, posterior: Posterior) -> tuple[Info, jax.Array]:
        """What a step that evaluates its gradient at `position` reports, and the gradient of the loss, (d,)."""
        difference, gradient = posterior.minibatch_difference_and_grad(
            position, rng_key, self.batch_size, self.control_variates
        )
        one = jnp.ones_like(difference)
        failed = 1 - jnp.isfinite(difference).astype(difference.dtype)
        return Info(difference, one, failed, self.work(posterior.num_data) * one), gradient


def logdensity_gradient(gradient: jax.Array, position: jax.Array, posterior: Posterior) -> jax.Array:
    """-grad U from the gradient of the loss."""
    return -posterior.nbeta * gradient - posterior.localization * position


def heat(numbers: dict[str, jax.Array]) -> jax.Array:
    """How many times as much as SGLD a sampler with momentum is heated by the noise of minibatches: (2 - friction) / friction,
    as much as it moves farther in as many steps."""
    return (2 - numbers["friction"]) / numbers["friction"]
