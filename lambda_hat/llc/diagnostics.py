"""What a run's draws say: the llc with its error, the work it took, and a verdict with its remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import chi2

from lambda_hat.llc import observables
from lambda_hat.llc.estimates import (
    MIN_DRAWS,
    Estimate,
    Sensitivity,
    estimate,
    finite_chains,
    llc_draws,
    mcse,
    nbeta_sensitivity,
    pareto_k,
    rhat,
)
from lambda_hat.llc.observables import Measure
from lambda_hat.llc.remedies import above_any_minimum, bounding_degree, remedies_for
from lambda_hat.llc.run import RunSpec
from lambda_hat.llc.trace import Trace
from lambda_hat.specs.text import PRIOR_SHARE
from lambda_hat.targets.target import TRAIN

#: Of the steps after burn-in. A few are an integrator's bad luck; from about here on whole regions of the posterior are missed.
MAX_DIVERGENT = 0.01
#: Standard errors by which a number must be off before it is called off; for the llc's sign two, as a 95 % interval.
SIGN_ERRORS, CLEAR_ERRORS = 2.0, 3.0
#: Relative to the llc; smaller shifts matter to nobody and a long enough run makes any shift significant.
RELEVANT = 0.05
#: The quantile of the (block-averaged) llc trace that must not lie below 0: a tenth of the run is no accident.
LOW_QUANTILE = 0.10
#: Blocks of a chain over which minibatch noise is averaged before that: as many as give a 10 % quantile of four chains.
NUM_BLOCKS = 20
#: Of nbeta_sensitivity and of the directions held by localisation: more than half is the prior's.
OVER_LOCALIZED = 0.5
#: Vehtari et al. 2021. They ask for an ESS of at least 400 with it, where this is about R-hat's mean among chains that agree.
MAX_RHAT = 1.01
#: With fewer effective draws R-hat is above that by chance, so it must also be beyond this quantile among chains that agree.
RHAT_QUANTILE = 0.999
#: Standard errors from fewer effective draws are over a tenth of the posterior's own width and are themselves unreliable.
MIN_ESS = 100
#: Weights with a heavier tail than this cannot correct an approximation (Vehtari et al. 2024, arXiv 1507.02646).
MAX_PARETO_K = 0.7
#: Of the Langevin trials of samplers on minibatches, which show the error of the step's length: on a very singular loss sgld at
#: 0.86 was 1.4 % off, sghmc at 0.58 27 %. Errors of first order in the step (Euler's, Adam's lag) matter sooner.
MIN_TRIAL_ACCEPTANCE, MIN_FIRST_ORDER_ACCEPTANCE = 0.8, 0.9
#: Acceptance rates of 0.57 (MALA) and 0.65 (HMC) are optimal; here a Metropolis sampler has lost about half its efficiency.
MIN_ACCEPTANCE = 0.4


class Finding(BaseModel):
    """Something wrong with a run (a short, stable name), and what to change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: str
    remedy: str


