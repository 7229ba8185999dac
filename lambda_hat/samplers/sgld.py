"""Stochastic gradient Langevin dynamics (Welling & Teh 2011), plain or with a diagonal preconditioner."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from lambda_hat.posterior import Posterior
from lambda_hat.samplers.base import Info, Sampler, SamplerSpec

#: Fewest steps of burn-in a preconditioner is adapted in.
MIN_ADAPTATION = 100


class SgldSpec(SamplerSpec):
    """Stochastic gradient Langevin dynamics on minibatches, plain or preconditioned.

    w <- w - e_t (nbeta g + localization (w - w*)) + N(0, 2 e_t), g = grad L_B(w) on a fresh minibatch.

    none: e_t = step_size. rmsprop, adam: e_t = step_size / (sqrt(v_t) + stabilizer) for each coordinate, with
    v_t = beta2 v_{t-1} + (1-beta2) g^2 of the loss gradient alone, v_0 = 1, bias-corrected by 1/(1-beta2^t); adam also
    drifts along m_t = beta1 m_{t-1} + (1-beta1) g, m_0 = 0, corrected by 1/(1-beta1^t), in place of g (arXiv 2507.21449,
    App. D.3).
    v is adapted during burn-in and then frozen: a v that follows the chain shortens the steps where gradients are large, so
    that the chain lingers there and the llc comes out too high (by a quarter on a quadratic).
    """

    kind: Literal["sgld"] = "sgld"
    num_draws: int = Field(2000, ge=4, description="recorded draws per chain, after burn-in")
    num_burnin_steps: int = Field(5000, ge=0, description="steps before the first draw, rounded up to whole draws")
    num_steps_bw_draws: int = Field(10, ge=1, description="steps per recorded draw; a draw averages their losses")
    step_size: float = Field(1e-5, gt=0, description="drift per unit gradient of the potential")
    batch_size: int = Field(256, ge=1, description="samples per gradient, drawn with replacement; at most n")
    preconditioner: Literal["none", "rmsprop", "adam"] = Field("none", description="diagonal preconditioner")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of adam's first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    stabilizer: float = Field(1e-4, gt=0, description="added to sqrt(v): bounds the step where gradients vanish")

    def gradients_per_step(self, num_data: int) -> float:
        return self.batch_size / num_data

    @model_validator(mode="after")
    def _adapts(self) -> Self:
        unused = {"none": ("beta1", "beta2", "stabilizer"), "rmsprop": ("beta1",), "adam": ()}[self.preconditioner]
        for name in unused:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with preconditioner={self.preconditioner}; got {getattr(self, name)}")
        if self.preconditioner != "none" and self.num_burnin_steps < MIN_ADAPTATION:
            raise ValueError(
                f"num_burnin_steps must be at least {MIN_ADAPTATION} with preconditioner={self.preconditioner}, "
                f"which is adapted during burn-in; got {self.num_burnin_steps}"
            )
        return self

    def algorithm(self) -> Sampler:
        return _build(self.batch_size, self.preconditioner, self.num_burnin_steps if self.preconditioner != "none" else 0)


class State(NamedTuple):
    """position (d,); m, v: moments of the loss gradient, (d,), or () where the preconditioner has none."""

    position: jax.Array
    m: jax.Array
    v: jax.Array


@functools.cache
def _build(batch_size: int, preconditioner: str, num_adaptation_steps: int) -> Sampler:
    from blackjax.sgmcmc.diffusions import overdamped_langevin  # starts JAX's backend, which the settings choose

    integrator = overdamped_langevin()

    def init(rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        none = jnp.zeros((), position.dtype)
        return State(
            position,
            jnp.zeros_like(position) if preconditioner == "adam" else none,
            none if preconditioner == "none" else jnp.ones_like(position),
        )

    def step(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        batch_key, noise_key = jax.random.split(rng_key)
        position, m, v = state
        difference, gradient = posterior.minibatch_difference_and_grad(position, batch_key, batch_size)
        drift, step_size = gradient, numbers["step_size"]
        if preconditioner != "none":
            beta2 = numbers["beta2"]
            v = jnp.where(index < num_adaptation_steps, beta2 * v + (1 - beta2) * jnp.square(gradient), v)
            adapted = jnp.minimum(index + 1, num_adaptation_steps).astype(position.dtype)
            step_size = step_size / (jnp.sqrt(v / (1 - beta2**adapted)) + numbers["stabilizer"])
        if preconditioner == "adam":
            beta1 = numbers["beta1"]
            m = beta1 * m + (1 - beta1) * gradient
            drift = m / (1 - beta1 ** (index + 1).astype(position.dtype))
        gradient_logdensity = -posterior.nbeta * drift - posterior.localization * (position - posterior.position_star)
        position = integrator(noise_key, position, gradient_logdensity, step_size)
        diverged = 1 - jnp.isfinite(difference).astype(difference.dtype)
        return State(position, m, v), Info(difference, jnp.ones_like(difference), diverged)

    return Sampler(init, step)
