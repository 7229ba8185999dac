"""Microcanonical Langevin Monte Carlo (BlackJAX; arXiv 2212.08549), tuned before burn-in by BlackJAX's own scheme."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.posterior import Posterior
from lambda_hat.samplers.base import Info, Sampler, SamplerSpec

#: The McLachlan integrator evaluates two gradients a step.
GRADIENTS_PER_STEP = 2.0


class MclmcSpec(SamplerSpec):
    """Microcanonical Langevin Monte Carlo on the whole data, tuned by itself.

    The dynamics are unadjusted; their bias is set by the energy error per dimension they are tuned to.

    Tuning runs `num_tuning_steps` of the dynamics, a third each for the step size, the diagonal preconditioner and the
    decoherence length; burn-in follows with the tuned values.
    """

    kind: Literal["mclmc"] = "mclmc"
    num_draws: int = Field(2000, ge=4, description="recorded draws per chain, after burn-in")
    num_burnin_steps: int = Field(1000, ge=0, description="steps after tuning and before the first draw")
    num_steps_bw_draws: int = Field(5, ge=1, description="steps per recorded draw (thinning)")
    num_tuning_steps: int = Field(2000, ge=100, description="steps that tune step size, preconditioner and decoherence length")
    step_size: float = Field(1e-3, gt=0, description="step per square root of the dimension at which tuning starts")
    desired_energy_var: float = Field(1e-5, gt=0, description="variance of the energy error per dimension; smaller = less bias")

    def gradients_per_step(self, num_data: int) -> float:
        return GRADIENTS_PER_STEP

    def fge(self, num_data: int) -> float:
        return super().fge(num_data) + self.num_chains * self.num_tuning_steps * GRADIENTS_PER_STEP

    def algorithm(self) -> Sampler:
        return _build(self.num_tuning_steps)


class State(NamedTuple):
    """mclmc: BlackJAX's integrator state; parameters: its tuned L, step size and inverse mass matrix."""

    mclmc: Any
    parameters: Any

    @property
    def position(self) -> jax.Array:
        return self.mclmc.position


@functools.cache
def _build(num_tuning_steps: int) -> Sampler:
    import blackjax  # starts JAX's backend, which the settings choose
    from blackjax.adaptation.mclmc_adaptation import MCLMCAdaptationState

    kernel = blackjax.mclmc.build_kernel()

    def init(rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        momentum_key, tuning_key = jax.random.split(rng_key)
        state = blackjax.mclmc.init(position, posterior.logdensity_fn, momentum_key)
        # BlackJAX's own start supposes a posterior of unit scale; it never recovers from a step far too long.
        length = numbers["step_size"] * jnp.sqrt(jnp.asarray(position.shape[0], position.dtype))
        start = MCLMCAdaptationState(4 * length, length, jnp.ones_like(position))
        state, parameters, _ = blackjax.mclmc_find_L_and_step_size(
            kernel, num_tuning_steps, state, tuning_key, posterior.logdensity_fn,
            # The second phase is followed by a third of its length to readjust the step size.
            frac_tune1=0.3, frac_tune2=0.3, frac_tune3=0.3, desired_energy_var=numbers["desired_energy_var"],
            params=start,
        )  # fmt: skip
        return State(state, jax.tree.map(lambda x: jnp.asarray(x, position.dtype), parameters))

    def step(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        p = state.parameters
        mclmc, info = kernel(rng_key, state.mclmc, posterior.logdensity_fn, p.inverse_mass_matrix, p.L, p.step_size)
        difference = posterior.loss_difference(mclmc.position, mclmc.logdensity)
        diverged = 1 - info.nonans.astype(difference.dtype)
        return State(mclmc, p), Info(difference, jnp.ones_like(difference), diverged)

    return Sampler(init, step)