class DatasetEstimate(BaseModel):
    """What the draws say of one observable dataset D, with Monte Carlo standard errors.

    llc: nbeta (E[L_D(w)] - L_D(w*)), dimensionless; negative where the posterior is better on D than w* is.
    sample_error: standard error of llc as an estimate for all the data that D's samples are from: their spread / sqrt(number).
    susceptibility: -Cov[L_n, L_D - L_n] (`llc.observables.susceptibilities`), nats^2; None where L_n, on all the data,
      was not recorded at the draws themselves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_samples: int
    llc: float
    mcse: float | None
    sample_error: float | None
    susceptibility: float | None
    susceptibility_mcse: float | None


class Diagnosis(Estimate):
    """The pooled estimate (`Estimate`'s fields, over the chains kept) with all that is said of it; None = no such number.

    chains: each chain's own estimate; all None for a chain that is not kept. llc_per_chain: their llc.
    chains_kept of num_chains: how many chains held no NaN or infinity, burn-in included. Only these enter pooled numbers.
    rhat: rank-normalised split R-hat of the llc draws.
    true_llc: exact value as a number, true_llc_text: as a fraction. relative_error: (llc - true_llc) / true_llc.
    nbeta_sensitivity: d log(llc) / d log(nbeta), 0 where the loss and 1 where localisation shapes the posterior.
    full_llc: the llc from losses on all the data, where a minibatch sampler evaluated them.
    wbic, free_energy: in nats, of the localised model (`llc.observables`); no free energy where the temperature jumped.
    singular_fluctuation: nu, dimensionless.
    llc_by_dataset: of each observable that was followed.
    pareto_k: k-hat of a variational approximation's importance weights, the worst chain's (Vehtari et al. 2024).
    metrics: every number that was measured of the target and has no name of its own here: losses and accuracies.
    fge: work in full-data gradient equivalents, all chains, tuning and burn-in included; evaluations for observables and
      eval_every are not counted. seconds: of sampling, all of these included.
    compile_seconds: of compiling, not part of seconds.
    ess_per_fge, ess_per_second: with ess_bulk. work_normalized_variance: mcse^2 fge, the same however long the run.
    prior_share: how much of the llc localisation holds back, 0 to 1: the smaller of nbeta_sensitivity and of the mean of
      localization |u|^2 / d, which both are that in a regular model; flat directions raise the second, a run that has not
      reached its posterior the first.
    findings: everything wrong, worst first. verdict, remedy: the first of them; "ok" and "" if there is none.
    notes: what is not wrong and should be known, in sentences.
    """

    llc_per_chain: tuple[float | None, ...]
    chains: tuple[Estimate, ...]
    chains_kept: int
    num_chains: int
    rhat: float | None
    true_llc: float | None
    true_llc_text: str | None
    relative_error: float | None
    nbeta_sensitivity: float | None
    nbeta_sensitivity_mcse: float | None
    prior_share: float | None
    full_llc: float | None
    full_llc_mcse: float | None
    wbic: float | None
    wbic_mcse: float | None
    free_energy: float | None
    free_energy_mcse: float | None
    singular_fluctuation: float | None
    singular_fluctuation_mcse: float | None
    llc_by_dataset: dict[str, DatasetEstimate]
    pareto_k: float | None
    metrics: dict[str, float]
    init_loss: float | None
    num_params: int
    num_data: int
    nbeta: float
    fge: float
    seconds: float
    compile_seconds: float
    ess_per_fge: float | None
    ess_per_second: float | None
    work_normalized_variance: float | None
    verdict: str
    remedy: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: finite numbers, text, lists, objects and None; `Diagnosis.model_validate` reads it back."""
        return self.model_dump(mode="json")


def diagnose(spec: RunSpec, trace: Trace, target_metrics: Mapping[str, Any]) -> Diagnosis:
    """The estimate and the verdict of a run; of draws after burn-in alone.

    Args:
      target_metrics: the target's `metrics`: init_loss, num_params, num_data and, where known, true_llc as text like "13/2".
    """
    kept = np.flatnonzero(finite_chains(trace))
    num_chains = len(trace.draws["loss_difference"])
    chains = tuple(estimate(trace, spec.nbeta, [c] if c in kept else []) for c in range(num_chains))
    pooled = estimate(trace, spec.nbeta, kept)
    llc = llc_draws(trace, spec.nbeta)[kept, trace.num_burnin_draws :]
    sensitivity = _sensitivity(spec, trace, llc) if len(kept) else None
    init_loss = target_metrics["init_loss"]
    init_loss = init_loss if init_loss is not None and math.isfinite(init_loss) else None
    true_text = target_metrics.get("true_llc")
    true_llc = None if true_text is None else float(Fraction(true_text))
    seconds = trace.seconds["sampling"]
    numbers = Diagnosis(
        **dict(pooled),
        llc_per_chain=tuple(chain.llc for chain in chains),
        chains=chains,
        chains_kept=len(kept),
        num_chains=num_chains,
        rhat=rhat(llc),
        true_llc=true_llc,
        true_llc_text=true_text,
        relative_error=_ratio(None if pooled.llc is None or true_llc is None else pooled.llc - true_llc, true_llc),
        nbeta_sensitivity=None if sensitivity is None else sensitivity.value,
        nbeta_sensitivity_mcse=None if sensitivity is None else sensitivity.mcse,
        prior_share=_prior_share(spec, trace, sensitivity, target_metrics["num_params"]),
        **_beyond_llc(spec, trace, pooled, init_loss),
        llc_by_dataset=_by_dataset(spec, trace),
        pareto_k=_worst_k(trace),
        metrics=_other_metrics(target_metrics),
        init_loss=init_loss,
        num_params=target_metrics["num_params"],
        num_data=target_metrics["num_data"],
        nbeta=spec.nbeta,
        fge=trace.fge,
        seconds=seconds,
        compile_seconds=trace.seconds["compile"],
        ess_per_fge=_ratio(pooled.ess_bulk, trace.fge),
        ess_per_second=_ratio(pooled.ess_bulk, seconds),
        work_normalized_variance=None if pooled.mcse is None else pooled.mcse**2 * trace.fge,
        verdict="ok",
        remedy="",
        findings=(),
        notes=(),
    )
    degree = bounding_degree(target_metrics.get("loss_degree", 2.0))
    verdicts = _verdicts(spec, trace, numbers, degree)
    remedies = remedies_for(spec, star_is_finite=numbers.init_loss is not None, degree=degree)
    findings = tuple(Finding(verdict=name, remedy=remedy) for name, remedy in remedies.items() if name in verdicts)
    found = {**dict(findings[0]), "findings": findings} if findings else {}
    return numbers.model_copy(update={**found, "notes": _notes(spec, numbers)})


def _notes(spec: RunSpec, numbers: Diagnosis) -> tuple[str, ...]:
    notes = []
    if numbers.prior_share is not None and numbers.prior_share > PRIOR_SHARE:
        llc = (
            f", which would be about {numbers.llc / (1 - numbers.prior_share):.3g} without localisation" if numbers.llc else ""
        )
        notes.append(f"the prior holds {numbers.prior_share:.0%} of the llc{llc}")
    if doubt := spec.posterior.doubt(spec.target.num_data):
        notes.append(doubt)
    return tuple(notes)


def _sensitivity(spec: RunSpec, trace: Trace, llc: np.ndarray) -> Sensitivity | None:
    if hasattr(spec.sampler, "num_particles"):
        return None  # a draw of a system of particles is their mean, whose variance is not that of the loss
    squares = trace.posterior_draws("loss_square")[finite_chains(trace)].astype(np.float64) * spec.nbeta**2
    return nbeta_sensitivity(llc, spec.sampler.num_steps_bw_draws, None if hasattr(spec.sampler, "batch_size") else squares)


def _prior_share(spec: RunSpec, trace: Trace, sensitivity: Sensitivity | None, num_params: int) -> float | None:
    """`Diagnosis.prior_share`; None where the sensitivity is not known, 0 where it is within its error of none."""
    if sensitivity is None:
        return None
    if sensitivity.value - SIGN_ERRORS * sensitivity.mcse < 0:
        return 0.0
    held = spec.posterior.localization / num_params * trace.posterior_draws("squared_distance")[finite_chains(trace)]
    return max(0.0, min(sensitivity.value, float(np.mean(held, dtype=np.float64))))


def _beyond_llc(spec: RunSpec, trace: Trace, pooled: Estimate, init_loss: float | None) -> dict[str, float | None]:
    """Fields of `Diagnosis` that need more than the llc's draws, each with its error; None where the trace has none of it."""
    nbeta, num_data = spec.nbeta, spec.target.num_data
    found: dict[str, Measure | None] = dict.fromkeys(("full_llc", "wbic", "free_energy", "singular_fluctuation"))
    if (full := observables.recorded(trace, "full_difference")) is not None:
        found["full_llc"] = observables.scaled_mean(full, nbeta)
    if init_loss is not None and pooled.llc is not None:
        llc = found["full_llc"] or Measure(pooled.llc, pooled.mcse)
        found["wbic"] = observables.wbic(llc, nbeta, num_data, init_loss)
        log_normalizer = observables.recorded(trace, "log_normalizer")
        if log_normalizer is not None and not _jumped(spec, trace):
            found["free_energy"] = observables.free_energy(log_normalizer[:, -1], nbeta, init_loss)
    observed = observables.recorded(trace, "observed")
    part = observables.blocks(trace.observables).get(TRAIN)
    if observed is not None and part is not None:
        found["singular_fluctuation"] = observables.singular_fluctuation(observed[:, :, part], nbeta, num_data)
    fields: dict[str, float | None] = {}
    for name, measure in found.items():
        fields |= {name: None, f"{name}_mcse": None} if measure is None else {name: measure.value, f"{name}_mcse": measure.mcse}
    return fields


def _by_dataset(spec: RunSpec, trace: Trace) -> dict[str, DatasetEstimate]:
    observed = observables.recorded(trace, "observed")
    if observed is None:
        return {}
    estimates = {}
    losses = observables.block_losses(observed, trace.observables)
    response = _susceptibilities(spec, trace)
    for index, (name, part) in enumerate(observables.blocks(trace.observables).items()):
        by_sample = spec.nbeta * np.mean(observed[:, :, part], axis=(0, 1))
        llc = observables.scaled_mean(losses[:, :, index], spec.nbeta)
        # That of the training data to themselves is zero by definition.
        chi = [_finite(values[index]) for values in response] if response is not None and name != TRAIN else [None] * 2
        estimates[name] = DatasetEstimate(
            num_samples=len(by_sample),
            llc=llc.value,
            mcse=llc.mcse,
            sample_error=float(np.std(by_sample, ddof=1)) / math.sqrt(len(by_sample)) if len(by_sample) > 1 else None,
            susceptibility=chi[0],
            susceptibility_mcse=chi[1],
        )
    return estimates


def _susceptibilities(spec: RunSpec, trace: Trace) -> observables.Matrix | None:
    """Those of the observables, or None where no draw has its own loss on all the data."""
    sampler = spec.sampler
    if hasattr(sampler, "batch_size"):
        field = "full_difference"
    elif sampler.num_steps_bw_draws == 1 and not hasattr(sampler, "num_particles"):
        field = "loss_difference"  # not averaged over steps or particles
    else:
        return None
    found = observables.recorded_together(trace, field, "observed")
    return (
        None if found is None else observables.susceptibilities(found[0], observables.block_losses(found[1], trace.observables))
    )


def _worst_k(trace: Trace) -> float | None:
    weights = observables.recorded(trace, "log_weight")
    return None if weights is None else max((k for k in map(pareto_k, weights) if k is not None), default=None)


def _other_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}
    return {name: float(value) for name, value in numbers.items() if name not in Diagnosis.model_fields}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _ratio(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None


def _verdicts(spec: RunSpec, trace: Trace, numbers: Diagnosis, degree: float) -> set[str]:
    """Everything wrong with the run, as keys of `remedies_for`. degree: with which the loss rises from w*."""
    if numbers.llc is None or numbers.acceptance_rate is None:  # both without a chain that is kept
        return {"diverged"}
    kept = finite_chains(trace)
    llc = llc_draws(trace, spec.nbeta)[kept, trace.num_burnin_draws :]
    error = numbers.mcse or 0.0
    drift = _drift(llc)
    share = spec.posterior.localization / numbers.num_params
    jumped, minibatches = _jumped(spec, trace), hasattr(spec.sampler, "batch_size")
    held = share * trace.posterior_draws("squared_distance")[kept].astype(np.float64)
    tests = {
        "nan chains": numbers.chains_kept < numbers.num_chains,
        "temperature jumped": jumped,
        "divergent steps": not jumped and numbers.divergences > MAX_DIVERGENT * llc.size * spec.sampler.num_steps_bw_draws,
        "negative llc": numbers.llc + SIGN_ERRORS * error < 0,
        # A loss of degree k, L(w* + a v) ~ a^k, has an llc of at most d/k.
        above_any_minimum(degree): numbers.llc - CLEAR_ERRORS * error > (1 + RELEVANT) * numbers.num_params / degree,
        "loss below w*": _below_star(llc, minibatches),
        "poor approximation": numbers.pareto_k is not None and numbers.pareto_k > MAX_PARETO_K,
        "losses disagree": _losses_disagree(spec, trace),
        "noisy gradients": _noise_excess(spec, trace) > RELEVANT * abs(numbers.llc),
        "steps too long": minibatches and numbers.acceptance_rate < _trial_limit(spec),
        "rising trace": drift > 0,
        "falling trace": drift < 0,
        # By the virial theorem E[localization |w-w*|^2] / d is the fraction of directions that localisation holds. It is
        # large for every singular target whose flat directions are explored, so it says nothing alone. But it is at least the
        # sensitivity in a run that got to its posterior, and small in one still on its way, whose sensitivity is wrong.
        "over-localised": numbers.nbeta_sensitivity is not None
        and numbers.nbeta_sensitivity - SIGN_ERRORS * (numbers.nbeta_sensitivity_mcse or 0.0) > OVER_LOCALIZED
        and float(np.mean(held)) - SIGN_ERRORS * (mcse(held) or 0.0) > OVER_LOCALIZED,
        "chains disagree": numbers.rhat is not None and numbers.rhat > _rhat_limit(numbers.chains),
        "too few draws": numbers.ess_bulk is None or numbers.ess_bulk < MIN_ESS,
        "low acceptance": not minibatches and numbers.acceptance_rate < MIN_ACCEPTANCE,
    }
    return {verdict for verdict, holds in tests.items() if holds}


def _losses_disagree(spec: RunSpec, trace: Trace) -> bool:
    """Whether losses on minibatches and on all the data, at the same draws, have different means.

    Both estimate L_n(w) - L_n(w*), and their errors go together: their difference is tested, not the two estimates.
    """
    found = observables.recorded_together(trace, "loss_difference", "full_difference")
    if found is None or not hasattr(spec.sampler, "batch_size"):
        return False
    losses, full = found
    off = observables.scaled_mean(losses - full, 1.0)
    return off.mcse is not None and abs(off.value) > max(CLEAR_ERRORS * off.mcse, RELEVANT * abs(float(np.mean(full))))


def _jumped(spec: RunSpec, trace: Trace) -> bool:
    """Whether particles came to t = 1 by a jump, in any system that is kept: then each of its later steps is divergent."""
    failed = trace.posterior_draws("is_divergent")[finite_chains(trace)] >= spec.sampler.num_steps_bw_draws
    return hasattr(spec.sampler, "num_particles") and bool(np.any(np.all(failed, axis=1)))


def _noise_excess(spec: RunSpec, trace: Trace) -> float:
    """By how much the noise of minibatches raises the llc, as measured by the trials; 0 where a thermostat takes it back."""
    if spec.sampler.kind not in ("sgld", "sghmc"):
        return 0.0
    found = observables.recorded(trace, "noise_excess")
    return 0.0 if found is None else float(np.mean(found))


def _trial_limit(spec: RunSpec) -> float:
    """The lowest acceptance rate of trials at which the error of the step's length does not matter."""
    sampler = spec.sampler
    first_order = sampler.kind == "sgld" and (sampler.integrator == "euler" or sampler.preconditioner == "adam")
    return MIN_FIRST_ORDER_ACCEPTANCE if first_order else MIN_TRIAL_ACCEPTANCE


def _drift(llc: np.ndarray) -> float:
    """Last third minus first third of the chains' draws, (chains, draws), or 0 where that is within its error or irrelevant."""
    third = llc.shape[1] // 3
    if third < MIN_DRAWS:
        return 0.0
    first, last = llc[:, :third], llc[:, -third:]
    drift = float(np.mean(last) - np.mean(first))
    # Chain by chain: all start at w* and drift together, which errors of pooled chains would not show.
    errors = [mcse(part[c : c + 1]) or 0.0 for part in (first, last) for c in range(len(llc))]
    error = math.sqrt(sum(e**2 for e in errors)) / len(llc)
    return drift if abs(drift) > max(CLEAR_ERRORS * error, RELEVANT * abs(np.mean(llc))) else 0.0


def _below_star(llc: np.ndarray, minibatches: bool) -> bool:
    """Whether a tenth of the draws, (chains, draws), lie clearly below w*; a minibatch sampler's draws are averaged in blocks.

    Minibatch noise is independent between draws, so successive differences bound it: its variance is at most E[(x' - x)^2] / 2.
    """
    length = max(1, llc.shape[1] // NUM_BLOCKS) if minibatches else 1
    blocks = np.mean(llc[:, : llc.shape[1] // length * length].reshape(len(llc), -1, length), axis=2)
    noise = math.sqrt(np.mean(np.square(np.diff(llc, axis=1))) / (2 * length)) if minibatches else 0.0
    return bool(np.quantile(blocks, LOW_QUANTILE) < -max(CLEAR_ERRORS * noise, RELEVANT * abs(np.mean(llc))))


def _rhat_limit(chains: tuple[Estimate, ...]) -> float:
    """R-hat above which chains disagree: `MAX_RHAT`, or more where they have too few effective draws to tell.

    Among m chains that agree, with N effective draws in all, the 2m half-chains' means vary so that R-hat^2 - 1 is about
    (2m/N) chi^2_{2m-1} / (2m-1). N is summed over the chains' own, which their disagreement does not lower.
    """
    effective = [chain.ess_bulk for chain in chains if chain.ess_bulk is not None]
    if not effective:
        return MAX_RHAT
    halves = 2 * len(effective)
    excess = halves / sum(effective) * float(chi2.ppf(RHAT_QUANTILE, halves - 1)) / (halves - 1)
    return max(MAX_RHAT, math.sqrt(1 + excess))
