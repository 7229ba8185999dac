"""Metropolis trials of the samplers on minibatches: they find step_size = "auto" in burn-in, and watch the steps afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lambda_hat.compute import random
from lambda_hat.samplers.base import Info, Sampler
from lambda_hat.samplers.posterior import Posterior
from lambda_hat.samplers.stochastic import Minibatch, logdensity_gradient

#: Mean acceptance probability of the Langevin steps that the search aims at.
TARGET_ACCEPTANCE = 0.95

#: Share of the llc that the noise of minibatches may add to it, by the search's own estimate.
MAX_EXCESS = 0.02

#: The step times the steepest curvature that burn-in met, at most. Where a loss grows faster than a quadratic, a step that is
#: right where the posterior is throws a chain that strays from there to infinity; with few parameters `TARGET_ACCEPTANCE`
#: alone leaves no room for that.
MAX_STIFFNESS = 0.25

#: The first step tried, times nbeta; the search leaves it within tens of steps.
FIRST_STEP = 1e-2

#: Steps between two trials after burn-in, so that watching costs a few hundredths of the work.
WATCH_EVERY = 100

#: The same in the second half of burn-in, where the step size follows the chain: losses of singular models are flat at w* and
#: steeper where the posterior is, and chains get there only now.
FOLLOW_EVERY = 10


class State(NamedTuple):
    """inner: the sampler's own state. step_size: the one in use. acceptance_rate, noise_excess: of the last trial. noise, llc:
    means in burn-in, of the excess per unit of step size and of the llc. steepest: curvature of the potential in burn-in.
    dual_averaging: BlackJAX's search, or ()."""

    inner: Any
    step_size: jax.Array
    acceptance_rate: jax.Array
    noise_excess: jax.Array
    noise: jax.Array
    llc: jax.Array
    steepest: jax.Array
    dual_averaging: Any

    @property
    def position(self) -> jax.Array:
        return self.inner.position


class Trial(NamedTuple):
    """A Langevin step that was tried: what evaluating it reported, the loss's gradient where it started, where it led, its
    acceptance probability, by how much the noise of such minibatches raises the llc, and the step size times the curvature of
    the potential along the step."""

    info: Info
    gradient: jax.Array
    position: jax.Array
    acceptance_rate: jax.Array
    noise_excess: jax.Array
    stiffness: jax.Array


def attempt(rng_key: jax.Array, position: jax.Array, step_size: jax.Array, minibatch: Minibatch, posterior: Posterior) -> Trial:
    """A Langevin step of `step_size`, (d,) or (), and the probability with which Metropolis would accept it, on one minibatch.

    Both ends are evaluated on the same minibatch: their densities are of one posterior, and the probability measures the error
    that the length of the step makes, whatever the noise of minibatches. That noise is measured apart, by the gradient g' of
    another minibatch: with variance v_i it heats coordinate i by e_i nbeta^2 v_i / 2, relative to a temperature of 1, and each
    degree of freedom that the loss confines adds half its temperature to the llc, so the excess is
    1/8 nbeta^2 sum_i e_i (g_i - g'_i)^2 on average.
    """
    batch_key, other_key, noise_key = jax.random.split(rng_key, 3)
    noise = random.normal(noise_key, position.shape, position.dtype)
    info, gradient = minibatch(batch_key, position, posterior)
    there = position + step_size * logdensity_gradient(gradient, position, posterior) + jnp.sqrt(2 * step_size) * noise
    other, back = minibatch(batch_key, there, posterior)
    apart = gradient - minibatch(other_key, position, posterior)[1]
    noise_excess = jnp.square(posterior.nbeta) / 8 * jnp.sum(step_size * jnp.square(apart))

    def potential(difference: jax.Array, at: jax.Array) -> jax.Array:
        return posterior.nbeta * difference + 0.5 * posterior.localization * jnp.sum(jnp.square(at))

    pull, pull_there = (logdensity_gradient(*at, posterior) for at in ((gradient, position), (back, there)))
    moved, turned = (there - position) / jnp.sqrt(step_size), jnp.sqrt(step_size) * (pull_there - pull)
    stiffness = jnp.sqrt(jnp.sum(jnp.square(turned)) / jnp.sum(jnp.square(moved)))
    returns = position - there - step_size * pull_there
    log_ratio = (
        potential(info.loss_difference, position) - potential(other.loss_difference, there)
        + 0.5 * jnp.sum(jnp.square(noise)) - jnp.sum(jnp.square(returns) / (4 * step_size))
    )  # fmt: skip
    acceptance_rate = jnp.where(jnp.isfinite(log_ratio), jnp.exp(jnp.minimum(log_ratio, 0)), 0)
    return Trial(info._replace(work=2 * info.work + other.work), gradient, there, acceptance_rate, noise_excess, stiffness)


