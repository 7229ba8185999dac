"""Stochastic gradient Nose-Hoover thermostat (Ding et al. 2014; BlackJAX's integrator)."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.samplers.base import Info, Sampler
from lambda_hat.samplers.posterior import Posterior
from lambda_hat.samplers.stochastic import Minibatch, StochasticSpec, heat, logdensity_gradient
from lambda_hat.samplers.trials import with_trials


class SgnhtSpec(StochasticSpec):
    """Stochastic gradient Nose-Hoover thermostat: SGHMC whose friction adapts to the noise of its minibatches.

    u <- u + s v,  v <- (1 - xi) v - s grad U(u) + N(0, 2 a T),  s = sqrt(step_size),
    xi <- xi + thermostat (|v|^2 / d - T),  T = 1 / (1 - xi/2),  a = friction (1 - friction/2),

    xi starting at friction. Minibatch noise heats v; xi then rises until the mean kinetic energy is right again. T is the
    variance of v at this point of the step, after the kick, when u has the posterior's. One xi cools all directions alike, so
    those with more noise than others stay hotter.
    """

    kind: Literal["sgnht"] = "sgnht"
    friction: float = Field(0.3, gt=0, le=1, description="share of the momentum lost in each step at the start")
    thermostat: float = Field(0.01, gt=0, le=1, description="change of the friction per step and unit of excess heat")

    def algorithm(self) -> Sampler:
        return _build(self.minibatch(), self.num_search_steps)


class State(NamedTuple):
    """position (d,); momentum (d,), of unit variance; friction (), the share of the momentum lost in a step, xi."""

    position: jax.Array
    momentum: jax.Array
    friction: jax.Array


@functools.cache
def _build(minibatch: Minibatch, num_search_steps: int) -> Sampler:
    from blackjax.sgmcmc.diffusions import sgnht  # starts JAX's backend, which the settings choose

    def init(rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        return State(position, jax.random.normal(rng_key, position.shape, position.dtype), numbers["friction"])

    def step(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        batch_key, noise_key = jax.random.split(rng_key)
        # In the integrator friction, noise and thermostat all go by its step h: the friction of a step is h xi, and
        # its change h^2 per unit of heat.
        h = jnp.sqrt(numbers["thermostat"])
        root = jnp.sqrt(numbers["step_size"])
        arrives = state.position + root * state.momentum  # as in SGHMC
        info, gradient = minibatch(batch_key, arrives, posterior)
        force = root / h * logdensity_gradient(gradient, arrives, posterior)
        temperature = 1 / (1 - jnp.clip(state.friction, 0, 1) / 2)
        _, momentum, xi = sgnht(numbers["friction"] * (1 - numbers["friction"] / 2) / h)(
            noise_key, state.position / (root / h), state.momentum, state.friction / h, force, h, temperature
        )
        return State(arrives, momentum, h * xi), info

    return with_trials(Sampler(init, step), minibatch, num_search_steps, heat=heat)
