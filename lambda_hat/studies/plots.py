"""The plots of a study, drawn by name; why others cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from lambda_hat.specs.settings import nearest
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.studies.style import save_png


class Drawn(NamedTuple):
    """The plots of a study. pngs: name -> PNG. left_out: name -> why it cannot be drawn."""

    pngs: dict[str, bytes]
    left_out: dict[str, str]


def draw_chosen(plots: Mapping[str, Callable[[Any], Figure | str]], study: Any, names: Sequence[str] | None = None) -> Drawn:
    """The plots of these names, or all, of a study: a plot that cannot be drawn of it returns the reason.

    Raises:
      InvalidInput: a name is not that of a plot. RuntimeError: a plot fails; it says which.
    """
    if unknown := [name for name in names or () if name not in plots]:
        raise InvalidInput(f"A plot must be known by name; got {unknown[0]!r}. {nearest(unknown[0], plots)}")
    drawn = Drawn({}, {})
    for name in plots if names is None else dict.fromkeys(names):
        try:
            found = plots[name](study)
        except Exception as error:
            raise RuntimeError(f"the plot {name} failed: {type(error).__name__}: {error}") from error
        if isinstance(found, Figure):
            drawn.pngs[name] = save_png(found)
        else:
            drawn.left_out[name] = found
    return drawn
