"""Numbers from studies: optimal learning rates and their slopes.

A failed trial's loss counts as NaN. What cannot be measured on the grid at hand is flagged or None, never extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lambda_hat.batch_size.study import losses
from lambda_hat.specs.spec import InvalidInput

if TYPE_CHECKING:
    import pandas as pd

#: Richness up to which training is lazy and from which on it is rich; the optimal rate bends in between.
LAZY, RICH = 0.03, 10.0
#: Standard errors of an optimum in steps of its grid, the same for all seeds: of a parabola's minimum, by how much it moves on
#: trained networks' curves, steep above the optimum, as the grid is shifted against them; and of a grid point.
REFINED, UNREFINED = 0.15, 1 / math.sqrt(12)

#: From the worst to the best: no finite loss; the minimum is at an end of the grid, and the optimum perhaps beyond it; it is
#: beside a failed trial, so the optimum lies within a grid step of it but cannot be refined; refined.
Flag = Literal["none", "edge", "failure", ""]
FLAGS: tuple[Flag, ...] = ("none", "edge", "failure", "")


class Optimum(NamedTuple):
    """The learning rate of the lowest loss.

    log2_eta: mean over the seeds, NaN if none has a finite loss. error: the seeds' standard error and the grid's in quadrature;
    the grid's alone for one seed. loss: at the optimum, mean over the seeds. flag: the worst of the seeds'. step: the grid's
    at the optimum, in log2 eta. per_seed: log2 eta, (seeds,).
    """

    log2_eta: float
    error: float
    loss: float
    flag: Flag
    step: float
    per_seed: np.ndarray

    @property
    def bracketed(self) -> bool:
        """Whether higher losses or failed trials lie on both sides, so that the optimum is known to within a grid step."""
        return self.flag in ("", "failure")

    @property
    def resolution(self) -> float:
        """The grid's standard error, in log2 eta: `REFINED` or `UNREFINED` steps."""
        return self.step * (UNREFINED if self.flag else REFINED)


