"""What to change when a run is not as it should be, in the fields of its own sampler and target."""

from __future__ import annotations

from typing import Any

from lambda_hat.llc.run import RunSpec
from lambda_hat.samplers.kinds import AnySamplerSpec

#: Measured degrees of a loss below the first are of one with a kink at w*, and then as low as that of its sharpest directions;
#: below the second of one with kinks near w*, like absolute errors, which rises more slowly in some directions than in others.
KINKED_DEGREE, SMOOTH_DEGREE = 1.75, 1.95
KINK_DEGREE, SPREAD = 1.0, 0.25


def bounding_degree(measured: float) -> float:
    """The degree k for which d/k bounds the llc of a loss that rises from w* with the degree `measured`, on average."""
    if measured <= KINKED_DEGREE:
        return min(measured, KINK_DEGREE)
    return 2.0 if measured > SMOOTH_DEGREE else measured - SPREAD


def above_any_minimum(degree: float) -> str:
    """The verdict on an llc above d/k."""
    return "llc above d/2" if degree == 2 else "llc above d" if degree == 1 else f"llc above d/{degree:.2g}"


def remedies_for(spec: RunSpec, star_is_finite: bool, degree: float = 2.0) -> dict[str, str]:
    """The remedy for each verdict, worst verdict first.

    Args:
      star_is_finite: whether the loss at w* is. degree: `bounding_degree` of the loss.
    """
    sampler = spec.sampler
    finer, or_faster = _finer(sampler), _or_faster(sampler)
    stable = finer if "step_size" in finer or not hasattr(sampler, "step_size") else f"{finer}, or lower sampler.step_size"
    star = "the loss at w* is not finite: check the loss, the parameters and the data"
    if hasattr(spec.target, "training"):
        star = "the loss at w* is not finite: lower training.learning_rate"
        minimum = "w* is not a minimum of the loss: raise training.num_steps, or raise posterior.localization to stay near it"
    elif spec.target.family in ("custom", "in_memory"):
        minimum = "w* is not a minimum of the loss: train it longer, or raise posterior.localization to stay near it"
    else:
        minimum = "w* is an exact minimum here, so this is rounding: set target.precision=float64"
    return {
        "diverged": stable if star_is_finite else star,
        "nan chains": f"the other chains are kept, but are as doubtful: {stable}",
        "temperature jumped": "burn-in ended before t reached 1, so the particles are not the posterior's: "
        "raise sampler.num_burnin_steps or sampler.num_particles",
        "divergent steps": f"the integrator fails in part of the posterior: {finer}, or raise posterior.localization",
        "negative llc": minimum,
        above_any_minimum(degree): f"no minimum has such a one: the steps are too coarse, {finer}; "
        "or draws leave w*, raise posterior.localization",
        "loss below w*": minimum,
        "poor approximation": "the posterior is no Gaussian of this kind, and the llc not the posterior's: "
        "raise sampler.rank, or use a sampler that draws from the posterior itself (hmc, nuts)",
        "losses disagree": "a sample's loss depends on its batch, or rounding hides the difference of losses: "
        "raise sampler.batch_size, or set target.precision=float64",
        "noisy gradients": f"the noise of minibatches heats the chains, and raises the llc: {_quieter(spec)}",
        "steps too long": "the error that the length of the step makes biases the llc: "
        + ("raise sampler.num_burnin_steps to search the step size longer, or " if _of(sampler, "step_size") == "auto" else "")
        + finer,
        "rising trace": f"the chains have not reached their posterior: raise sampler.num_burnin_steps{or_faster}",
        "falling trace": f"the chains have not settled: raise sampler.num_burnin_steps{or_faster}",
        "over-localised": "the llc is mostly the prior's: lower posterior.localization, or raise posterior.nbeta",
        "chains disagree": f"raise sampler.num_burnin_steps and sampler.num_draws{or_faster}; "
        "raise posterior.localization if the chains stay apart",
        "too few draws": f"raise sampler.num_draws{or_faster}",
        "low acceptance": f"{finer}, or raise sampler.num_burnin_steps to tune the step size longer",
    }


def _of(sampler: AnySamplerSpec, field: str) -> Any:
    """A field that not all samplers have; None for one that has not."""
    return getattr(sampler, field, None)


def _finer(sampler: AnySamplerSpec) -> str:
    """How this sampler follows its posterior more closely."""
    if _of(sampler, "step_size") == "auto":
        return "set sampler.step_size to less than the one found"
    ways = {"target_acceptance": "raise", "desired_energy_var": "lower", "step_size": "lower", "learning_rate": "lower"}
    field = next(field for field in ways if hasattr(sampler, field))
    return f"{ways[field]} sampler.{field}"


def _quieter(spec: RunSpec) -> str:
    """How the noise of this sampler's minibatches is made to matter less."""
    sampler, ways = spec.sampler, [_finer(spec.sampler)]
    if _of(sampler, "gradient") == "plain":
        ways.insert(0, "set sampler.gradient=control_variates")
    if (_of(sampler, "batch_size") or 0) < spec.target.num_data:
        ways.insert(0, "raise sampler.batch_size")
    return ", or ".join(ways)


def _or_faster(sampler: AnySamplerSpec) -> str:
    """How this sampler gets further between draws; nothing for draws that are independent anyway."""
    if sampler.kind == "vi":
        return ""
    if hasattr(sampler, "num_integration_steps"):
        return ", or raise sampler.num_integration_steps"
    if hasattr(sampler, "batch_size") and _of(sampler, "step_size") != "auto":
        return ", or raise sampler.step_size as far as the llc stays the same"
    return ", or raise sampler.num_steps_bw_draws"
