"""The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996; BlackJAX), adapted during burn-in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.samplers.adaptation import AdaptedSpec, Transition, adapted_sampler
from lambda_hat.samplers.base import Sampler


class MalaSpec(AdaptedSpec):
    """Metropolis-adjusted Langevin on the whole data: SGLD's step, made exact.

    Proposes w - e s^2 grad U(w) + N(0, 2 e s^2) with e the step size and s^2 the inverse mass matrix, and accepts it by
    Metropolis and Hastings. Burn-in adapts e to `target_acceptance` and s as `hmc` does. 0.574 is optimal in many dimensions,
    but where valleys narrow the steps it allows are refused there for long stretches, so more is asked for.
    """

    kind: Literal["mala"] = "mala"
    num_burnin_steps: int = Field(20_000, ge=20, description="adaptation steps, none of which enters an estimate")
    num_draws: int = Field(1000, ge=4, description="recorded draws per chain, after burn-in")
    num_steps_bw_draws: int = Field(50, ge=1, description="steps per recorded draw; a draw averages their losses")
    step_size: float = Field(1e-4, gt=0, description="step size at which adaptation starts")
    target_acceptance: float = Field(0.8, gt=0, lt=1, description="acceptance rate the step size is adapted to")

    def gradients_per_step(self, num_data: int) -> float:
        return 1.0

    def algorithm(self) -> Sampler:
        return _build(self.num_burnin_steps)


@functools.cache
def _build(num_burnin_steps: int) -> Sampler:
    import blackjax  # starts JAX's backend, which the settings choose
    from blackjax.mcmc.mala import MALAState

    kernel = blackjax.mala.build_kernel()

    def transition(
        rng_key: jax.Array, chain: Any, logdensity_fn: Callable, step_size: jax.Array, inverse_mass_matrix: jax.Array,
        index: jax.Array,
    ) -> tuple[Any, Transition]:  # fmt: skip
        # BlackJAX's kernel has no mass matrix: it moves z = w / s, whose gradients are s times those of w.
        s = jnp.sqrt(inverse_mass_matrix)
        scaled = MALAState(chain.position / s, chain.logdensity, s * chain.logdensity_grad)
        z, info = kernel(rng_key, scaled, lambda z: logdensity_fn(s * z), step_size)
        moved = MALAState(s * z.position, z.logdensity, z.logdensity_grad / s)
        # A rejected proposal leaves the position itself, not its rounding through z.
        chain = jax.tree.map(lambda new, old: jnp.where(info.is_accepted, new, old), moved, chain)
        return chain, Transition(info.acceptance_rate, ~jnp.isfinite(chain.logdensity), 1.0)

    return adapted_sampler(num_burnin_steps, blackjax.mala.init, transition)
