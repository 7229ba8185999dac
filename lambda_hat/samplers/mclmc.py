"""Microcanonical Langevin Monte Carlo (BlackJAX; arXiv 2212.08549), its step tuned to an energy error during burn-in."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.samplers.adaptation import Adaptation, StepRule, warm_up
from lambda_hat.samplers.base import Info, Sampler, SamplerSpec
from lambda_hat.samplers.posterior import Posterior

#: The McLachlan integrator evaluates two gradients a step.
GRADIENTS_PER_STEP = 2.0
#: As in BlackJAX: effective steps over which the energy error is averaged, and the width of its weights in powers of the step.
EFFECTIVE_STEPS, TRUST = 150, 1.5
#: Factor by which a step size that failed is shortened.
SHRINK = 0.8
#: A step has failed if its energy error is above the first (the density is off by a factor) and the second (times the error
#: that is tuned to, which in many dimensions is large itself).
MAX_ERROR, MAX_RATIO = 0.5, 30.0


class MclmcSpec(SamplerSpec):
    """Microcanonical Langevin Monte Carlo on the whole data, tuned by itself.

    The dynamics are unadjusted: their bias is set by the variance of the energy error per dimension they are tuned to. Burn-in
    tunes the step to it and the diagonal mass matrix in Stan's windows; directions decohere over sqrt(d) in its units.
    """

    kind: Literal["mclmc"] = "mclmc"
    num_draws: int = Field(2000, ge=4, description="recorded draws per chain, after burn-in")
    num_burnin_steps: int = Field(3000, ge=100, description="tuning steps, none of which enters an estimate")
    num_steps_bw_draws: int = Field(5, ge=1, description="steps per recorded draw (thinning)")
    step_size: float = Field(1e-3, gt=0, description="step per square root of the dimension at which tuning starts")
    desired_energy_var: float = Field(1e-5, gt=0, description="variance of the energy error per dimension; smaller = less bias")

    def gradients_per_step(self, num_data: int) -> float:
        return GRADIENTS_PER_STEP

    def algorithm(self) -> Sampler:
        return _build(self.num_burnin_steps)


class State(NamedTuple):
    """mclmc: BlackJAX's integrator state; adaptation: its step size and mass matrix, and what tunes them."""

    mclmc: Any
    adaptation: Adaptation

    @property
    def position(self) -> jax.Array:
        return self.mclmc.position


class EnergyRule(NamedTuple):
    """step_size: the one in use; longest: above which steps have failed; weight, scaled: sums over recent steps of the
    weights and of weight xi / step_size^6."""

    step_size: jax.Array
    longest: jax.Array
    weight: jax.Array
    scaled: jax.Array


def energy_rule() -> StepRule:
    """The step size at which the energy error of a step, the signal, has variance desired_energy_var per dimension.

    As BlackJAX tunes MCLMC (its own function runs all steps in one call): the error grows as the cube of the step, so with
    xi = error^2 / desired a step estimates the right step_size as its own times xi^(-1/6). These are averaged over the last
    `EFFECTIVE_STEPS` with weights exp(-1/2 (log xi / (6 TRUST))^2), which leave out errors far off. A step that failed (NaN)
    limits all later ones.
    """
    decay = (EFFECTIVE_STEPS - 1) / (EFFECTIVE_STEPS + 1)

    def init(step_size: jax.Array) -> EnergyRule:
        return EnergyRule(step_size, jnp.full_like(step_size, jnp.inf), jnp.zeros_like(step_size), jnp.zeros_like(step_size))

    def update(rule: EnergyRule, error: jax.Array, numbers: dict) -> EnergyRule:
        failed = ~jnp.isfinite(error)
        # The offset keeps a perfect step's logarithm finite.
        xi = jnp.square(jnp.where(failed, 0.0, error)) / numbers["desired_energy_var"] + 1e-8
        weight = jnp.exp(-0.5 * jnp.square(jnp.log(xi) / (6 * TRUST)))
        total = decay * rule.weight + weight
        # In powers of the step in use, since a step's own sixth power is not a float32.
        scaled = decay * rule.scaled + weight * xi
        proposed = rule.step_size * (scaled / total) ** (-1 / 6)
        longest = jnp.where(failed, SHRINK * rule.step_size, rule.longest)
        step_size = jnp.minimum(proposed, longest)
        return EnergyRule(step_size, longest, total, scaled * (step_size / rule.step_size) ** 6)

    return StepRule(init, update, lambda rule: rule.step_size, lambda rule: rule.step_size)


@functools.cache
def _build(num_burnin_steps: int) -> Sampler:
    import blackjax  # starts JAX's backend, which the settings choose

    kernel = blackjax.mclmc.build_kernel()
    adaptation = warm_up(num_burnin_steps, energy_rule())

    def root_dim(position: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.asarray(position.size, position.dtype))

    def init(rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        mclmc = blackjax.mclmc.init(position, posterior.logdensity_fn, rng_key)
        # BlackJAX's own start supposes a posterior of unit scale; it never recovers from a step far too long.
        return State(mclmc, adaptation.init(position, numbers["step_size"] * root_dim(position)))

    def step(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        tuned, length = state.adaptation, root_dim(state.position)
        mclmc, info = kernel(rng_key, state.mclmc, posterior.logdensity_fn, tuned.inverse_mass_matrix, length, tuned.step_size)
        error = jnp.where(info.nonans, info.energy_change / length, jnp.nan)
        tuned = adaptation.update(tuned, mclmc.position, error, numbers, index)
        difference = posterior.loss_difference(mclmc.position, mclmc.logdensity)
        limit = jnp.maximum(MAX_RATIO * jnp.sqrt(numbers["desired_energy_var"]), MAX_ERROR / length)
        failed = ~(jnp.abs(error) < limit)
        one = jnp.ones_like(difference)
        return State(mclmc, tuned), Info(difference, one, failed.astype(one.dtype), GRADIENTS_PER_STEP * one)

    return Sampler(init, step)
