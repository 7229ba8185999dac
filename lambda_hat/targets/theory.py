"""Exact learning coefficients: what a perfect estimator would return."""

from __future__ import annotations

import math
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


def normal_crossing_llc(exponents: Sequence[int]) -> LearningCoefficient:
    """Learning coefficient of the loss prod_i w_i^(2 a_i) at 0: min_i 1/(2 a_i), attained as often as its multiplicity says.

    Source: Watanabe (2009), Algebraic Geometry and Statistical Learning Theory, section 2.

    Args:
      exponents: a_i >= 0, not all 0.
    """
    largest = max(exponents)
    return LearningCoefficient(Fraction(1, 2 * largest), list(exponents).count(largest))


def tanh_llc(hidden: int) -> LearningCoefficient:
    """Learning coefficient of sum_h b_h tanh(a_h x), h = 1..H, learning f = 0, at w* = 0 (Aoyagi and Watanabe).

    lambda = (H + i^2 + i) / (4 i + 2) with i the largest integer such that i^2 <= H; the multiplicity is 2 if i^2 = H, else 1.

    Args:
      hidden: number H of hidden units, at least 1.
    """
    i = math.isqrt(hidden)
    return LearningCoefficient(Fraction(hidden + i**2 + i, 4 * i + 2), 2 if i**2 == hidden else 1)


def finite_normal_crossing_llc(exponents: Sequence[int], nbeta: float, localization: float) -> float:
    """What a perfect sampler returns on L = prod_i w_i^(2 a_i) with w* = 0 at finite nbeta: nbeta E[L].

    By quadrature, to a relative 1e-9. The v_i = log w_i^(2 a_i) are independent under the Gaussian prior and L = exp(sum v_i),
    so that two one-dimensional integrals over the density of the sum give E[L]; it is the convolution of theirs, by FFT.

    Args:
      exponents: a_i >= 0, not all 0.
      localization: precision of the Gaussian around 0, above 0.
    """
    from scipy.signal import fftconvolve  # heavy to import, and only benchmarks and tests come here

    orders = [a for a in exponents if a > 0]
    # In units of the prior's standard deviation; all integrands are smooth and vanish at both ends of the grid, where the
    # trapezoid rule converges faster than any power of its step.
    scaled = nbeta * localization ** -float(sum(orders))
    step = 0.02
    v = np.arange(-80.0 * max(orders), 10.0 * max(orders), step)
    densities = [np.exp(v / (2 * a) - 0.5 * np.exp(v / a)) for a in orders]
    density = densities[0]
    for other in densities[1:]:
        density = fftconvolve(density, other)
    total = len(orders) * v[0] + step * np.arange(len(density))
    loss = scaled * np.exp(total)
    weight = density * np.exp(-loss)
    return float(np.sum(loss * weight) / np.sum(weight))


def finite_tanh_llc(hidden: int, input_bound: float, nbeta: float, localization: float) -> float:
    """What a perfect sampler returns on the `tanh` target at finite nbeta, its inputs uniform in [-input_bound, input_bound].

    To about 0.2 % up to six units and nbeta = 1e5. Given the a_h the posterior of b is Gaussian, of precision
    nbeta M + localization with M_hk = E[tanh(a_h x) tanh(a_k x)], so that with the eigenvalues e of nbeta M
      nbeta E[L | a] = 1/2 sum e / (e + localization), and a has weight prod (e + localization)^(-1/2) under its Gaussian prior.
    The average over a is taken over 2^17 points of a Sobol sequence.

    Args:
      localization: precision of the Gaussian around 0, above 0.
    """
    from scipy.stats import norm, qmc  # heavy to import, and only benchmarks and tests come here

    nodes, weights = np.polynomial.legendre.leggauss(40)
    x, weights = input_bound * (nodes + 1) / 2, weights / 2  # the functions are even
    points = qmc.Sobol(hidden, rng=np.random.default_rng(0)).random_base2(17)
    sums = np.zeros(2)
    for part in np.array_split(points, 32):
        a = norm.ppf(part) / math.sqrt(localization)
        features = np.tanh(a[:, :, None] * x) * np.sqrt(weights)
        e = nbeta * np.maximum(np.linalg.eigvalsh(features @ features.transpose(0, 2, 1)), 0)
        weight = np.prod(1 + e / localization, axis=1) ** -0.5
        sums += weight @ (0.5 * np.sum(e / (e + localization), axis=1)), np.sum(weight)
    return float(sums[0] / sums[1])


def quadratic_llc(curvatures: np.ndarray, nbeta: float, localization: float) -> float:
    """What a perfect sampler returns on L = 1/2 sum_i h_i (w_i - w*_i)^2 at finite nbeta.

    sum_i nbeta h_i / (2 (nbeta h_i + localization)), which tends to d/2 as nbeta grows.
    """
    scaled = nbeta * np.asarray(curvatures, np.float64)
    return float(np.sum(scaled / (2 * (scaled + localization))))
