"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any


def with_error(value: float | None, error: float | None) -> str:
    """Value and error to the error's second digit; "-" for no value."""
    if value is None:
        return "-"
    if not error:
        return f"{value:.4g}"
    places = max(0, 1 - int(f"{error:e}".split("e")[1]))
    return f"{value:.{places}f} ± {error:.{places}f}"


def number(value: Any) -> str:
    """A setting as text; small powers of two, and small or large ones of ten, as such."""
    if not isinstance(value, float):
        return str(value)
    if not value > 0:
        return "none" if value != value else f"{value:g}"
    if value < 0.25 and is_power_of_two(value):
        return power(2, math.log2(value))
    ten = round(math.log10(value))
    return power(10, ten) if abs(ten) > 3 and value == float(f"1e{ten}") else f"{value:.4g}"


def is_power_of_two(value: float) -> bool:
    """Whether it is 2^k with a whole k."""
    return math.frexp(value)[0] == 0.5


def power(base: int, exponent: float) -> str:
    """base^exponent with a raised exponent."""
    return f"{base}" + f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
