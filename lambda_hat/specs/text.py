"""Numbers, values and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: Of an llc that the prior holds, from which it is said.
PRIOR_SHARE = 0.1


def with_error(value: float | None, error: float | None) -> str:
    """Value and error to the error's second digit; "-" for no value."""
    if value is None:
        return "-"
    if not error:
        return f"{value:.4g}"
    places = max(0, 1 - int(f"{error:e}".split("e")[1]))
    return f"{value:.{places}f} ± {error:.{places}f}"


def verdict_text(verdict: str, prior_share: float | None) -> str:
    """The verdict on a run, with how much of its llc the prior holds where that is worth saying."""
    return verdict if prior_share is None or prior_share <= PRIOR_SHARE else f"{verdict}, prior {prior_share:.0%}"


def shortened(value: object, most: int = 80) -> str:
    """The value as Python writes it, on one line of at most `most` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def listed(names: Sequence[str], most: int = 8) -> str:
    """The names with commas; of very many the first ones, and how many there are."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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


def listing(tables: Mapping[str, Mapping[str, str]]) -> str:
    """Names and what they are, one line each, under titles."""
    width = max(len(name) for table in tables.values() for name in table)
    return "\n\n".join(
        "\n".join([title, *(f"  {name:{width}}  {text}".rstrip() for name, text in table.items())])
        for title, table in tables.items()
    )


def described(table: Mapping[str, Any]) -> dict[str, str]:
    """The descriptions of presets, experiments or fields, by name."""
    return {name: entry.description or "" for name, entry in table.items()}
