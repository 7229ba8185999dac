"""Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox & Guestrin 2014)."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.compute import random
from lambda_hat.samplers.base import Info, Sampler
from lambda_hat.samplers.posterior import Posterior
from lambda_hat.samplers.stochastic import Minibatch, StochasticSpec, heat, logdensity_gradient
from lambda_hat.samplers.trials import with_trials


class SghmcSpec(StochasticSpec):
    """Stochastic gradient Hamiltonian Monte Carlo: SGLD with a momentum that persists.

    With s = sqrt(2 step_size), and the gradient from a fresh minibatch,

    v <- v - s grad U(u),  u <- u + s/2 v,  v <- (1 - friction) v + sqrt(1 - (1 - friction)^2) N(0, I),  u <- u + s/2 v:

    the BAOAB splitting (Leimkuhler & Matthews 2013), in which a quadratic loss suffers no error from the length of the step.
    With friction 1 it is SGLD with the same step_size. With less, slow directions move (2 - friction) / friction times as far
    in as many steps, and the noise of minibatches heats as many times as much: control variates go well with it.
    """

    kind: Literal["sghmc"] = "sghmc"
    friction: float = Field(0.3, gt=0, le=1, description="share of the momentum lost in each step")

    def algorithm(self) -> Sampler:
        return _build(self.minibatch(), self.num_search_steps)


class State(NamedTuple):
    """position (d,); momentum (d,), of unit variance."""

    position: jax.Array
    momentum: jax.Array


@functools.cache
def _build(minibatch: Minibatch, num_search_steps: int) -> Sampler:
    def init(rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        return State(position, random.normal(rng_key, position.shape, position.dtype))

    def step(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        batch_key, noise_key = jax.random.split(rng_key)
        info, gradient = minibatch(batch_key, state.position, posterior)
        unit = jnp.sqrt(2 * numbers["step_size"])
        keeps = 1 - numbers["friction"]
        momentum = state.momentum + unit * logdensity_gradient(gradient, state.position, posterior)
        noise = random.normal(noise_key, momentum.shape, momentum.dtype)
        renewed = keeps * momentum + jnp.sqrt(1 - jnp.square(keeps)) * noise
        return State(state.position + unit / 2 * (momentum + renewed), renewed), info

    return with_trials(Sampler(init, step), minibatch, num_search_steps, heat=heat)
