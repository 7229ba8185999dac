"""Numbers about a study that its plots, its report and benchmarks share, from its tables alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lambda_hat.entropy.estimators import standard_error
from lambda_hat.entropy.study import EntropyStudy, Measured

#: Points of a fit of two unknowns that leave something to say how well it fits.
MIN_POINTS = 3


class Exchange(NamedTuple):
    """R = -a exp(H) + b, and the share of the variance of R that it accounts for. num_points: of the fit."""

    a: float
    b: float
    r_squared: float
    num_points: int


class Rates(NamedTuple):
    """dH/deta of an update and of its parts, in nats per unit learning rate, with standard errors; the mean over evaluation
    batches, which are independent.

    full: along v. baseline: along b, what the optimizer carries on from earlier updates. grad: along sum_i v_i, this update's
    sequences; full = baseline + grad.
    """

    full: float
    full_error: float
    baseline: float
    baseline_error: float
    grad: float
    grad_error: float


def exchange_fit(entropy: np.ndarray, accuracy: np.ndarray) -> Exchange | None:
    """R = -a exp(H) + b by least squares (Cui et al. 2025, arXiv 2505.22617), H in nats a token; none of fewer than three
    different entropies."""
    entropy, accuracy = np.asarray(entropy, np.float64), np.asarray(accuracy, np.float64)
    known = np.isfinite(entropy) & np.isfinite(accuracy)
    if len(np.unique(entropy[known])) < MIN_POINTS:
        return None
    x, y = np.exp(entropy[known]), accuracy[known]
    slope, intercept = np.polyfit(x, y, 1)
    return Exchange(-float(slope), float(intercept), r_squared(y, slope * x + intercept), int(known.sum()))


def r_squared(values: np.ndarray, predicted: np.ndarray) -> float:
    """1 - sum (y - predicted)^2 / sum (y - mean y)^2: 1 of values that are predicted without error, all the same or not, and
    below 0 of a prediction that is worse than their mean."""
    squares, total = np.sum(np.square(values - predicted)), np.sum(np.square(values - np.mean(values)))
    if total > 0:
        return float(1 - squares / total)
    return 1.0 if squares == 0 else -np.inf


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; not a number where either is constant."""
    return float(pd.DataFrame({"x": x, "y": y}, dtype=np.float64).corr("spearman").to_numpy()[0, 1])


def outliers(values: np.ndarray) -> np.ndarray:
    """Which values are beyond Tukey's fences, the quartiles and 1.5 times their distance."""
    lower, upper = np.quantile(values, (0.25, 0.75))
    reach = 1.5 * (upper - lower)
    return (values < lower - reach) | (values > upper + reach)


def rates(measured: Measured) -> Rates:
    """dH/deta of the update and of its parts."""
    evaluations = measured.summary["evaluations"]
    count = len(evaluations)

    def mean(name: str) -> float:
        return float(np.mean([found[name] for found in evaluations]))

    def error(errors: list[Any]) -> float:
        return float(np.sqrt(np.sum(np.square(errors))) / count)

    rows = [matrix.sum(axis=1) for matrix in measured.matrices]
    return Rates(
        mean("first"),
        error([found["first_error"] for found in evaluations]),
        mean("baseline_first"),
        error([found.get("baseline_first_error", np.nan) for found in evaluations]),
        mean("grad_first"),
        error([standard_error(row, axis=0) for row in rows]),
    )


def signs(measured: Measured) -> str:
    """Whether dH/deta and Cov(log p, A) have "opposite" signs, as theory expects, or the "same"; "unclear" within two standard
    errors of dH/deta."""
    found = rates(measured)
    if abs(found.full) < 2 * found.full_error:
        return "unclear"
    return "opposite" if found.full * measured.summary["covariance"] < 0 else "same"


def influences(measured: Measured) -> pd.DataFrame:
    """The update's sequences with what each adds to dH/deta: `influence`, sum_e M[e, i] in nats per unit learning rate, its
    standard error `influence_error`, both over all evaluation batches; `share`, |influence| over the sum of all; and `correct`,
    reward > 0, `quartile`, 1 to 4 by max_surprisal, and `outlier`, of the influence beyond Tukey's fences."""
    sums = np.mean([matrix.sum(axis=0) for matrix in measured.matrices], axis=0)
    errors = np.array([standard_error(matrix, axis=0) for matrix in measured.matrices])
    update = measured.update
    return update.assign(
        influence=sums,
        influence_error=np.sqrt(np.sum(np.square(errors), axis=0)) / len(errors),
        share=np.abs(sums) / (np.sum(np.abs(sums)) or 1.0),
        correct=update["reward"] > 0,
        quartile=np.ceil(4 * update["max_surprisal"].rank(pct=True)).astype(int),
        outlier=outliers(sums),
    )


def all_influences(study: EntropyStudy) -> pd.DataFrame:
    """`influences` of all measurements, which `measurement` numbers. Shares, quartiles and outliers are among each one's own
    sequences."""
    parts = [influences(measured).assign(measurement=number) for number, measured in enumerate(study.measured)]
    return pd.concat(parts, ignore_index=True)


def quartile_table(sequences: pd.DataFrame) -> pd.DataFrame:
    """Who moves the entropy: rows (correct, quartile) of `influences`, of one measurement or of several.

    sequences: how many. mean, error: of their influence. share: of the sum of |influence|, the mean over measurements.
    outliers: how many there are. Rows without sequences are left out.
    """
    measurements = sequences["measurement"].nunique() if "measurement" in sequences else 1
    by = sequences.groupby(["correct", "quartile"])
    count = by.size()
    return pd.DataFrame({
        "sequences": count,
        "mean": by["influence"].mean(),
        "error": by["influence"].std() / np.sqrt(count),
        "share": by["share"].sum() / measurements,
        "outliers": by["outlier"].sum(),
    })  # fmt: skip
