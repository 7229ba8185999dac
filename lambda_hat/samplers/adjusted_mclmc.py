"""Microcanonical Hamiltonian Monte Carlo with a Metropolis correction (BlackJAX; arXiv 2503.01707), adapted during burn-in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.samplers.adaptation import AdaptedSpec, Transition, adapted_sampler
from lambda_hat.samplers.base import Sampler
from lambda_hat.samplers.hmc import trajectory_length
from lambda_hat.samplers.mclmc import GRADIENTS_PER_STEP


class AdjustedMclmcSpec(AdaptedSpec):
    """Microcanonical trajectories on the whole data, Metropolis-corrected: MCLMC without its bias.

    Each step draws a direction of unit length and follows the isokinetic dynamics for 1 to 2 num_integration_steps - 1 steps of
    step_size sqrt(d), num_integration_steps on average. Adapted in burn-in as `hmc` is.
    """

    kind: Literal["adjusted_mclmc"] = "adjusted_mclmc"
    num_integration_steps: int = Field(10, ge=1, description="integrator steps per trajectory on average, two gradients each")

    def gradients_per_step(self, num_data: int) -> float:
        return GRADIENTS_PER_STEP * self.num_integration_steps

    def algorithm(self) -> Sampler:
        return _build(self.num_integration_steps, self.num_burnin_steps)


@functools.cache
def _build(num_integration_steps: int, num_burnin_steps: int) -> Sampler:
    import blackjax  # starts JAX's backend, which the settings choose

    kernel = blackjax.adjusted_mclmc.build_kernel()

    def transition(
        rng_key: jax.Array, chain: Any, logdensity_fn: Callable, step_size: jax.Array, inverse_mass_matrix: jax.Array,
        index: jax.Array,
    ) -> tuple[Any, Transition]:  # fmt: skip
        length = trajectory_length(index, num_integration_steps)
        # The momentum has unit length however many dimensions; in HMC's units, so that both start alike, it is sqrt(d) long.
        step_size = step_size * jnp.sqrt(jnp.asarray(chain.position.size, step_size.dtype))
        chain, info = kernel(rng_key, chain, logdensity_fn, step_size, (length,), inverse_mass_matrix)
        return chain, Transition(info.acceptance_rate, info.is_divergent, GRADIENTS_PER_STEP * length)

    return adapted_sampler(num_burnin_steps, blackjax.adjusted_mclmc.init, transition)
