"""Hamiltonian Monte Carlo (BlackJAX), its step size and diagonal mass matrix adapted during burn-in as Stan does."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.posterior import Posterior
from lambda_hat.samplers.base import Info, Sampler, SamplerSpec

#: The step size is multiplied by 1 + U(-JITTER, JITTER) each step: with a fixed trajectory length, a Gaussian direction whose
#: period divides it would never move.
JITTER = 0.2


class HmcSpec(SamplerSpec):
    """Hamiltonian Monte Carlo on the whole data, adapted during burn-in.

    Leapfrog trajectories of `num_integration_steps`, Metropolis-corrected: exact up to Monte Carlo error. Burn-in adapts the
    step size to `target_acceptance` by dual averaging and the diagonal mass matrix in Stan's windows.
    """

    kind: Literal["hmc"] = "hmc"
    num_burnin_steps: int = Field(500, ge=20, description="adaptation steps, none of which enters an estimate")
    num_draws: int = Field(500, ge=4, description="recorded draws per chain, after burn-in")
    step_size: float = Field(1e-2, gt=0, description="step size at which adaptation starts")
    num_integration_steps: int = Field(10, ge=1, description="leapfrog steps per trajectory")
    target_acceptance: float = Field(0.9, gt=0, lt=1, description="acceptance rate the step size is adapted to")

    def gradients_per_step(self, num_data: int) -> float:
        return float(self.num_integration_steps)

    def algorithm(self) -> Sampler:
        return _build(self.num_integration_steps, self.num_burnin_steps)


class State(NamedTuple):
    """hmc: BlackJAX's state; the rest: the adapted parameters and what adapts them."""

    hmc: Any
    step_size: jax.Array
    inverse_mass_matrix: jax.Array
    dual_averaging: Any
    mass_matrix: Any

    @property
    def position(self) -> jax.Array:
        return self.hmc.position


@functools.cache
def _build(num_integration_steps: int, num_burnin_steps: int) -> Sampler:
    import blackjax  # starts JAX's backend, which the settings choose
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation
    from blackjax.adaptation.step_size import dual_averaging_adaptation
    from blackjax.adaptation.window_adaptation import build_schedule

    kernel = blackjax.hmc.build_kernel()
    mass_init, mass_update, mass_final = mass_matrix_adaptation(is_diagonal_matrix=True)

    def init(rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        dual_init, _, _ = dual_averaging_adaptation(numbers["target_acceptance"])
        mass = jax.tree.map(jnp.asarray, mass_init(position.shape[0]))
        hmc = blackjax.hmc.init(position, posterior.logdensity_fn)
        step_size = numbers["step_size"]
        return State(hmc, step_size, mass.inverse_mass_matrix, dual_init(step_size), mass)

    def adapt(state: State, acceptance_rate: jax.Array, numbers: dict, index: jax.Array) -> State:
        """One step of Stan's warm-up schedule: fast windows adapt the step size, slow ones the mass matrix too."""
        dual_init, dual_update, dual_final = dual_averaging_adaptation(numbers["target_acceptance"])
        stage, window_ends = build_schedule(num_burnin_steps)[index]
        dual = dual_update(state.dual_averaging, acceptance_rate)
        mass = jax.lax.cond(stage == 1, lambda: mass_update(state.mass_matrix, state.position), lambda: state.mass_matrix)
        dual, mass = jax.lax.cond(
            window_ends == 1, lambda: (dual_init(dual_final(dual)), mass_final(mass)), lambda: (dual, mass)
        )
        last = index == num_burnin_steps - 1
        step_size = jnp.where(last, dual_final(dual), jnp.exp(dual.log_step_size))
        return State(state.hmc, step_size, mass.inverse_mass_matrix, dual, mass)

    def step(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        jitter_key, kernel_key = jax.random.split(rng_key)
        jitter = 1 + JITTER * jax.random.uniform(jitter_key, (), state.step_size.dtype, -1, 1)
        hmc, info = kernel(
            kernel_key,
            state.hmc,
            posterior.logdensity_fn,
            jitter * state.step_size,
            state.inverse_mass_matrix,
            num_integration_steps,
        )
        state = state._replace(hmc=hmc)
        state = jax.lax.cond(
            index < num_burnin_steps, lambda: adapt(state, info.acceptance_rate, numbers, index), lambda: state
        )
        difference = posterior.loss_difference(hmc.position, hmc.logdensity)
        return state, Info(difference, info.acceptance_rate, info.is_divergent.astype(difference.dtype))

    return Sampler(init, step)
