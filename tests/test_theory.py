"""Exact learning coefficients against worked values."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from lambda_hat.theory import deep_linear_llc, quadratic_llc

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
