"""Estimates of the local learning coefficient from recorded draws; the statistics are ArviZ's (Vehtari et al. 2021)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from lambda_hat.llc.trace import FIELDS, Trace

#: The fewest draws of a chain that ArviZ makes a statistic of.
MIN_DRAWS = 4

#: A number from here on counts as infinite: it has diverged, and its powers would overflow.
LARGEST = 1e60

#: The fewest importance weights of which a fifth is a tail that ArviZ fits, and the shape of a tail that is beyond any fit.
MIN_TAIL_DRAWS, HOPELESS_K = 25, 10.0

#: Quantiles whose effective sample sizes the tail ESS is the smaller of.
TAIL = (0.05, 0.95)


def load_arviz() -> ModuleType:
    """ArviZ 0.22 or newer, 1.x included; imported on first use because it takes seconds."""
    with warnings.catch_warnings():
        # 0.23 announces its refactoring once a day.
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing a major refactor", category=FutureWarning)
        import arviz

    return arviz


class Estimate(BaseModel):
    """The llc from some chains and how well it is known; None where the draws do not give the number.

    llc, sd: mean and standard deviation of the draws of nbeta (L(w) - L(w*)), dimensionless.
    mcse: Monte Carlo standard error of llc, sd / sqrt(ESS of the mean).
    ess_bulk, ess_tail: effective draws, rank-normalised, and at the 5 % and 95 % quantiles. None for chains that never move.
    acceptance_rate: mean over the draws. divergences: number of failed steps after burn-in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    llc: float | None
    sd: float | None
    mcse: float | None
    ess_bulk: float | None
    ess_tail: float | None
    acceptance_rate: float | None
    divergences: int


class Sensitivity(NamedTuple):
    """d log(llc) / d log(nbeta), and its Monte Carlo standard error."""

    value: float
    mcse: float


def llc_draws(trace: Trace, nbeta: float) -> np.ndarray:
    """nbeta (L(w) - L(w*)) of every draw, burn-in included, (num_chains, num_burnin_draws + num_draws) in float64."""
    return nbeta * trace.draws["loss_difference"].astype(np.float64)


def finite_draws(trace: Trace) -> np.ndarray:
    """Which draws hold only numbers below `LARGEST`, burn-in included; (num_chains, num_burnin_draws + num_draws) of bool."""
    return np.all([np.abs(trace.draws[name].astype(np.float64)) < LARGEST for name in FIELDS], axis=0)


def finite_chains(trace: Trace) -> np.ndarray:
    """Which chains hold only finite draws; (num_chains,) of bool."""
    return np.all(finite_draws(trace), axis=1)


def to_arviz(trace: Trace, nbeta: float) -> Any:
    """The draws for ArviZ's own functions: variables llc and squared_distance over (chain, draw) of all chains.

    Returns:
      InferenceData (ArviZ 0.x) or an xarray DataTree (1.x) with groups posterior and, if there was burn-in, warmup_posterior.
    """
    az = load_arviz()
    variables = {
        "llc": llc_draws(trace, nbeta),
        "squared_distance": trace.draws["squared_distance"].astype(np.float64),
    }
    burnin = trace.num_burnin_draws
    groups = {"posterior": {name: draws[:, burnin:] for name, draws in variables.items()}}
    if burnin:
        groups["warmup_posterior"] = {name: draws[:, :burnin] for name, draws in variables.items()}
    with warnings.catch_warnings():
        # More chains than draws is suspected to be a transposed array; here it is a short run.
        warnings.filterwarnings("ignore", message=r"More chains|Found chain dimension", category=UserWarning)
        if az.__version__.startswith("0."):
            return az.from_dict(**groups, save_warmup=True)
        return az.from_dict(groups, save_warmup=True)


def estimate(trace: Trace, nbeta: float, chains: Sequence[int] | np.ndarray) -> Estimate:
    """The estimate pooled over `chains`, from the draws after burn-in; all None for no chains."""
    if not len(chains):
        return Estimate(llc=None, sd=None, mcse=None, ess_bulk=None, ess_tail=None, acceptance_rate=None, divergences=0)
    llc = llc_draws(trace, nbeta)[chains, trace.num_burnin_draws :]
    moves = np.ptp(llc) > 0
    az = load_arviz()
    return Estimate(
        llc=float(np.mean(llc)),
        sd=float(np.std(llc, ddof=1)),
        mcse=mcse(llc) if moves else None,
        ess_bulk=_number(az.ess(llc, method="bulk")) if moves else None,
        ess_tail=_number(az.ess(llc, method="tail", prob=TAIL)) if moves else None,
        acceptance_rate=float(np.mean(trace.posterior_draws("acceptance_rate")[chains], dtype=np.float64)),
        divergences=int(np.sum(trace.posterior_draws("is_divergent")[chains])),
    )


def mcse(draws: np.ndarray) -> float | None:
    """Monte Carlo standard error of the mean of `draws`, (chains, draws); None for fewer than `MIN_DRAWS` draws."""
    return _number(load_arviz().mcse(draws, method="mean")) if draws.shape[1] >= MIN_DRAWS else None


