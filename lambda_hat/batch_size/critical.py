"""Numbers from loss curves over batch size: steps to a target loss, critical batch sizes, collapse.

What cannot be measured on the curves at hand is None, never extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lambda_hat.batch_size.smoothing import updates_done

#: Steps and losses, (P,) each; see `batch_size.study.Study`.
Curve = tuple[np.ndarray, np.ndarray]

#: The share of samples above linear scaling that defines the critical batch size of Zhang et al. 2024, arXiv 2410.21676.
EXCESS = 0.2
#: Points at which two loss curves are compared.
COMPARED = 100


def steps_to_target(curve: Curve, loss: float) -> float | None:
    """Updates after which the curve is first at or below the loss, interpolated in log loss; None where it never is.

    A point counts as the updates done, on average, when its losses were computed (`lambda_hat.batch_size.smoothing`). A noisy
    curve dips below a loss early: smooth it first.
    """
    updates, losses = updates_done(curve[0]), np.asarray(curve[1], np.float64)
    below = np.flatnonzero(losses <= loss)
    if not below.size:
        return None
    at = int(below[0])
    if at == 0 or losses[at] <= 0 or not np.isfinite(losses[at - 1]):
        return float(updates[at])
    share = math.log(losses[at - 1] / loss) / math.log(losses[at - 1] / losses[at])
    return float(updates[at - 1] + share * (updates[at] - updates[at - 1]))


class CriticalBatchSize(NamedTuple):
    """The trade of steps for samples, S(B) = min_steps (1 + batch_size / B), with confidence intervals (low, high).

    batch_size: B_crit = min_samples / min_steps. in_range: whether it lies among the batch sizes measured; else the intervals
    alone say what is known. linear_limit: the batch size from which on training takes a share `EXCESS` of samples more than
    at the smallest one, free of the model; None where it never does.
    """

    batch_size: float
    batch_size_interval: tuple[float, float]
    min_steps: float
    min_steps_interval: tuple[float, float]
    min_samples: float
    min_samples_interval: tuple[float, float]
    in_range: bool
    linear_limit: float | None


def critical_batch_size(
    batch_sizes: Sequence[float] | np.ndarray, steps: Sequence[float | None] | np.ndarray, confidence: float = 0.95
) -> CriticalBatchSize | None:
    """Fits (S/S_min - 1) (E/E_min - 1) = 1 with E = S B (McCandlish et al. 2018, arXiv 1812.06162), by least squares in log S.

    Args:
      batch_sizes: (P,), in which seeds repeat. steps: to the target loss, (P,); None, NaN or 0 are left out.

    Returns:
      None where fewer than three batch sizes reach the target. The intervals take Student's t with (points - 2) degrees of
      freedom, in the logarithms.
    """
    from scipy.optimize import least_squares
    from scipy.stats import t as student

    sizes, taken = np.asarray(batch_sizes, np.float64), np.array([math.nan if s is None else s for s in steps], np.float64)
    use = np.isfinite(taken) & (taken > 0)
    log_b, log_s = np.log(sizes[use]), np.log(taken[use])
    if len(np.unique(log_b)) < 3:
        return None

    def residuals(unknowns: np.ndarray) -> np.ndarray:
        return unknowns[0] + np.logaddexp(0.0, unknowns[1] - log_b) - log_s

    start = np.array([log_s.min(), (log_s + log_b).min() - log_s.min()])
    fit = least_squares(residuals, start, x_scale=1.0, ftol=1e-12, xtol=1e-12, gtol=1e-12)
    log_steps, log_critical = fit.x
    # Errors as in linear regression on 1 and the derivative with respect to log B_crit.
    derivative = 1 / (1 + np.exp(np.clip(log_b - log_critical, -700, 700)))
    count, mean = len(log_b), derivative.mean()
    spread = np.sum(np.square(derivative - mean))
    freedom = count - 2
    scatter = np.sum(np.square(fit.fun)) / freedom
    reach = float(student.ppf((1 + confidence) / 2, freedom)) * math.sqrt(scatter)

    def with_interval(log_value: float, share: float) -> tuple[float, tuple[float, float]]:
        """exp of it and its interval; `share` of the derivative is in it besides 1."""
        own = reach * math.sqrt(share) if math.isfinite(share) else math.inf
        with np.errstate(over="ignore"):
            return math.exp(log_value), (float(np.exp(log_value - own)), float(np.exp(log_value + own)))

    with np.errstate(divide="ignore", over="ignore"):
        shares = [1 / spread, 1 / count + mean**2 / spread, 1 / count + (1 - mean) ** 2 / spread]
    values = [with_interval(*pair) for pair in zip((log_critical, log_steps, log_steps + log_critical), shares, strict=True)]
    in_range = bool(log_b.min() <= log_critical <= log_b.max())
    return CriticalBatchSize(*values[0], *values[1], *values[2], in_range, _linear_limit(log_b, log_b + log_s))


def _linear_limit(log_sizes: np.ndarray, log_samples: np.ndarray) -> float | None:
    """The batch size at which the samples needed, relative to the smallest batch size's, rise above 1 + `EXCESS` for good."""
    places, which = np.unique(log_sizes, return_inverse=True)
    samples = np.bincount(which, log_samples) / np.bincount(which)
    excess = samples - samples[0] - math.log1p(EXCESS)
    last = int(np.flatnonzero(excess < 0)[-1])
    if last == len(places) - 1:
        return None
    return math.exp(np.interp(0.0, excess[last : last + 2], places[last : last + 2]))