def optimum(etas: np.ndarray, losses: np.ndarray) -> Optimum:
    """The optimal learning rate: each seed's grid minimum, refined by the parabola in log loss over log2 eta of its neighbours.

    Args:
      etas: (E,). losses: final losses, NaN where training failed, (E,) or (seeds, E).
    """
    order = np.argsort(etas)
    x, losses = np.log2(np.asarray(etas, np.float64)[order]), np.atleast_2d(np.asarray(losses, np.float64))[:, order]
    found = [_optimum_of_seed(x, seed) for seed in losses]
    per_seed = np.array([place for place, _, _ in found])
    flag = min((flag for _, _, flag in found), key=FLAGS.index)
    known = per_seed[np.isfinite(per_seed)]
    if not known.size:
        return Optimum(math.nan, math.nan, math.nan, flag, math.nan, per_seed)
    place = float(known.mean())
    loss = float(np.nanmean([loss for _, loss, _ in found]))
    best = Optimum(place, math.nan, loss, flag, _grid_step(x, place), per_seed)
    scatter = float(np.std(known, ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else 0.0
    return best._replace(error=math.hypot(scatter, best.resolution))


def _optimum_of_seed(x: np.ndarray, losses: np.ndarray) -> tuple[float, float, Flag]:
    """log2 eta, the loss there and the flag of one curve of losses over x = log2 eta, both (E,)."""
    finite = np.isfinite(losses)
    if not finite.any():
        return math.nan, math.nan, "none"
    best = int(np.argmin(np.where(finite, losses, np.inf)))
    if best in (0, len(x) - 1):
        return float(x[best]), float(losses[best]), "edge"
    around = slice(best - 1, best + 2)
    if not finite[around].all():
        return float(x[best]), float(losses[best]), "failure"
    # The tiniest normal number stands for a loss of exactly zero.
    curvature, slope, height = np.polyfit(x[around] - x[best], np.log(np.maximum(losses[around], np.finfo(float).tiny)), 2)
    offset = -slope / (2 * curvature) if curvature > 0 else 0.0
    return float(x[best] + offset), math.exp(height + slope * offset / 2), ""


def _grid_step(x: np.ndarray, place: float) -> float:
    """The distance of the grid's points around `place`."""
    right = int(np.clip(np.searchsorted(x, place), 1, len(x) - 1))
    return float(x[right] - x[right - 1]) if len(x) > 1 else math.nan


def over_rates(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Learning rates, (E,), and losses, (seeds, E), as `optimum` takes them, of trials that differ in eta and seed alone."""
    grid = table.assign(loss=losses(table)).pivot(index="seed", columns="eta", values="loss")
    return grid.columns.to_numpy(np.float64), grid.to_numpy(np.float64)


def _optima(table: pd.DataFrame, by: str) -> tuple[np.ndarray, tuple[Optimum, ...]]:
    """The values of the column `by`, ascending, and the optimum at each.

    Raises:
      InvalidInput: two trials differ in none of `by`, eta and seed.
    """
    if table.duplicated([by, "eta", "seed"]).any():
        raise InvalidInput(
            f"Optima are taken over trials that differ in {by}, eta and seed alone; got several for one of each. "
            "Filter the table, or take its groups one by one."
        )
    values, found = [], []
    for value, group in table.groupby(by):
        values.append(float(value))  # type: ignore[arg-type]
        found.append(optimum(*over_rates(group)))
    return np.array(values), tuple(found)


# --- Slopes ------------------------------------------------------------------------------------------------------------


class Slope(NamedTuple):
    """y = exp(intercept) x^slope: the exponent, its standard error and the ends of its confidence interval, NaN where there
    are no more points than unknowns. num_x: distinct x that were used. left_out: x that were not."""

    slope: float
    error: float
    low: float
    high: float
    intercept: float
    num_x: int
    left_out: tuple[float, ...]


def power_slope(
    x: np.ndarray, y: np.ndarray, shared_errors: np.ndarray | None = None, keep: np.ndarray | None = None,
    series: np.ndarray | None = None, confidence: float = 0.95,
) -> Slope | None:  # fmt: skip
    """The slope of log y over log x by ordinary least squares; None for fewer than two distinct x.

    The standard error is that of the points' scatter about the line, and of `shared_errors` in quadrature; the interval takes
    Student's t with (points - series - 1) degrees of freedom.

    Args:
      x, y: positive, (P,); several seeds' y at one x are as many points. A y that is not finite is left out.
      shared_errors: standard errors of log y that all points of one x have in common, as the grid's resolution is, (P,).
      keep: which points to use, (P,).
      series: which of several parallel lines a point is of, each with an intercept of its own, (P,); one line if not given.
    """
    from scipy.stats import t as student

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    use = np.isfinite(y) & (True if keep is None else np.asarray(keep, bool))
    left_out = tuple(float(value) for value in np.setdiff1d(x, x[use]))
    log_x, log_y = np.log(x[use]), np.log(y[use])
    places, which = np.unique(log_x, return_inverse=True)
    if len(places) < 2:
        return None
    names, line = np.unique(np.zeros(len(log_x)) if series is None else np.asarray(series)[use], return_inverse=True)
    centred = log_x - (np.bincount(line, log_x) / np.bincount(line))[line]
    if not centred.any():
        return None
    influence = centred / np.sum(np.square(centred))  # of each point on the slope
    slope = float(influence @ log_y)
    intercepts = np.bincount(line, log_y - slope * log_x) / np.bincount(line)
    intercept = float(log_y.mean() - slope * log_x.mean())
    freedom = len(log_x) - len(names) - 1
    if freedom < 1:
        return Slope(slope, math.nan, math.nan, math.nan, intercept, len(places), left_out)
    scatter = np.sum(np.square(log_y - intercepts[line] - slope * log_x)) / freedom
    variance = scatter * np.sum(np.square(influence))
    if shared_errors is not None:
        variance += np.sum(np.square(np.bincount(which, influence * np.asarray(shared_errors, np.float64)[use])))
    error = math.sqrt(variance)
    reach = float(student.ppf((1 + confidence) / 2, freedom)) * error
    return Slope(slope, error, slope - reach, slope + reach, intercept, len(places), left_out)


def _slope_of_optima(x: np.ndarray, optima: Sequence[Optimum]) -> Slope | None:
    """The slope of log eta* over log x, of bracketed optima: one for all seeds, which start from weights of their own."""
    counts = [len(found.per_seed) for found in optima]
    resolution = [found.resolution * math.log(2) for found in optima]
    return power_slope(
        np.repeat(x, counts),
        np.exp2(np.concatenate([found.per_seed for found in optima])) if len(optima) else np.array([]),
        np.repeat(resolution, counts),
        np.repeat([found.bracketed for found in optima], counts),
        np.concatenate([np.arange(count) for count in counts]) if len(optima) else np.array([]),
    )


class RichnessSlopes(NamedTuple):
    """Optimal learning rates over richness, (R,), and the slopes of log eta* over log richness on the lazy side, up to `LAZY`,
    and the rich one, from `RICH` on; None where fewer than two optima are bracketed. theory: the two slopes expected."""

    richness: np.ndarray
    optima: tuple[Optimum, ...]
    lazy: Slope | None
    rich: Slope | None
    theory: tuple[float, float]


def richness_slopes(table: pd.DataFrame) -> RichnessSlopes:
    """How the optimal raw learning rate scales with richness, for trials that differ in richness, eta and seed alone.

    For SGD and L weight layers theory says eta* ~ richness^2 in lazy and richness^(2/L) in rich training (Atanasov et al.
    2024, arXiv 2410.04642); for Adam, whose updates do not scale with the gradient, half of both.

    Raises:
      InvalidInput: the trials differ in more than that, or their rate_rule is not raw.
    """
    found = {name: table[name].unique().tolist() for name in ("rate_rule", "depth", "optimizer")}
    if found["rate_rule"] != ["raw"] or any(len(values) != 1 for values in found.values()):
        raise InvalidInput(
            f"Slopes over richness are of trials with rate_rule=raw, of one depth and one optimizer; got {found}. Filter the "
            "table, or take its groups one by one; the other rules already scale the rate with richness."
        )
    richness, optima = _optima(table, "richness")
    sides = [
        _slope_of_optima(richness[side], [of for of, here in zip(optima, side, strict=True) if here])
        for side in (richness <= LAZY, richness >= RICH)
    ]
    power = 2.0 if found["optimizer"] == ["sgd"] else 1.0
    return RichnessSlopes(richness, optima, sides[0], sides[1], (power, power / found["depth"][0]))


class WidthTransfer(NamedTuple):
    """Optimal learning rates over width, (W,). shifts: from the smallest width's, in steps of the grid, NaN where one of the
    two is not bracketed, (W,). slope: of log eta* over log width; 0 where the rate transfers."""

    widths: np.ndarray
    optima: tuple[Optimum, ...]
    shifts: np.ndarray
    slope: Slope | None


def width_transfer(table: pd.DataFrame) -> WidthTransfer:
    """Whether the optimal learning rate stays with the width, for trials that differ in width, eta and seed alone.

    Raises:
      InvalidInput: the trials differ in more than that.
    """
    widths, optima = _optima(table, "width")
    places = np.array([found.log2_eta if found.bracketed else math.nan for found in optima])
    return WidthTransfer(widths, optima, (places - places[0]) / optima[0].step, _slope_of_optima(widths, optima))
