"""Exact learning coefficients against worked values."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from lambda_hat.targets.theory import (
    deep_linear_llc,
    finite_normal_crossing_llc,
    finite_tanh_llc,
    normal_crossing_llc,
    quadratic_llc,
    tanh_llc,
)

# Aoyagi (2024), cross-checked against three independent derivations: widths, rank, lambda, multiplicity.
DEEP_LINEAR = [
    ((1, 1, 1), 0, "1/2", 2),
    ((1, 1, 1, 1), 0, "1/2", 3),
    ((2, 2, 2), 0, "3/2", 1),
    ((2, 2, 2), 1, "2", 2),
    ((2, 2, 2), 2, "2", 1),
    ((5, 3, 5), 0, "13/2", 2),
    ((5, 4, 5), 0, "8", 1),
    ((4, 3, 8), 0, "6", 1),
    ((3, 8, 4), 0, "6", 1),
    ((5, 5, 5, 5), 0, "17/2", 3),
    ((5, 5, 5, 5), 2, "11", 1),
    ((5, 5, 5, 5), 5, "25/2", 1),
    ((10, 10, 10), 5, "47", 2),
    ((100, 50, 100), 25, "3047", 2),
    ((64, 64, 64, 64, 64), 32, "1856", 1),
    ((100, 89, 467, 95, 231, 59, 159, 36, 225, 210, 342, 457, 495, 366, 186), 36, "4500", 1),
]


@pytest.mark.parametrize(("widths", "rank", "llc", "multiplicity"), DEEP_LINEAR)
def test_deep_linear(widths, rank, llc, multiplicity):
    assert deep_linear_llc(widths, rank) == (Fraction(llc), multiplicity)


def test_deep_linear_is_symmetric_and_at_most_half_the_parameters():
    rng = np.random.default_rng(0)
    for _ in range(200):
        widths = rng.integers(1, 12, rng.integers(2, 6)).tolist()
        rank = int(rng.integers(0, min(widths) + 1))
        exact = deep_linear_llc(widths, rank)
        assert exact == deep_linear_llc(widths[::-1], rank)
        assert 0 <= exact.llc <= Fraction(sum(a * b for a, b in itertools.pairwise(widths)), 2)
        assert exact.multiplicity >= 1


def test_two_widths_are_a_regular_model():
    assert deep_linear_llc((4, 7), 0) == (14, 1)


@pytest.mark.parametrize(("widths", "rank"), [((3,), 0), ((3, 0), 0), ((3, 4), 4), ((3, 4), -1)])
def test_deep_linear_refuses(widths, rank):
    with pytest.raises(ValueError, match="rank <= min"):
        deep_linear_llc(widths, rank)


def test_quadratic_tends_to_half_the_dimension():
    h = np.array([1.0, 2.0, 5.0])
    assert quadratic_llc(h, 1e9, 1.0) == pytest.approx(1.5)
    assert quadratic_llc(h, 10.0, 2.0) == pytest.approx(sum(10 * x / (2 * (10 * x + 2)) for x in h))


# Aoyagi and Watanabe's values for one input, H tanh units and the zero function.
TANH = {1: ("1/2", 2), 2: ("2/3", 1), 3: ("5/6", 1), 4: ("1", 2), 5: ("11/10", 1), 6: ("6/5", 1)}


@pytest.mark.parametrize("hidden", TANH)
def test_tanh(hidden):
    llc, multiplicity = TANH[hidden]
    assert tanh_llc(hidden) == (Fraction(llc), multiplicity)


NBETA = (144.765, 1e4, 1e6)
# Exponents: exact llc, multiplicity, and by two-dimensional quadrature at each NBETA with localization 1.
MONOMIALS = {
    (1, 0): ("1/2", 1, (0.49827901410801956, 0.499975057667897, 0.5000003141942558)),
    (2, 0): ("1/4", 1, (0.2430930440315178, 0.24915672458462704, 0.24991552840864403)),
    (3, 0): ("1/6", 1, (0.15686049130035393, 0.16422146401501422, 0.16613680439572662)),
    (1, 1): ("1/2", 2, (0.36140331580966856, 0.41233716325119624, 0.43754276481339555)),
    (1, 2): ("1/4", 1, (0.20952940094528552, 0.2358114984744284, 0.24550691300292207)),
    (2, 2): ("1/4", 2, (0.15043884765017687, 0.1785177943275984, 0.19600991063433773)),
    (3, 3): ("1/6", 2, (0.0892653606362184, 0.10646124566942504, 0.1189785663510738)),
}


@pytest.mark.parametrize("exponents", MONOMIALS)
def test_normal_crossings(exponents):
    llc, multiplicity, finite = MONOMIALS[exponents]
    assert normal_crossing_llc(exponents) == (Fraction(llc), multiplicity)
    for nbeta, value in zip(NBETA, finite, strict=True):
        assert finite_normal_crossing_llc(exponents, nbeta, 1.0) == pytest.approx(value, abs=1e-6)


def test_finite_normal_crossings_agree_with_what_is_known():
    for nbeta, localization in [(100.0, 1.0), (1e5, 0.01), (3.0, 50.0)]:  # w^2 is a quadratic of curvature 2
        expected = quadratic_llc(np.array([2.0]), nbeta, localization)
        assert finite_normal_crossing_llc((1,), nbeta, localization) == pytest.approx(expected, rel=1e-9)
    # Monte Carlo over the prior, in six standard errors.
    rng = np.random.default_rng(0)
    loss = 200 * np.prod(rng.standard_normal((3, 1_000_000)) / np.sqrt(2.0), axis=0) ** 2
    weight = np.exp(-loss)
    estimate = np.mean(loss * weight) / np.mean(weight)
    error = np.std((loss - estimate) * weight) / np.mean(weight) / 1000
    assert abs(finite_normal_crossing_llc((1, 1, 1), 200.0, 2.0) - estimate) < 6 * error
    assert finite_normal_crossing_llc((1, 2), 1e30, 1.0) == pytest.approx(0.25, abs=1e-6)


def test_finite_tanh():
    # One unit, by one-dimensional quadrature (scipy.integrate.quad); inputs so near 0 that tanh is linear: w1^2 w2^2 again.
    for nbeta, value in [(263.0, 0.3422448), (1085.74, 0.3708687), (1e5, 0.4184604)]:
        assert finite_tanh_llc(1, 1.0, nbeta, 1.0) == pytest.approx(value, rel=1e-4)
    linear = finite_normal_crossing_llc((1, 1), 1000.0 * 0.01**2 / 6, 2.0)
    assert finite_tanh_llc(1, 0.01, 1000.0, 2.0) == pytest.approx(linear, rel=1e-3)
