"""The No-U-Turn sampler (Hoffman & Gelman 2014; BlackJAX's iterative, multinomial version), adapted during burn-in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from pydantic import Field

from lambda_hat.samplers.adaptation import AdaptedSpec, Transition, adapted_sampler
from lambda_hat.samplers.base import Sampler

#: Doublings of a typical trajectory once adapted, for the plan's estimate of the work.
TYPICAL_DOUBLINGS = 6


class NutsSpec(AdaptedSpec):
    """The No-U-Turn sampler on the whole data: HMC whose trajectories find their own length.

    A trajectory doubles until it turns back on itself or has 2^max_num_doublings - 1 leapfrog steps; the draw is chosen among
    its points so that the posterior is kept exactly. Burn-in adapts as `hmc` does. The work is known only afterwards.
    """

    kind: Literal["nuts"] = "nuts"
    num_burnin_steps: int = Field(300, ge=20, description="adaptation steps, none of which enters an estimate")
    num_draws: int = Field(250, ge=4, description="recorded draws per chain, after burn-in")
    target_acceptance: float = Field(0.8, gt=0, lt=1, description="acceptance rate the step size is adapted to")
    max_num_doublings: int = Field(7, ge=1, le=12, description="most doublings of a trajectory")

    def gradients_per_step(self, num_data: int) -> float:
        return float(2 ** min(TYPICAL_DOUBLINGS, self.max_num_doublings) - 1)

    def algorithm(self) -> Sampler:
        return _build(self.max_num_doublings, self.num_burnin_steps)


@functools.cache
def _build(max_num_doublings: int, num_burnin_steps: int) -> Sampler:
    import blackjax  # starts JAX's backend, which the settings choose

    kernel = blackjax.nuts.build_kernel()

    def transition(
        rng_key: jax.Array, chain: Any, logdensity_fn: Callable, step_size: jax.Array, inverse_mass_matrix: jax.Array,
        index: jax.Array,
    ) -> tuple[Any, Transition]:  # fmt: skip
        chain, info = kernel(rng_key, chain, logdensity_fn, step_size, inverse_mass_matrix, max_num_doublings)
        return chain, Transition(info.acceptance_rate, info.is_divergent, info.num_integration_steps)

    return adapted_sampler(num_burnin_steps, blackjax.nuts.init, transition)
