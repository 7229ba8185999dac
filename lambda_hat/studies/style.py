"""What all plots share: colours, titles, limits, and how a figure becomes a file."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image

from lambda_hat.specs.text import is_power_of_two, number, power

T = TypeVar("T")

#: Okabe & Ito's colours for all kinds of sight, less yellow, too pale for a line, and black, the pooled estimate's.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = ("-", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
POOLED, EXACT = "black", "#666666"

#: Dots per inch of a file.
DPI = 110
#: Points of a line, some two pixels apart; more are not seen.
MAX_POINTS = 400

#: Columns of panels, letters in a line of a panel's title, and labelled values on an axis.
MAX_COLUMNS, TITLE_WIDTH, MAX_TICKS = 3, 46, 9
#: Letters that fit in an inch of a figure's title, and of its legend, whose lines begin with handles of so many inches.
LETTERS_PER_INCH, LEGEND_LETTERS_PER_INCH, LEGEND_HANDLE = 11.3, 16.5, 0.55
#: A space at which no line is broken.
HARD = "\N{NO-BREAK SPACE}"

#: A shaded range.
BAND: dict[str, Any] = {"alpha": 0.2, "linewidth": 0}
#: The end of a running estimate, marked.
LAST: dict[str, Any] = {"marker": "o", "markersize": 4, "markevery": [-1]}


class Picture(Figure):
    """A figure that a notebook shows: of those that pyplot does not make it shows the names only."""

    def _repr_png_(self) -> bytes:
        return save_png(self)


def save_png(fig: Figure) -> bytes:
    """The figure as a PNG file of 256 colours, which takes a third of the room and looks the same."""
    fig.set_dpi(DPI)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    # An octree keeps rare colours; a median cut, the default, gives a short line its neighbour's.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture = picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.save(file, format="png")
    return file.getvalue()


def head(fig: Figure, title: str, identity: str) -> None:
    """What is shown on the left, and small on the right what it is of."""
    fig.suptitle(title, x=0.01, ha="left", fontsize=11)
    fig.text(0.99, 0.99, identity, ha="right", va="top", fontsize=7, color=EXACT)


def color(index: int | np.integer) -> str:
    return COLORS[index % len(COLORS)]


def legend(fig: Figure, ax: Axes, ncols: int = 4) -> None:
    handles, names = ax.get_legend_handles_labels()
    if handles:
        fig.legend(handles, names, loc="outside lower left", ncols=ncols, fontsize=8, frameon=False)


def log_ticks(ax: Axes, unit: str = "") -> None:
    """Some three to nine labelled ticks on a logarithmic x axis, however many decades it spans."""
    decades = np.diff(np.log10(ax.get_xlim()))[0]
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5) if decades > 0.4 else tuple(range(1, 10))))
    ax.xaxis.set_major_formatter(EngFormatter(unit, sep=" " if unit else ""))
    ax.xaxis.set_minor_formatter(NullFormatter())


def say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.6, text, transform=ax.transAxes, ha="center")


def limits(values: np.ndarray, exact: float | None = None, tails: float = 0.0) -> tuple[float, float]:
    """Limits that show all but the tails of `values`, and the exact llc."""
    low, high = (float(np.quantile(values, q)) for q in (tails, 1 - tails))
    if exact is not None:
        low, high = min(low, exact), max(high, exact)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


# --- Figures of many panels --------------------------------------------------------------------------------------------------


def grid(
    heading: str, common: str, count: int, found: int, columns: int = MAX_COLUMNS, height: float = 3.2, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels under a heading, which says so where more were found, and what they have in common."""
    columns = min(columns, count)
    rows = -(-count // columns)
    fig = Picture(figsize=(min(max(7.0, 3.7 * columns), 12.0), 0.8 + height * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **subplots).ravel()
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        ax.tick_params(which="both", labelsize=9)
    left_out = f" · {count} of {found} panels" if found > count else ""
    say_over(fig, f"{heading}{left_out}", common)
    return fig, list(axes[:count])


def say_over(fig: Figure, heading: str, common: str) -> None:
    """A heading over a figure, and what its panels have in common, in lines that fit."""
    width = int(LETTERS_PER_INCH * fig.get_figwidth())
    fig.suptitle("\n".join(_lines(text, width) for text in (heading, common)), x=0.01, ha="left", fontsize=10)


def finish(
    fig: Figure,
    axes: Sequence[Axes],
    xlabel: str,
    ylabel: str,
    marks: Sequence[Artist] = (),
    ncols: int = 4,
    named: bool = True,
) -> None:
    """Labels at the left and below, and, where panels name their lines alike, one legend, with `marks` at its end."""
    grid = axes[0].get_gridspec()
    columns = grid.ncols if grid is not None else 1
    for index, ax in enumerate(axes):
        if index % columns == 0:
            ax.set_ylabel(ylabel)
        if index + columns >= len(axes):
            ax.set_xlabel(xlabel)
            ax.tick_params(labelbottom=True)
    if named:
        of_lines = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
        handles = [*of_lines.values(), *marks]
        names = [*of_lines, *(str(mark.get_label()) for mark in marks)]
        longest = max(map(len, names), default=0)
        fitting = int(fig.get_figwidth() / (LEGEND_HANDLE + longest / LEGEND_LETTERS_PER_INCH))
        fig.legend(handles, names, loc="outside lower left", ncols=max(1, min(ncols, fitting)), fontsize=8, frameon=False)


def title(ax: Axes, *parts: str) -> None:
    """A panel's title, in lines that fit it, broken between parts."""
    grid = ax.get_gridspec()
    columns = max(MAX_COLUMNS, 1 if grid is None else grid.ncols)
    ax.set_title(_lines(" · ".join(filter(None, parts)), TITLE_WIDTH * MAX_COLUMNS // columns), fontsize=9)


def _lines(text: str, width: int) -> str:
    """A text of parts in lines of at most `width` letters, broken between parts."""
    hard = text.replace(" ", HARD).replace(f"{HARD}·{HARD}", f"{HARD}· ")
    return textwrap.fill(hard, width, break_on_hyphens=False).replace(f"{HARD}·\n", "\n").replace(HARD, " ")


def log_axis(ax: Axes, which: str, values: Iterable[float]) -> None:
    """A logarithmic axis with ticks at values of the study: as powers of two where all of them are."""
    values = sorted(set(values))
    axis = ax.xaxis if which == "x" else ax.yaxis
    ax.set(**{f"{which}scale": "log"})
    apart = (values[-1] / values[0]) ** (1 / MAX_TICKS)
    ticks = values[:1]
    for value in values[1:]:
        if value >= 0.999 * ticks[-1] * apart:
            ticks.append(value)
    powers = all(map(is_power_of_two, values)) and values[-1] / values[0] >= 64
    axis.set_ticks(
        ticks, [power(2, math.log2(value)) if powers else number(float(f"{value:.3g}")) for value in ticks], fontsize=9
    )
    axis.set_minor_locator(NullLocator())


def sequential(count: int) -> list[Any]:
    """Colours of lines that have an order, told apart by all kinds of sight; the palest, too pale for a line, left out."""
    return [colormaps["viridis"](place) for place in np.linspace(0, 0.88, count)]


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, most).round().astype(int)]


def fence(values: np.ndarray) -> tuple[float, float]:
    """The lowest value and the highest that is no outlier (Tukey's: above the upper quartile by 1.5 of their distance)."""
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    lower, upper = np.quantile(values, (0.25, 0.75))
    return float(values.min()), float(values[values <= upper + 1.5 * (upper - lower)].max())
