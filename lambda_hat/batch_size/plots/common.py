"""What the plots of studies share: which trials go together, averages over seeds, panels and logarithmic axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lambda_hat.batch_size.fits import Optimum, Slope, optimum
from lambda_hat.batch_size.study import comparable, distinct, swept
from lambda_hat.plots.style import Picture
from lambda_hat.text import with_error

T = TypeVar("T")

#: Panels of a figure and lines of a panel that can still be told apart; of more, evenly spaced ones are shown.
MAX_PANELS, MAX_LINES = 9, 7
MAX_COLUMNS = 3
#: Letters in a line of a panel's title.
TITLE_WIDTH = 46
#: A space at which no line is broken.
HARD = "\N{NO-BREAK SPACE}"
#: Labelled values on an axis.
MAX_TICKS = 9

#: The window over which loss curves are smoothed before they are compared, as a share of the steps done.
WINDOW = 0.2

LABELS = {
    "batch_size": "batch size B (samples)",
    "eta": "learning rate η",
    "temperature": "temperature η/B",
    "richness": "richness γ",
    "width": "width N (units)",
}
LOSSES = {"mse": "mean squared error", "cross_entropy": "cross-entropy (nats)"}


class Group(NamedTuple):
    """Trials that differ in the axes of a plot and in the seed alone. values: their other swept settings."""

    values: dict[str, Any]
    table: pd.DataFrame

    @property
    def label(self) -> str:
        return " · ".join(f"{name.removeprefix('task.')}={number(value)}" for name, value in self.values.items())


def groups(table: pd.DataFrame, *axes: str, least: int = 2) -> list[Group]:
    """The trials by all swept settings but the axes and the seed, in order; only those of `least` values of every axis."""
    names = [name for name in swept(table) if name not in (*axes, "seed")]
    if not names:
        found = [Group({}, table)]
    else:
        keys = [comparable(table[name]) for name in names]
        found = [Group(dict(zip(names, values, strict=True)), of) for values, of in table.groupby(keys, dropna=False)]
    return [group for group in found if all(group.table[axis].nunique() >= least for axis in axes)]


def shown(found: Sequence[Group], most: int = MAX_PANELS) -> list[Group]:
    """At most `most` of the groups, evenly spaced in each of their settings."""
    values = {name: list(dict.fromkeys(group.values[name] for group in found)) for name in (found[0].values if found else ())}
    counts = {name: len(of) for name, of in values.items()}
    while math.prod(counts.values()) > most:
        counts[max(counts, key=lambda name: counts[name])] -= 1
    chosen = {name: evenly(of, counts[name]) for name, of in values.items()}
    product = [group for group in found if all(group.values[name] in of for name, of in chosen.items())]
    # Settings that were not crossed have few trials at crossings.
    return product if 2 * len(product) > min(most, len(found)) else evenly(found, most)


def columns_of(found: Sequence[Group]) -> int:
    """Columns that put equal values of all settings but the last into a row, if they fit."""
    last = len({list(group.values.values())[-1] for group in found}) if found[0].values else 1
    return last if last in (2, MAX_COLUMNS, MAX_COLUMNS + 1) and len(found) % last == 0 else MAX_COLUMNS


def fullest(found: Sequence[Group]) -> Group:
    """The group with most trials, of several the middle one."""
    most = max(len(group.table) for group in found)
    full = [group for group in found if len(group.table) == most]
    return full[len(full) // 2]


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, most).round().astype(int)]


def over_seeds(table: pd.DataFrame, *axes: str, of: str = "final_loss") -> pd.DataFrame:
    """Rows of the axes, and of each `median`, `low` and `high` of a column over the seeds.

    A trial without a final loss diverged, which counts as infinite; what was not measured does not count.
    """
    value = table[of].astype(np.float64).where(table["final_loss"].notna(), np.inf)
    by_axes = value.groupby([table[axis] for axis in axes])
    found = pd.DataFrame({"median": by_axes.median(), "low": by_axes.min(), "high": by_axes.max()})
    return found.dropna().reset_index()


def temperature(table: pd.DataFrame) -> pd.Series:
    """eta / B, the same number where quotients of decimals differ in their last digits."""
    return table["temperature"].groupby(np.log(table["temperature"]).round(9)).transform("first")


def optima(table: pd.DataFrame, by: str) -> dict[float, Optimum]:
    """The best learning rate at each value of `by`, of trials that differ in `by`, eta and seed alone; of three and more."""
    found = {}
    for value in distinct(table[by]):
        grid = table[table[by] == value].pivot(index="seed", columns="eta", values="final_loss")
        best = optimum(grid.columns.to_numpy(np.float64), grid.to_numpy(np.float64))
        if best.flag != "none" and grid.shape[1] > 2:
            found[value] = best
    return found


def seeds_text(table: pd.DataFrame) -> str:
    """How many seeds a median is of."""
    count = table["seed"].nunique()
    return f"median of {count} seeds" if count > 1 else "one seed"


def loss_label(table: pd.DataFrame) -> str:
    """The loss and its unit."""
    kinds = distinct(table["loss"])
    return LOSSES.get(kinds[0], kinds[0]) if len(kinds) == 1 else "loss"


def panels(
    title: str, table: pd.DataFrame, count: int, found: int, columns: int = MAX_COLUMNS, height: float = 3.2, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels under a title, which says so where more were found."""
    columns = min(columns, count)
    rows = -(-count // columns)
    fig = Picture(figsize=(min(max(7.0, 3.7 * columns), 12.0), 0.8 + height * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **subplots).ravel()
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        ax.tick_params(which="both", labelsize=9)
    left_out = f" · {count} of {found} panels" if found > count else ""
    title = f"{title} · {seeds_text(table)}{left_out}\n{identity(table)}"
    fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig, list(axes[:count])


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
        fig.legend(handles, names, loc="outside lower left", ncols=ncols, fontsize=8, frameon=False)


def loss_axis(axes: Sequence[Axes], losses: np.ndarray) -> None:
    """Logarithmic losses, within limits that outliers do not stretch."""
    positive = np.asarray(losses, np.float64)[np.asarray(losses) > 0]
    low, high = fence(np.log10(positive))
    margin = 0.06 * (high - low) or 0.1
    for ax in axes:
        ax.set(yscale="log", ylim=(10 ** (low - margin), 10 ** (high + margin)))


def title(ax: Axes, *parts: str) -> None:
    """A panel's title, in lines that fit it, broken between parts."""
    text = " · ".join(filter(None, parts)).replace(" ", HARD).replace(f"{HARD}·{HARD}", f"{HARD}· ")
    ax.set_title(
        textwrap.fill(text, TITLE_WIDTH, break_on_hyphens=False).replace(f"{HARD}·\n", "\n").replace(HARD, " "), fontsize=9
    )


def sequential(count: int) -> list[Any]:
    """Colours of lines that have an order, told apart by all kinds of sight; the palest, too pale for a line, left out."""
    return [colormaps["viridis"](place) for place in np.linspace(0, 0.88, count)]


def identity(table: pd.DataFrame) -> str:
    """What all trials have in common."""
    names = (
        "task.dataset", "task.kind", "optimizer", "parameterization",
        "depth", "width", "richness", "batch_size", "eta", "num_steps",
    )  # fmt: skip
    same = {name: distinct(table[name])[0] for name in names if name in table and len(distinct(table[name])) == 1}
    if "task.dataset" in same:
        same.pop("task.kind", None)
    texts = [f"{name}={number(value)}" if isinstance(value, int | float) else str(value) for name, value in same.items()]
    return " · ".join(texts)


def number(value: Any) -> str:
    """A setting as text; small powers of two, and small or large ones of ten, as such."""
    if not isinstance(value, float):
        return str(value)
    if not value > 0:
        return "none" if value != value else f"{value:g}"
    if value < 0.25 and _is_power_of_two(value):
        return _power(2, math.log2(value))
    ten = round(math.log10(value))
    return _power(10, ten) if abs(ten) > 3 and value == float(f"1e{ten}") else f"{value:.4g}"


def _is_power_of_two(value: float) -> bool:
    return math.frexp(value)[0] == 0.5


def _power(base: int, exponent: float) -> str:
    return f"{base}" + f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def slope_text(slope: Slope) -> str:
    """An exponent and its standard error, to a thousandth."""
    return with_error(slope.slope, slope.error) if slope.error >= 1e-3 else f"{slope.slope:z.3f}"


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
    powers = all(map(_is_power_of_two, values)) and values[-1] / values[0] >= 64
    axis.set_ticks(
        ticks, [_power(2, math.log2(value)) if powers else number(float(f"{value:.3g}")) for value in ticks], fontsize=9
    )
    axis.set_minor_locator(NullLocator())


def fence(values: np.ndarray) -> tuple[float, float]:
    """The lowest value and the highest that is no outlier (Tukey's: above the upper quartile by 1.5 of their distance)."""
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    lower, upper = np.quantile(values, (0.25, 0.75))
    return float(values.min()), float(values[values <= upper + 1.5 * (upper - lower)].max())
