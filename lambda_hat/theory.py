"""Exact learning coefficients: what a perfect estimator would return."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

import numpy as np


class LearningCoefficient(NamedTuple):
    """The real log canonical threshold lambda (an exact rational) and its multiplicity."""

    llc: Fraction
    multiplicity: int


def deep_linear_llc(widths: Sequence[int], rank: int) -> LearningCoefficient:
    """Learning coefficient of a deep linear network at a product of the given rank (Aoyagi 2024).

    With M_s = H_s - r over the widths H_1..H_{L+1}, let Sigma be the subset of l+1 of the M with
    max(Sigma) < min(rest), sum(Sigma) >= l max(Sigma) and sum(Sigma) < l min(rest); S its sum and
    a = S - (ceil(S/l) - 1) l. Then
      lambda = (r (H_1 + H_{L+1}) - r^2)/2 + a (l-a)/(4 l) - (l-1) S^2/(4 l) + 1/2 sum_{i<j in Sigma} M_i M_j
    with multiplicity a (l-a) + 1. It is the local value at parameters whose every layer has rank exactly r.

    Args:
      widths: layer widths from input to output, at least two.
      rank: rank r of the product, 0 <= r <= min(widths).

    Raises:
      ValueError: fewer than two widths, a width below 1, or a rank out of range.
    """
    if len(widths) < 2 or min(widths) < 1 or not 0 <= rank <= min(widths):
        raise ValueError(
            f"A deep linear network has at least two widths of at least 1 and 0 <= rank <= min(widths); "
            f"got widths={list(widths)}, rank={rank}."
        )
    excess = sorted(width - rank for width in widths)
    for size in range(2, len(excess) + 1):
        inside, outside = excess[:size], excess[size:]
        l, total = size - 1, sum(inside)
        above = outside[0] if outside else float("inf")
        if inside[-1] < above and total >= l * inside[-1] and total < l * above:
            break
    a = total - (-(-total // l) - 1) * l
    pairs = sum(x * y for x, y in combinations(inside, 2))
    llc = (
        Fraction(rank * (widths[0] + widths[-1]) - rank**2, 2)
        + Fraction(a * (l - a), 4 * l)
        - Fraction((l - 1) * total**2, 4 * l)
        + Fraction(pairs, 2)
    )
    return LearningCoefficient(llc, a * (l - a) + 1)


def quadratic_llc(curvatures: np.ndarray, nbeta: float, localization: float) -> float:
    """What a perfect sampler returns on L = 1/2 sum_i h_i (w_i - w*_i)^2 at finite nbeta.

    sum_i nbeta h_i / (2 (nbeta h_i + localization)), which tends to d/2 as nbeta grows.
    """
    scaled = nbeta * np.asarray(curvatures, np.float64)
    return float(np.sum(scaled / (2 * (scaled + localization))))