class Collapse(NamedTuple):
    """How far loss curves over samples seen are from that of the reference, the smallest batch size of which none failed.

    differences: root mean square of the difference in log loss at equal samples, less what the seeds' scatter adds to it; 0
    for the reference, infinite where a trial failed, NaN where no samples are common; (K,). breaks_at: the batch size at
    which it exceeds the tolerance; None where it never does.
    """

    batch_sizes: np.ndarray
    differences: np.ndarray
    breaks_at: float | None


def collapse(curves: Sequence[tuple[float, Curve]], tolerance: float = 0.1) -> Collapse | None:
    """Whether curves at one eta/B agree over samples seen, as they do for B far below B_crit; None where all sizes failed.

    Args:
      curves: (batch size, its loss curve), of a failed trial with a loss that is not finite; several of one size are its seeds.
        Noisy ones are to be smoothed.
      tolerance: the root mean square difference in log loss, over points evenly spaced in log samples, that still is agreement.
    """
    sizes = np.unique([size for size, _ in curves]).astype(np.float64)
    by_size = [[curve for of, curve in curves if of == size] for size in sizes]
    whole = [all(np.isfinite(losses).all() for _, losses in seeds) for seeds in by_size]
    if not any(whole):
        return None
    reference = whole.index(True)
    differences = np.array([
        math.inf if not fine else 0.0 if k == reference else _difference(sizes[reference], by_size[reference], sizes[k], seeds)
        for k, (fine, seeds) in enumerate(zip(whole, by_size, strict=True))
    ])  # fmt: skip
    broken = [k for k in range(reference + 1, len(sizes)) if differences[k] > tolerance]
    if not broken:
        return Collapse(sizes, differences, None)
    at, before = broken[0], max(k for k in range(reference, broken[0]) if np.isfinite(differences[k]))
    share = (tolerance - differences[before]) / (differences[at] - differences[before]) if np.isfinite(differences[at]) else 1.0
    return Collapse(sizes, differences, float(sizes[before] * (sizes[at] / sizes[before]) ** share))


def _difference(reference_size: float, reference: list[Curve], size: float, seeds: list[Curve]) -> float:
    """Root mean square over log samples of the difference of the seeds' mean log losses, less its variance over seeds."""
    groups = [[_log_samples(of, curve) for curve in curves] for of, curves in ((reference_size, reference), (size, seeds))]
    every = [points for group in groups for points in group]
    if any(len(x) == 0 for x, _ in every):
        return math.nan
    low, high = max(x[0] for x, _ in every), min(x[-1] for x, _ in every)
    if low >= high:
        return math.nan
    grid = np.linspace(low, high, COMPARED)
    lines = [np.stack([np.interp(grid, *points) for points in group]) for group in groups]
    noise = sum(float(np.mean(np.var(of, axis=0, ddof=1))) / len(of) for of in lines if len(of) > 1)
    return math.sqrt(max(0.0, float(np.mean(np.square(lines[0].mean(axis=0) - lines[1].mean(axis=0)))) - noise))


def _log_samples(size: float, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Log of the samples seen and of the loss, at the points where some were seen and the loss is positive."""
    samples, losses = size * updates_done(curve[0]), np.asarray(curve[1], np.float64)
    seen = (samples > 0) & (losses > 0)
    return np.log(samples[seen]), np.log(losses[seen])
