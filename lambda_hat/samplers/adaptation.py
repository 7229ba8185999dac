"""Stan's warm-up, shared by the samplers that adapt themselves: a step size and a diagonal mass matrix during burn-in.

The steps of burn-in are BlackJAX's schedule of Stan's: a fast window adapts the step size alone; slow windows, each twice as
long as the one before, also collect the variances that become the mass matrix at the window's end, where the step size starts
anew from where it got to; a last fast window adapts the step size to the final mass matrix. After burn-in nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.samplers.base import Info, Sampler, SamplerSpec
from lambda_hat.samplers.posterior import Posterior

#: Imaginary draws, all with the coordinates' mean variance, which a window's variances are mixed with. As in Stan, except that
#: Stan's have variance 1e-3, which supposes a posterior of unit scale; the ones here are narrower by orders of magnitude.
PRIOR_DRAWS = 5


class AdaptedSpec(SamplerSpec):
    """Fields of the Metropolis samplers on the whole data."""

    num_burnin_steps: int = Field(500, ge=20, description="adaptation steps, none of which enters an estimate")
    num_draws: int = Field(500, ge=4, description="recorded draws per chain, after burn-in")
    step_size: float = Field(1e-2, gt=0, description="step size at which adaptation starts")
    target_acceptance: float = Field(0.9, gt=0, lt=1, description="acceptance rate the step size is adapted to")


class StepRule(NamedTuple):
    """How a step size is found; `state` is a NamedTuple of arrays.

    init: step_size -> state. update: (state, signal, numbers) -> state, `signal` being what the transition reports.
    current: state -> the step size to try next. final: state -> the step size to keep.
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[Any, Any, dict], Any]
    current: Callable[[Any], jax.Array]
    final: Callable[[Any], jax.Array]


class Adaptation(NamedTuple):
    """step_size (); inverse_mass_matrix (d,), its diagonal; rule: the step rule's state; moments: of the window, Welford's."""

    step_size: jax.Array
    inverse_mass_matrix: jax.Array
    rule: Any
    moments: Any


class WarmUp(NamedTuple):
    """init: (position, step_size) -> Adaptation. update: (adaptation, position, signal, numbers, index) -> Adaptation."""

    init: Callable[[jax.Array, jax.Array], Adaptation]
    update: Callable[[Adaptation, jax.Array, Any, dict, jax.Array], Adaptation]


def warm_up(num_steps: int, rule: StepRule) -> WarmUp:
    """Stan's warm-up in the first `num_steps` steps; `update` does nothing after them."""
    from blackjax.adaptation.mass_matrix import welford_algorithm
    from blackjax.adaptation.window_adaptation import build_schedule

    welford_init, welford_update, welford_final = welford_algorithm(is_diagonal_matrix=True)

    def init(position: jax.Array, step_size: jax.Array) -> Adaptation:
        moments = jax.tree.map(jnp.asarray, welford_init(position.shape[0]))
        return Adaptation(step_size, jnp.ones_like(position), rule.init(step_size), moments)

    def end_window(adaptation: Adaptation) -> Adaptation:
        variances, count, _ = welford_final(adaptation.moments)
        step_size = rule.final(adaptation.rule)
        inverse_mass_matrix = (count * variances + PRIOR_DRAWS * jnp.mean(variances)) / (count + PRIOR_DRAWS)
        moments = jax.tree.map(jnp.zeros_like, adaptation.moments)
        return Adaptation(step_size, inverse_mass_matrix, rule.init(step_size), moments)

    def adapt(adaptation: Adaptation, position: jax.Array, signal: Any, numbers: dict, index: jax.Array) -> Adaptation:
        slow, window_ends = build_schedule(num_steps)[index]
        moments = adaptation.moments
        adaptation = adaptation._replace(
            rule=rule.update(adaptation.rule, signal, numbers),
            moments=jax.lax.cond(slow == 1, lambda: welford_update(moments, position), lambda: moments),
        )
        adaptation = jax.lax.cond(window_ends == 1, end_window, lambda adaptation: adaptation, adaptation)
        step_size = jnp.where(index == num_steps - 1, rule.final(adaptation.rule), rule.current(adaptation.rule))
        return adaptation._replace(step_size=step_size)

    def update(adaptation: Adaptation, position: jax.Array, signal: Any, numbers: dict, index: jax.Array) -> Adaptation:
        return jax.lax.cond(index < num_steps, lambda: adapt(adaptation, position, signal, numbers, index), lambda: adaptation)

    return WarmUp(init, update)


def dual_averaging() -> StepRule:
    """Dual averaging (Nesterov 2009; Hoffman & Gelman 2014) of the acceptance rate, the signal, to `target_acceptance`."""
    from blackjax.adaptation.step_size import dual_averaging_adaptation

    def update(state: Any, acceptance_rate: jax.Array, numbers: dict) -> Any:
        return dual_averaging_adaptation(numbers["target_acceptance"])[1](state, acceptance_rate)

    init, _, final = dual_averaging_adaptation(0.5)  # neither depends on the target
    return StepRule(init, update, lambda state: jnp.exp(state.log_step_size), final)


class State(NamedTuple):
    """chain: BlackJAX's state of the chain; adaptation: its step size and mass matrix, and what adapts them."""

    chain: Any
    adaptation: Adaptation

    @property
    def position(self) -> jax.Array:
        return self.chain.position


class Transition(NamedTuple):
    """What a Metropolis step reports: acceptance_rate, is_divergent, and work in full-data gradients."""

    acceptance_rate: jax.Array
    is_divergent: jax.Array
    work: jax.Array | float


def adapted_sampler(num_burnin_steps: int, init_chain: Callable[..., Any], transition: Callable[..., Any]) -> Sampler:
    """A Metropolis sampler on the whole data that adapts itself in burn-in.

    Args:
      init_chain: (position, logdensity_fn) -> chain, a NamedTuple with `position` and `logdensity`.
      transition: (rng_key, chain, logdensity_fn, step_size, inverse_mass_matrix, index) -> (chain, Transition).
    """
    adaptation = warm_up(num_burnin_steps, dual_averaging())

    def init(rng_key: jax.Array, position: jax.Array, posterior: Posterior, numbers: dict) -> State:
        chain = init_chain(position, posterior.logdensity_fn)
        return State(chain, adaptation.init(position, numbers["step_size"]))

    def step(rng_key: jax.Array, state: State, posterior: Posterior, numbers: dict, index: jax.Array) -> tuple[State, Info]:
        adapted = state.adaptation
        chain, report = transition(
            rng_key, state.chain, posterior.logdensity_fn, adapted.step_size, adapted.inverse_mass_matrix, index
        )
        adapted = adaptation.update(adapted, chain.position, report.acceptance_rate, numbers, index)
        difference = posterior.loss_difference(chain.position, chain.logdensity)
        acceptance_rate, is_divergent, work = (jnp.asarray(field).astype(difference.dtype) for field in report)
        return State(chain, adapted), Info(difference, acceptance_rate, is_divergent, work)

    return Sampler(init, step)
