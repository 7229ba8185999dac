"""Maps of what was measured over two logarithmic axes: losses, learning coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from lambda_hat.batch_size.fits import LAZY, RICH, richness_slopes
from lambda_hat.batch_size.plots.common import (
    LABELS,
    columns_of,
    fence,
    finish,
    groups,
    log_axis,
    loss_label,
    optima,
    over_seeds,
    panels,
    shown,
    slope_text,
    temperature,
)
from lambda_hat.batch_size.study import Study
from lambda_hat.plots.style import COLORS, EXACT

#: The share of cells with a trial below which a set of trials is no grid, and is drawn as points.
FILLED = 0.15
#: Where trials diverged.
DIVERGED: dict[str, Any] = {"facecolor": "#E0E0E0", "edgecolor": "#8A8A8A", "hatch": "////", "linewidth": 0.0}
#: In legends.
BEST: dict[str, Any] = {"marker": "o", "color": "black", "markerfacecolor": "white", "markersize": 5, "linestyle": "none"}
AT_END: dict[str, Any] = {"marker": "X", "color": "white", "markerfacecolor": "black", "markersize": 6, "linestyle": "none"}
MARKS = (
    Line2D([], [], **BEST, label="best η"),
    Line2D([], [], **AT_END, label="at an end of the η tried"),
    Patch(**DIVERGED, label="diverged"),
)
NAMES = {"batch_size": "batch size", "temperature": "temperature", "richness": "richness"}


def plot_heatmap_batch(study: Study) -> Figure | None:
    """log10 of the final loss over batch size and learning rate, with the best learning rate of each batch size; a panel for
    each other setting. None for fewer than two values of either."""
    return _loss_maps(study.table, "batch_size", "batch_size")


def plot_heatmap_temp(study: Study) -> Figure | None:
    """log10 of the final loss over temperature eta/B and learning rate: columns of one colour where the temperature alone
    matters. With the best learning rate of each batch size. None for fewer than two batch sizes or learning rates."""
    return _loss_maps(study.table.assign(temperature=temperature(study.table)), "temperature", "batch_size")


def plot_heatmap_gamma(study: Study) -> Figure | None:
    """log10 of the final loss over richness and learning rate, with the best learning rate of each richness, its fitted powers
    of the richness, and dashed the theory's. None for fewer than two values of either."""
    return _loss_maps(study.table, "richness", "richness")


def _loss_maps(table: pd.DataFrame, x: str, by: str) -> Figure | None:
    found = groups(table, by, "eta")
    if not found:
        return None
    chosen = shown(found)
    fig, axes = panels(f"final loss over {NAMES[x]} and learning rate", table, len(chosen), len(found), columns_of(chosen))
    maps = [over_seeds(group.table, x, "eta") for group in chosen]
    values = [log10(cells["median"]) for cells in maps]
    low, high = fence(np.concatenate(values))
    for ax, group, cells, of in zip(axes, chosen, maps, values, strict=True):
        drawn = heatmap(ax, cells, x, of, Normalize(low, high))
        _ridge(ax, group.table, by, x)
        if x == "richness":
            _slopes(ax, group.table)
        ax.set_title(group.label, fontsize=9)
    color_bar(fig, drawn, axes, np.concatenate(values), f"log₁₀ {loss_label(table)}")
    finish(fig, axes, LABELS[x], LABELS["eta"], MARKS)
    return fig


def _ridge(ax: Axes, table: pd.DataFrame, by: str, x: str) -> None:
    """The best learning rate of each value of `by`, a cross where it is at an end of those tried."""
    for value, best in optima(table, by).items():
        eta = 2.0**best.log2_eta
        place = eta / value if x == "temperature" else value
        ax.plot(place, eta, zorder=3, **(AT_END if best.flag == "edge" else BEST))


def _slopes(ax: Axes, table: pd.DataFrame) -> None:
    """Fitted powers of the richness, and dashed through their middles the theory's; of raw learning rates alone, as others
    are scaled with the richness already."""
    if set(table["rate_rule"]) != {"raw"}:
        return
    found = richness_slopes(table)
    sides = [("lazy", found.lazy, found.richness <= LAZY), ("rich", found.rich, found.richness >= RICH)]
    names = {}
    for (name, slope, side), theory, color in zip(sides, found.theory, (COLORS[1], COLORS[3]), strict=True):
        if slope is None:
            continue
        x = found.richness[side]
        middle = float(np.exp(np.log(x).mean()))
        (line,) = ax.plot(x, np.exp(slope.intercept) * x**slope.slope, color=color, linewidth=2.5)
        ax.plot(x, np.exp(slope.intercept) * middle**slope.slope * (x / middle) ** theory, "--", color="black", linewidth=1.2)
        names[line] = f"{name}: γ^{slope_text(slope)} (theory, dashed: {theory:.3g})"
    if names:
        ax.legend(names.keys(), names.values(), loc="lower right", fontsize=7)


def log10(loss: pd.Series) -> np.ndarray:
    """log10, of zero that of the smallest positive loss; infinite stays so."""
    values = loss.to_numpy(np.float64)
    return np.log10(np.maximum(values, np.min(values, where=values > 0, initial=1.0)))


def heatmap(
    ax: Axes, cells: pd.DataFrame, x: str, values: np.ndarray, norm: Normalize, cmap: str = "viridis"
) -> ScalarMappable:
    """The values over a column and eta, on logarithmic axes; hatched where infinite; as points where the cells are no grid."""
    log_axis(ax, "x", cells[x])
    log_axis(ax, "y", cells["eta"])
    xs, columns = np.unique(cells[x], return_inverse=True)
    ys, rows = np.unique(cells["eta"], return_inverse=True)
    finite = np.isfinite(values)
    if len(values) < FILLED * len(xs) * len(ys):
        ax.scatter(xs[columns[~finite]], ys[rows[~finite]], marker="x", color=DIVERGED["edgecolor"], s=20)
        at = (xs[columns[finite]], ys[rows[finite]])
        return ax.scatter(*at, c=values[finite], norm=norm, cmap=cmap, s=30, edgecolors=EXACT, linewidths=0.4)
    grid = np.full((len(ys), len(xs)), np.nan)
    grid[rows, columns] = np.where(finite, values, np.nan)
    across, up = _edges(xs), _edges(ys)
    lost = [Rectangle((across[j], up[i]), across[j + 1] - across[j], up[i + 1] - up[i])
            for i, j in zip(rows[~finite], columns[~finite], strict=True)]  # fmt: skip
    ax.add_collection(PatchCollection(lost, **DIVERGED))
    return ax.pcolormesh(across, up, np.ma.masked_invalid(grid), norm=norm, cmap=cmap)


def color_bar(fig: Figure, drawn: ScalarMappable, axes: Sequence[Axes], values: np.ndarray, name: str) -> None:
    """A colour bar that says where values are above its colours."""
    above = np.any(values[np.isfinite(values)] > drawn.norm.vmax)
    bar = fig.colorbar(drawn, ax=axes, extend="max" if above else "neither")
    bar.set_label(name, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Edges of cells halfway between the centres in log."""
    log = np.log2(centres)
    if len(log) == 1:
        return 2.0 ** (log[0] + np.array([-0.5, 0.5]))
    middle = (log[1:] + log[:-1]) / 2
    return 2.0 ** np.concatenate([[2 * log[0] - middle[0]], middle, [2 * log[-1] - middle[-1]]])