def with_trials(
    sampler: Sampler,
    minibatch: Minibatch,
    num_search_steps: int,
    scale: Callable[[Any, dict, jax.Array], jax.Array | float] = lambda inner, numbers, index: 1.0,
    adapt: Callable[[Any, jax.Array, dict, jax.Array], Any] = lambda inner, gradient, numbers, index: inner,
    heat: Callable[[dict], jax.Array | float] = lambda numbers: 1.0,
    shorter: Callable[[dict], jax.Array | float] = lambda numbers: 1.0,
) -> Sampler:
    """The sampler watched by trials, and its step size searched in the first half of `num_search_steps`.

    In the search a chain makes Langevin steps of its own, each accepted or refused by Metropolis on the minibatch of the step,
    so that steps much too long do no harm; dual averaging (Nesterov 2009; Hoffman & Gelman 2014) drives the acceptance
    probability to `TARGET_ACCEPTANCE`. It starts anew at a quarter of `num_search_steps`, when preconditioners are frozen. In
    the second half the sampler itself runs, and where it gets to trials go on correcting the step (Robbins & Monro 1951).
    After it all chains have the shortest step that any of them found. The noise of minibatches may raise the llc by
    `MAX_EXCESS` of it: where it would by more, the step is shorter.

    Args:
      num_search_steps: the steps of burn-in for "auto", else 0.
      scale: (inner state, numbers, index) -> the preconditioner, by which a coordinate's step size is multiplied.
      adapt: (inner state, gradient of the loss, numbers, index) -> inner state; what the sampler learns from a gradient.
      heat: numbers -> how many times as much as Langevin's the sampler is heated by the noise of minibatches.
      shorter: numbers -> by what the step found must be multiplied where the sampler's errs more than Langevin's.
    """
    from blackjax.adaptation.step_size import dual_averaging_adaptation  # starts JAX's backend, which the settings choose

    dual = _DualAveraging(*dual_averaging_adaptation(TARGET_ACCEPTANCE))
    watched = _Watched(sampler, minibatch, num_search_steps, scale, adapt, heat, shorter, dual)
    extras = ("step_size", "noise_excess", *sampler.extras)
    return Sampler(watched.init, watched.step, extras, (num_search_steps, _shortest) if watched.end else None)


class _DualAveraging(NamedTuple):
    """BlackJAX's search for a step size."""

    init: Callable[..., Any]
    update: Callable[..., Any]
    final: Callable[..., Any]


