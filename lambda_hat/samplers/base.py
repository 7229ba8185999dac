"""What every sampler shares: the fields of its spec and the two functions it is made of.

Conventions (one place for all): samplers move the offset u from w*, with potential
U(u) = nbeta (L_n(w) - L_n(w*)) + localization/2 |u|^2; the density sampled is exp(-U). Langevin samplers drift by
step_size * grad U and add noise of variance 2 * step_size (BlackJAX's convention; others write step_size/2 and step_size).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Self

import jax
from pydantic import Field, model_validator

from lambda_hat.specs.spec import Spec

#: A step size in the convention above, or "auto": found during burn-in.
StepSize = Annotated[float, Field(gt=0)] | Literal["auto"]


#: Steps are counted in 32 bits.
MAX_STEPS = 2**30


class SamplerSpec(Spec):
    """Fields of all samplers. In a sampler's own fields, floats are traced (changing one never recompiles);
    integers, booleans and names are static."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of the chains")
    num_chains: int = Field(4, ge=1, description="independent chains, all started at w*")
    num_draws: int = Field(1000, ge=4, description="recorded draws per chain, after burn-in")
    num_burnin_steps: int = Field(1000, ge=0, description="steps before the first draw, rounded up to whole draws")
    num_steps_bw_draws: int = Field(1, ge=1, description="steps per recorded draw (thinning)")
    observables: tuple[str, ...] = Field(
        (), description='datasets of the target whose per-sample losses are recorded at every draw, like "train" or "test"'
    )

    @model_validator(mode="after")
    def _steps_are_counted(self) -> Self:
        steps = (self.num_burnin_draws + self.num_draws) * self.num_steps_bw_draws
        if steps > MAX_STEPS:
            raise ValueError(
                f"a chain has at most {MAX_STEPS} steps; num_burnin_steps={self.num_burnin_steps}, num_draws={self.num_draws} "
                f"and num_steps_bw_draws={self.num_steps_bw_draws} are {steps}: lower them"
            )
        return self

    @property
    def num_burnin_draws(self) -> int:
        """Draws' worth of burn-in, shown apart in the plots and never part of an estimate."""
        return -(-self.num_burnin_steps // self.num_steps_bw_draws)

    def numbers(self) -> dict[str, float]:
        """The fields that are traced: every float."""
        return {name: value for name, value in self if isinstance(value, float)}

    def static(self) -> SamplerSpec:
        """This spec with traced fields, the seed, the length and the observables at fixed values: the key of the program."""
        fixed: dict[str, Any] = dict.fromkeys(self.numbers(), 0.0)
        return self.model_copy(update=fixed | {"seed": 0, "num_draws": 4, "observables": ()})

    def gradients_per_step(self, num_data: int) -> float:
        """Work of one step of one chain in full-data gradients (FGE)."""
        raise TypeError(f"{type(self).__name__} does not state its work")

    def algorithm(self) -> Sampler:
        """The sampler with this spec's static fields; the same object for equal ones."""
        raise TypeError(f"{type(self).__name__} has no algorithm")

    def fge(self, num_data: int) -> float:
        """Work of the whole run in full-data gradient equivalents: all chains and burn-in, but not what is evaluated for
        observables and eval_every."""
        steps = (self.num_burnin_draws + self.num_draws) * self.num_steps_bw_draws
        return self.num_chains * steps * self.gradients_per_step(num_data)


class Info(NamedTuple):
    """What one step reports; each field a scalar per chain, in the chain's dtype.

    loss_difference: L(w) - L(w*), paired: on the whole data, or an unbiased estimate on the step's minibatch.
    acceptance_rate: Metropolis acceptance probability; of trials, for samplers on minibatches; 1 for those without any.
    is_divergent: 1 where the step failed (non-finite state or energy error too large), else 0.
    work: full-data gradient equivalents (FGE) of the step.
    """

    loss_difference: jax.Array
    acceptance_rate: jax.Array
    is_divergent: jax.Array
    work: jax.Array


class Sampler(NamedTuple):
    """An algorithm as two pure functions of one chain.

    init: (rng_key, position, posterior, numbers) -> state; the state has a field `position`, shape (d,).
    step: (rng_key, state, posterior, numbers, index) -> (state, Info); `index` counts steps from 0, burn-in included.
    extras: names of scalar attributes of the state that are recorded at each draw.
    pool: (step, function): before the first draw from this step on, the states of a run's chains, leaves (chain, ...), are
      replaced by the function of them: what chains learn from each other in burn-in.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Info]]
    extras: tuple[str, ...] = ()
    pool: tuple[int, Callable[[Any], Any]] | None = None