def rhat(draws: np.ndarray) -> float | None:
    """Rank-normalised split R-hat of `draws`, (chains, draws); None for a single chain or chains that all stand still."""
    if draws.shape[0] < 2 or draws.shape[1] < MIN_DRAWS or np.ptp(draws, axis=1).max() == 0:
        return None
    return _number(load_arviz().rhat(draws, method="rank"))


def pareto_k(log_weights: np.ndarray) -> float | None:
    """k-hat of importance weights from their logarithms, (draws,): the shape of the generalised Pareto fitted to their tail.

    None where they have no tail to fit: too few of them, or all within a factor e. `HOPELESS_K` where a few have all the
    weight, so that the rest of the tail is zero beside them.
    """
    if len(log_weights) < MIN_TAIL_DRAWS or np.ptp(log_weights) == 0:
        return None
    # ArviZ 1.x takes the logarithms of likelihoods, whose inverses are the weights.
    sign = 1 if load_arviz().__version__.startswith("0.") else -1
    k = float(_array_statistics().psislw(sign * log_weights)[1])
    if not np.isfinite(k):
        return None if np.ptp(log_weights) < 1 else HOPELESS_K
    return min(k, HOPELESS_K)


def autocorr(draws: np.ndarray) -> np.ndarray:
    """Correlation of one chain's draws, (draws,), with those a lag of 0, 1, ... later, (draws,)."""
    return np.asarray(_array_statistics().autocorr(draws))


def _array_statistics() -> Any:
    """Where ArviZ keeps its functions of arrays: at its root in 0.x, in a part of its own in 1.x."""
    az = load_arviz()
    if az.__version__.startswith("0."):
        return az
    from arviz_stats.base import array_stats

    return array_stats


def _number(value: Any) -> float | None:
    """A float of ArviZ's scalar or zero-dimensional array."""
    return float(value) if np.isfinite(value) else None


def running_llc(llc: np.ndarray, counts: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the first k draws of all chains and its Monte Carlo standard error, for k in `counts`.

    Args:
      llc: draws after burn-in, (chains, draws). counts: numbers of draws per chain, each at least 1.

    Returns:
      (means, errors), each (len(counts),); an error is NaN where there are too few draws for one.
    """
    means = [np.mean(llc[:, :count]) for count in counts]
    errors = [mcse(llc[:, :count]) for count in counts]
    return np.array(means), np.array([np.nan if error is None else error for error in errors])


def nbeta_sensitivity(llc: np.ndarray, num_steps_bw_draws: int, squares: np.ndarray | None = None) -> Sensitivity | None:
    """How the llc responds to nbeta: t = d log(llc) / d log(nbeta), 0 where the loss shapes the posterior, 1 where it does not.

    Of x = nbeta (L(w) - L(w*)) under exp(-x - localization/2 |w-w*|^2), d E[x] / d log(nbeta) = E[x] - Var[x], so
      t = 1 - Var[x] / E[x].
    While localisation alone decides where w is, E[x] is nbeta times a constant and t = 1. Where it only keeps w near w*, x is
    close to Gamma(llc) distributed and t = 0. On a quadratic with curvatures h, t is the mean of
    localization / (nbeta h + localization) weighted by each direction's share of the llc: flat directions have no share.

    A draw of `num_steps_bw_draws` > 1 averages x over its steps, which lowers the variance. The variance of x itself is that of
    the `squares`; without them, for the noise of minibatches would be in them, it is recovered from the draws' lag-1
    autocorrelation as for an AR(1) process, which like what is left of the noise errs towards a smaller t.

    Args:
      llc: draws of x after burn-in, (chains, draws). squares: of x^2, averaged as x is.

    Returns:
      t and its Monte Carlo standard error; None where the llc is not positive or too few draws move.
    """
    mean = float(np.mean(llc))
    deviations = np.square(llc - mean) if squares is None else squares - 2 * mean * llc + mean**2
    error = mcse(deviations)
    if mean <= 0 or error is None or np.ptp(llc) == 0:
        return None
    scale = (_averaging_factor(llc, num_steps_bw_draws) if squares is None else 1.0) / mean
    return Sensitivity(1 - scale * float(np.mean(deviations)), scale * error)


def _averaging_factor(draws: np.ndarray, k: int) -> float:
    """Var(step) / Var(mean of k steps), between 1 and k, for the AR(1) process whose k-step means correlate as `draws` do.

    With phi the process's correlation between steps and S = k (1-phi^2) - 2 phi (1-phi^k), consecutive means of k steps have
    correlation phi (1-phi^k)^2 / S and variance S / (k (1-phi))^2.
    """
    if k == 1:
        return 1.0
    centred = draws - np.mean(draws, axis=1, keepdims=True)
    variance = np.mean(np.square(centred))
    correlation = np.mean(centred[:, 1:] * centred[:, :-1]) / variance if variance > 0 else 1.0
    phi = 1 - np.geomspace(1e-4 / k, 1, 400)[::-1]
    total = k * (1 - phi**2) - 2 * phi * (1 - phi**k)
    return float(np.interp(correlation, phi * (1 - phi**k) ** 2 / total, np.square(k * (1 - phi)) / total))