class _Watched(NamedTuple):
    """A sampler watched by trials: the arguments of `with_trials`, and the search's steps `restart` and `end`."""

    sampler: Sampler
    minibatch: Minibatch
    num_search_steps: int
    scale: Callable[[Any, dict, jax.Array], jax.Array | float]
    adapt: Callable[[Any, jax.Array, dict, jax.Array], Any]
    heat: Callable[[dict], jax.Array | float]
    shorter: Callable[[dict], jax.Array | float]
    dual: _DualAveraging

    @property
    def restart(self) -> int:
        return self.num_search_steps // 4

    @property
    def end(self) -> int:
        return self.num_search_steps // 2

    def init(self, rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        first = (FIRST_STEP / posterior.nbeta).astype(position.dtype)
        step_size = numbers.get("step_size", first)
        inner = self.sampler.init(rng_key, position, posterior, numbers | {"step_size": step_size})
        zero = jnp.zeros((), position.dtype)
        return State(inner, step_size, zero + 1, zero, zero, zero, zero, self.dual.init(step_size) if self.end else ())

    def step(
        self, rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array
    ) -> tuple[State, Info]:
        if not self.end:
            return self._run(rng_key, state, posterior, numbers, index)
        return jax.lax.cond(
            index < self.end,
            lambda: self._search(rng_key, state, posterior, numbers, index),
            lambda: self._run(rng_key, state, posterior, numbers, index),
        )

    def _search(
        self, rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array
    ) -> tuple[State, Info]:
        trial_key, accept_key = jax.random.split(rng_key)
        here = state.position
        trial = attempt(trial_key, here, state.step_size * self.scale(state.inner, numbers, index), self.minibatch, posterior)
        inner = self.adapt(state.inner, trial.gradient, numbers, index)
        accepted = jax.random.uniform(accept_key, (), here.dtype) < trial.acceptance_rate
        # Means since the restart.
        weight = 1 / jnp.maximum(index - self.restart + 1, 1).astype(here.dtype)
        state = self._averaged(state, trial, state.step_size, posterior, numbers, weight)
        state = state._replace(steepest=jnp.where(index < self.restart, 0, state.steepest))
        dual = self.dual.update(state.dual_averaging, trial.acceptance_rate)
        step_size = jnp.where(index == self.restart - 1, self.dual.final(dual), jnp.exp(dual.log_step_size))
        anew = self.dual.init(step_size)
        dual = jax.tree.map(lambda new, old: jnp.where(index == self.restart - 1, new, old).astype(old.dtype), anew, dual)
        found = self.shorter(numbers) * jnp.minimum(self.dual.final(dual), _longest(state))
        step_size = jnp.where(index == self.end - 1, found, step_size).astype(here.dtype)
        inner = inner._replace(position=jnp.where(accepted, trial.position, here))
        info = trial.info._replace(acceptance_rate=trial.acceptance_rate)
        return state._replace(inner=inner, step_size=step_size, dual_averaging=dual), info

    def _run(
        self, rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array
    ) -> tuple[State, Info]:
        follows = index < self.num_search_steps

        def watched() -> tuple[State, jax.Array]:
            tried = state.step_size / jnp.where(follows, self.shorter(numbers), 1)  # of Langevin's, as in the search
            step_size = tried * self.scale(state.inner, numbers, index)
            trial = attempt(jax.random.fold_in(rng_key, 1), state.position, step_size, self.minibatch, posterior)
            gain = 1 / jnp.sqrt(1 + jnp.maximum(index - self.end, 0) // FOLLOW_EVERY).astype(tried.dtype)
            new = self._averaged(state, trial, tried, posterior, numbers, gain)
            found = state.step_size * jnp.exp(gain * (trial.acceptance_rate - TARGET_ACCEPTANCE) / 2)
            found = jnp.minimum(found, self.shorter(numbers) * _longest(new))
            step_size = jnp.where(follows, found, state.step_size).astype(state.step_size.dtype)
            return new._replace(step_size=step_size), trial.info.work

        def unwatched() -> tuple[State, jax.Array]:
            return state, jnp.zeros((), state.acceptance_rate.dtype)

        every = jnp.where(follows, FOLLOW_EVERY, WATCH_EVERY)
        state, work = jax.lax.cond((index % every == 0) | (index == self.end), watched, unwatched)
        inner, info = self.sampler.step(rng_key, state.inner, posterior, numbers | {"step_size": state.step_size}, index)
        return state._replace(inner=inner), info._replace(acceptance_rate=state.acceptance_rate, work=info.work + work)

    def _averaged(
        self, state: State, trial: Trial, step_size: jax.Array, posterior: Posterior, numbers: dict, weight: jax.Array
    ) -> State:
        """The last trial's numbers, and the means with its share in them."""
        excess = self.heat(numbers) * trial.noise_excess
        rate, llc = excess / step_size, posterior.nbeta * trial.info.loss_difference
        noise = state.noise + jnp.where(jnp.isfinite(rate), weight * (rate - state.noise), 0)
        llc = state.llc + jnp.where(jnp.isfinite(llc), weight * (llc - state.llc), 0)
        likely = (trial.acceptance_rate > 0.5) & jnp.isfinite(trial.stiffness)  # others lead where the chain does not go
        steepest = jnp.maximum(state.steepest, jnp.where(likely, trial.stiffness / step_size, 0))
        return state._replace(
            acceptance_rate=trial.acceptance_rate, noise_excess=excess, noise=noise, llc=llc, steepest=steepest
        )


def _longest(state: State) -> jax.Array:
    """The step at which the noise of minibatches raises the llc by `MAX_EXCESS` of it, or that of `MAX_STIFFNESS`."""
    quiet = jnp.where((state.llc > 0) & (state.noise > 0), MAX_EXCESS * state.llc / state.noise, jnp.inf)
    return jnp.minimum(quiet, jnp.where(state.steepest > 0, MAX_STIFFNESS / state.steepest, jnp.inf))


def _shortest(states: State) -> State:
    """Where some chains have reached steeper ground than others, all must be able to follow; but not where one is lost."""
    found = jnp.isfinite(states.step_size) & (states.step_size > 0)
    shortest = jnp.min(jnp.where(found, states.step_size, jnp.inf))
    return states._replace(step_size=jnp.where(jnp.isfinite(shortest), shortest, states.step_size))
