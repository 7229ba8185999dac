"""Metropolis trials of the samplers on minibatches: they find step_size = "auto" in burn-in, and watch the steps afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lambda_hat.posterior import Posterior
from lambda_hat.samplers.base import CHAINS, Info, Sampler
from lambda_hat.samplers.stochastic import Minibatch, logdensity_gradient

#: Mean acceptance probability of the Langevin steps that the search aims at.
TARGET_ACCEPTANCE = 0.95

#: The first step tried, times nbeta; the search leaves it within tens of steps.
FIRST_STEP = 1e-2

#: Steps between two trials after burn-in, so that watching costs a few hundredths of the work.
WATCH_EVERY = 50


class State(NamedTuple):
    """inner: the sampler's own state. step_size: the one in use. acceptance_rate: of the last trial. dual_averaging: BlackJAX's
    search of the step size, or ()."""

    inner: Any
    step_size: jax.Array
    acceptance_rate: jax.Array
    dual_averaging: Any

    @property
    def position(self) -> jax.Array:
        return self.inner.position


class Trial(NamedTuple):
    """A Langevin step that was tried: what evaluating it reported, the loss's gradient where it started, and where it led."""

    info: Info
    gradient: jax.Array
    position: jax.Array
    acceptance_rate: jax.Array


def attempt(rng_key: jax.Array, position: jax.Array, step_size: jax.Array, minibatch: Minibatch, posterior: Posterior) -> Trial:
    """A Langevin step of `step_size`, (d,) or (), and the probability with which Metropolis would accept it, on one minibatch.

    Both ends are evaluated on the same minibatch: their densities are of one posterior, and the probability measures the error
    that the length of the step makes, whatever the noise of minibatches.
    """
    batch_key, noise_key = jax.random.split(rng_key)
    noise = jax.random.normal(noise_key, position.shape, position.dtype)
    info, gradient = minibatch(batch_key, position, posterior)
    there = position + step_size * logdensity_gradient(gradient, position, posterior) + jnp.sqrt(2 * step_size) * noise
    other, back = minibatch(batch_key, there, posterior)

    def potential(difference: jax.Array, at: jax.Array) -> jax.Array:
        return posterior.nbeta * difference + 0.5 * posterior.localization * jnp.sum(jnp.square(at))

    returns = position - there - step_size * logdensity_gradient(back, there, posterior)
    log_ratio = (
        potential(info.loss_difference, position) - potential(other.loss_difference, there)
        + 0.5 * jnp.sum(jnp.square(noise)) - jnp.sum(jnp.square(returns) / (4 * step_size))
    )  # fmt: skip
    acceptance_rate = jnp.where(jnp.isfinite(log_ratio), jnp.exp(jnp.minimum(log_ratio, 0)), 0)
    return Trial(info._replace(work=info.work + other.work), gradient, there, acceptance_rate)


def with_trials(
    sampler: Sampler,
    minibatch: Minibatch,
    num_search_steps: int,
    scale: Callable[[Any, dict, jax.Array], jax.Array | float] = lambda inner, numbers, index: 1.0,
    adapt: Callable[[Any, jax.Array, dict, jax.Array], Any] = lambda inner, gradient, numbers, index: inner,
) -> Sampler:
    """The sampler, its acceptance rate watched by trials, and its step size searched in three quarters of `num_search_steps`.

    In the search a chain makes Langevin steps of its own, each accepted or refused by Metropolis on the minibatch of the step,
    so that steps much too long do no harm; dual averaging (Nesterov 2009; Hoffman & Gelman 2014) drives the acceptance
    probability to `TARGET_ACCEPTANCE`. It starts anew at half of `num_search_steps`, when preconditioners are frozen. In the last
    quarter the sampler itself runs, with the shortest step that any chain of the run found.

    Args:
      num_search_steps: the steps of burn-in for "auto", else 0.
      scale: (inner state, numbers, index) -> the preconditioner, by which a coordinate's step size is multiplied.
      adapt: (inner state, gradient of the loss, numbers, index) -> inner state; what the sampler learns from a gradient.
    """
    from blackjax.adaptation.step_size import dual_averaging_adaptation  # starts JAX's backend, which the settings choose

    dual_init, dual_update, dual_final = dual_averaging_adaptation(TARGET_ACCEPTANCE)
    restart, end = num_search_steps // 2, num_search_steps * 3 // 4

    def init(rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        first = (FIRST_STEP / posterior.nbeta).astype(position.dtype)
        step_size = numbers.get("step_size", first)
        inner = sampler.init(rng_key, position, posterior, numbers | {"step_size": step_size})
        return State(inner, step_size, jnp.ones((), position.dtype), dual_init(step_size) if end else ())

    def search(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        trial_key, accept_key = jax.random.split(rng_key)
        here = state.position
        trial = attempt(trial_key, here, state.step_size * scale(state.inner, numbers, index), minibatch, posterior)
        inner = adapt(state.inner, trial.gradient, numbers, index)
        accepted = jax.random.uniform(accept_key, (), here.dtype) < trial.acceptance_rate
        dual = dual_update(state.dual_averaging, trial.acceptance_rate)
        step_size = jnp.where(index == restart - 1, dual_final(dual), jnp.exp(dual.log_step_size))
        anew = dual_init(step_size)
        # Where some chains have reached steeper ground than others, all must be able to follow.
        step_size = jnp.where(index == end - 1, jax.lax.pmin(dual_final(dual), CHAINS), step_size).astype(here.dtype)
        dual = jax.tree.map(lambda new, old: jnp.where(index == restart - 1, new, old).astype(old.dtype), anew, dual)
        inner = inner._replace(position=jnp.where(accepted, trial.position, here))
        info = trial.info._replace(acceptance_rate=trial.acceptance_rate)
        return State(inner, step_size, trial.acceptance_rate, dual), info

    def run(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        def watched() -> tuple[jax.Array, jax.Array]:
            step_size = state.step_size * scale(state.inner, numbers, index)
            trial = attempt(jax.random.fold_in(rng_key, 1), state.position, step_size, minibatch, posterior)
            return trial.acceptance_rate, trial.info.work

        none = jnp.zeros((), state.acceptance_rate.dtype)
        rate, work = jax.lax.cond(index % WATCH_EVERY == 0, watched, lambda: (state.acceptance_rate, none))
        inner, info = sampler.step(rng_key, state.inner, posterior, numbers | {"step_size": state.step_size}, index)
        return state._replace(inner=inner, acceptance_rate=rate), info._replace(acceptance_rate=rate, work=info.work + work)

    def step(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        if not end:
            return run(rng_key, state, posterior, numbers, index)
        return jax.lax.cond(
            index < end,
            lambda: search(rng_key, state, posterior, numbers, index),
            lambda: run(rng_key, state, posterior, numbers, index),
        )

    return Sampler(init, step, ("step_size", *sampler.extras))
