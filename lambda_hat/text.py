"""Numbers as people read them."""

from __future__ import annotations


def with_error(value: float | None, error: float | None) -> str:
    """Value and error to the error's second digit; "-" for no value."""
    if value is None:
        return "-"
    if not error:
        return f"{value:.4g}"
    places = max(0, 1 - int(f"{error:e}".split("e")[1]))
    return f"{value:.{places}f} ± {error:.{places}f}"
