"""Hamiltonian Monte Carlo (BlackJAX), its step size and diagonal mass matrix adapted during burn-in as Stan does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.samplers.adaptation import AdaptedSpec, Transition, adapted_sampler
from lambda_hat.samplers.base import Sampler


class HmcSpec(AdaptedSpec):
    """Hamiltonian Monte Carlo on the whole data, adapted during burn-in.

    Leapfrog trajectories, Metropolis-corrected: exact up to Monte Carlo error. Their number of steps runs from 1 to
    2 num_integration_steps - 1: with a fixed one, a Gaussian direction whose period divides the length would never move.
    Burn-in adapts the step size to `target_acceptance` by dual averaging and the diagonal mass matrix in Stan's windows.
    """

    kind: Literal["hmc"] = "hmc"
    num_draws: int = Field(1000, ge=4, description="recorded draws per chain, after burn-in")
    num_integration_steps: int = Field(20, ge=1, description="leapfrog steps per trajectory on average")

    def gradients_per_step(self, num_data: int) -> float:
        return float(self.num_integration_steps)

    def algorithm(self) -> Sampler:
        return _build(self.num_integration_steps, self.num_burnin_steps)


def trajectory_length(index: jax.Array, mean: int) -> jax.Array:
    """Steps of the trajectory number `index`: 1 to 2 mean - 1, evenly over any stretch of numbers, `mean` on average.

    Quasi-random (Halton's sequence) in the trajectory's number and not in a chain's key: chains that run side by side on a
    device then need equally many steps.
    """
    from blackjax.mcmc.dynamic_hmc import halton_trajectory_length

    # The sequence's one value of exactly 0 would round to no step at all.
    return jnp.maximum(halton_trajectory_length(index, mean), 1)


@functools.cache
def _build(num_integration_steps: int, num_burnin_steps: int) -> Sampler:
    import blackjax  # starts JAX's backend, which the settings choose

    kernel = blackjax.hmc.build_kernel()

    def transition(
        rng_key: jax.Array, chain: Any, logdensity_fn: Callable, step_size: jax.Array, inverse_mass_matrix: jax.Array,
        index: jax.Array,
    ) -> tuple[Any, Transition]:  # fmt: skip
        length = trajectory_length(index, num_integration_steps)
        chain, info = kernel(rng_key, chain, logdensity_fn, step_size, inverse_mass_matrix, length)
        return chain, Transition(info.acceptance_rate, info.is_divergent, length)

    return adapted_sampler(num_burnin_steps, blackjax.hmc.init, transition)
