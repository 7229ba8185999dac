"""What the plots of studies share: which trials go together, averages over seeds, panels and logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambda_hat.batch_size.fits import Optimum, Slope, optimum, over_rates
from lambda_hat.batch_size.study import Group, distinct
from lambda_hat.specs.text import number, with_error
from lambda_hat.studies.style import MAX_COLUMNS, evenly, fence, grid

#: Panels of a figure and lines of a panel that can still be told apart; of more, evenly spaced ones are shown.
MAX_PANELS, MAX_LINES = 9, 7

LABELS = {
    "batch_size": "batch size B (samples)",
    "eta": "learning rate η",
    "temperature": "temperature η/B",
    "richness": "richness γ",
    "width": "width N (units)",
}
LOSSES = {"mse": "mean squared error", "cross_entropy": "cross-entropy (nats)"}


def too_few(table: pd.DataFrame, *axes: str, least: int = 2) -> str:
    """Why a plot over these axes cannot be drawn, where `groups` finds nothing."""
    counts = " and ".join(str(table[axis].nunique()) for axis in axes)
    return f"it takes {least} values of {' and of '.join(axes)} in one setting; found {counts} in all of them"


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


def over_seeds(table: pd.DataFrame, *axes: str, of: str = "final_loss") -> pd.DataFrame:
    """Rows of the axes, and of each `median`, `low` and `high` of a column over the seeds.

    A trial that failed counts as infinite; what was not measured does not count.
    """
    value = table[of].astype(np.float64).where(table["failure"].isna(), np.inf)
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
        etas, losses = over_rates(table[table[by] == value])
        best = optimum(etas, losses)
        if best.flag != "none" and len(etas) > 2:
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


def some(drawn: Sequence[Any], every: Sequence[Any], what: str) -> str:
    """How many of what there is are drawn, where not all are."""
    return f"{len(drawn)} of {len(every)} {what}" if len(drawn) < len(every) else ""


def panels(
    title: Sequence[str], table: pd.DataFrame, count: int, found: int, columns: int = MAX_COLUMNS, height: float = 3.2,
    **subplots: Any,
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A figure of `count` panels under a title of several parts, which says so where more were found."""
    heading = " · ".join(filter(None, [*title, seeds_text(table)]))
    return grid(heading, identity(table), count, found, columns, height, **subplots)


def loss_axis(axes: Sequence[Axes], losses: np.ndarray) -> None:
    """Logarithmic losses, within limits that outliers do not stretch."""
    positive = np.asarray(losses, np.float64)[np.asarray(losses) > 0]
    low, high = fence(np.log10(positive))
    margin = 0.06 * (high - low) or 0.1
    for ax in axes:
        ax.set(yscale="log", ylim=(10 ** (low - margin), 10 ** (high + margin)))


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


def slope_text(slope: Slope) -> str:
    """An exponent and its standard error, to a thousandth."""
    return with_error(slope.slope, slope.error) if slope.error >= 1e-3 else f"{slope.slope:z.3f}"
