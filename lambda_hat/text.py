"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def with_error(value: float | None, error: float | None) -> str:
    """Value and error to the error's second digit; "-" for no value."""
    if value is None:
        return "-"
    if not error:
        return f"{value:.4g}"
    places = max(0, 1 - int(f"{error:e}".split("e")[1]))
    return f"{value:.{places}f} ± {error:.{places}f}"


def shortened(value: object, most: int = 80) -> str:
    """The value as Python writes it, on one line of at most `most` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def listed(names: Sequence[str], most: int = 8) -> str:
    """The names with commas; of very many the first ones, and how many there are."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
