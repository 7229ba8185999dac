"""Stochastic gradient Langevin dynamics (Welling & Teh 2011), plain or with a diagonal preconditioner."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from lambda_hat.compute import random
from lambda_hat.samplers.base import Info, Sampler
from lambda_hat.samplers.posterior import Posterior
from lambda_hat.samplers.stochastic import Minibatch, StochasticSpec, logdensity_gradient
from lambda_hat.samplers.trials import with_trials

#: Fewest steps of burn-in a preconditioner is adapted in.
MIN_ADAPTATION = 100


class SgldSpec(StochasticSpec):
    """Stochastic gradient Langevin dynamics on minibatches, plain or preconditioned.

    u <- u - e_t (nbeta g + localization u) + sqrt(2 e_t) (x_t + x_{t-1}) / 2,

    g an estimate of grad L_n(w) from a fresh minibatch and x_t ~ N(0, I) (Leimkuhler & Matthews 2013): where the loss is
    quadratic no error comes from the length of the step. The euler integrator has x_t in place of the mean of two, which makes
    the llc too large by a share of about e h/2, averaged over the curvatures h of the potential.

    none: e_t = step_size. rmsprop, adam: e_t = step_size / (sqrt(v_t) + stabilizer) for each coordinate, with
    v_t = beta2 v_{t-1} + (1-beta2) g^2 of the loss gradient alone, v_0 = 1, bias-corrected by 1/(1-beta2^t); adam also
    drifts along m_t = beta1 m_{t-1} + (1-beta1) g, m_0 = 0, corrected by 1/(1-beta1^t), in place of g (arXiv 2507.21449,
    App. D.3).
    v is adapted during burn-in (the first quarter of it with step_size = "auto") and then frozen: a v that follows the chain
    shortens the steps where gradients are large, so that the chain lingers there and the llc comes out too high (by a quarter
    on a quadratic).
    """

    kind: Literal["sgld"] = "sgld"
    preconditioner: Literal["none", "rmsprop", "adam"] = Field("none", description="diagonal preconditioner")
    integrator: Literal["leimkuhler_matthews", "euler"] = Field(
        "leimkuhler_matthews", description="how noise enters; euler is the usual SGLD, with an error of first order in the step"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of adam's first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    stabilizer: float = Field(1e-4, gt=0, description="added to sqrt(v): bounds the step where gradients vanish")

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
        adaptation = 0 if self.preconditioner == "none" else self.num_burnin_steps - self.num_search_steps * 3 // 4
        return _build(self.minibatch(), self.preconditioner, self.integrator, adaptation, self.num_search_steps)


class State(NamedTuple):
    """position (d,); m, v: moments of the loss gradient, (d,), or () where the preconditioner has none; noise: the last step's,
    (d,), or () with the Euler integrator."""

    position: jax.Array
    m: jax.Array
    v: jax.Array
    noise: jax.Array


@functools.cache
def _build(
    minibatch: Minibatch, preconditioner: str, integrator: str, num_adaptation_steps: int, num_search_steps: int
) -> Sampler:
    from blackjax.sgmcmc.diffusions import overdamped_langevin  # starts JAX's backend, which the settings choose

    euler = overdamped_langevin()

    def init(rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        none = jnp.zeros((), position.dtype)
        return State(
            position,
            jnp.zeros_like(position) if preconditioner == "adam" else none,
            none if preconditioner == "none" else jnp.ones_like(position),
            random.normal(rng_key, position.shape, position.dtype) if integrator != "euler" else none,
        )

    def adapt(state: State, gradient: jax.Array, numbers: dict, index: jax.Array) -> State:
        if preconditioner == "none":
            return state
        v = numbers["beta2"] * state.v + (1 - numbers["beta2"]) * jnp.square(gradient)
        return state._replace(v=jnp.where(index < num_adaptation_steps, v, state.v))

    def scale(state: State, numbers: dict, index: jax.Array) -> jax.Array | float:
        if preconditioner == "none":
            return 1.0
        adapted = jnp.minimum(index + 1, num_adaptation_steps).astype(state.v.dtype)
        return 1 / (jnp.sqrt(state.v / (1 - numbers["beta2"] ** adapted)) + numbers["stabilizer"])

    def step(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        batch_key, noise_key = jax.random.split(rng_key)
        info, gradient = minibatch(batch_key, state.position, posterior)
        state = adapt(state, gradient, numbers, index)
        drift, m = gradient, state.m
        if preconditioner == "adam":
            m = numbers["beta1"] * m + (1 - numbers["beta1"]) * gradient
            drift = m / (1 - numbers["beta1"] ** (index + 1).astype(m.dtype))
        gradient_logdensity = logdensity_gradient(drift, state.position, posterior)
        step_size = numbers["step_size"] * scale(state, numbers, index)
        if integrator == "euler":
            position = euler(noise_key, state.position, gradient_logdensity, step_size)
            return State(position, m, state.v, state.noise), info
        noise = random.normal(noise_key, state.position.shape, state.position.dtype)
        position = state.position + step_size * gradient_logdensity + jnp.sqrt(step_size / 2) * (state.noise + noise)
        return State(position, m, state.v, noise), info

    def lag(numbers: dict) -> jax.Array | float:
        """Of Adam's first moment, which is of gradients up to (1 + beta1) / (1 - beta1) steps old."""
        return (1 - numbers["beta1"]) / (1 + numbers["beta1"]) if preconditioner == "adam" else 1.0

    return with_trials(Sampler(init, step), minibatch, num_search_steps, scale, adapt, shorter=lag)
