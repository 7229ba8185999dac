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
from matplotlib.patches import Polygon

from lambda_hat.batch_size.fits import LAZY, RICH, richness_slopes
from lambda_hat.batch_size.plots.common import (
    LABELS,
    columns_of,
    loss_label,
    optima,
    over_seeds,
    panels,
    shown,
    slope_text,
    too_few,
)
from lambda_hat.batch_size.study import Study, groups
from lambda_hat.studies.style import COLORS, EXACT, fence, finish, log_axis, title

#: The share of cells with a trial below which a set of trials is no grid, and is drawn as points.
FILLED = 0.15
#: Where trials failed.
FAILED: dict[str, Any] = {"facecolor": "#E0E0E0", "edgecolor": "#8A8A8A", "hatch": "////", "linewidth": 0.0}
#: Optima and lines, each named in the legend where it is drawn.
BEST: dict[str, Any] = {
    "marker": "o", "color": "black", "markerfacecolor": "white", "markersize": 5, "linestyle": "none", "label": "best η"
}  # fmt: skip
AT_END: dict[str, Any] = {
    "marker": "X", "color": "white", "markerfacecolor": "black", "markersize": 6, "linestyle": "none",
    "label": "at an end of the η tried",
}  # fmt: skip
FITTED: dict[str, Any] = {"color": COLORS[1], "linewidth": 2.5, "label": "fitted power"}
THEORY: dict[str, Any] = {"color": "black", "linewidth": 1.2, "linestyle": "--", "label": "theory"}


def plot_heatmap_batch(study: Study) -> Figure | str:
    """log10 of the final loss over batch size and learning rate, with the best learning rate of each batch size; a panel for
    each other setting."""
    return _loss_maps(study, "batch_size", "batch size")


def plot_heatmap_temp(study: Study) -> Figure | str:
    """log10 of the final loss over temperature eta/B and learning rate, with the best learning rate of each batch size: columns
    of one colour where the temperature alone matters."""
    return _loss_maps(study, "batch_size", "temperature", over_temperature=True)


def plot_heatmap_gamma(study: Study) -> Figure | str:
    """log10 of the final loss over richness and learning rate, with the best learning rate of each richness, its fitted powers
    of the richness, and dashed the theory's."""
    return _loss_maps(study, "richness", "richness")


def _loss_maps(study: Study, by: str, name: str, over_temperature: bool = False) -> Figure | str:
    found = groups(study.table, by, "eta")
    if not found:
        return too_few(study.table, by, "eta")
    chosen = shown(found)
    heading = [f"final loss over {name} and learning rate"]
    fig, axes = panels(heading, study.table, len(chosen), len(found), columns_of(chosen))
    maps = [over_seeds(group.table, by, "eta") for group in chosen]
    values = [log10(cells["median"]) for cells in maps]
    low, high = fence(np.concatenate(values))
    norm = Normalize(low, max(low + 0.01, high))
    for ax, group, cells, of in zip(axes, chosen, maps, values, strict=True):
        drawn = heatmap(ax, cells, by, of, norm, over_temperature=over_temperature)
        for value, best in optima(group.table, by).items():
            eta = 2.0**best.log2_eta
            x = eta / value if over_temperature else value
            ax.plot(x, eta, zorder=3, **(AT_END if best.flag == "edge" else BEST))
        title(ax, group.label, *(_slopes(ax, group.table) if by == "richness" else ()))
    color_bar(fig, drawn, axes, np.concatenate(values), f"log₁₀ {loss_label(study.table)}")
    finish(fig, axes, LABELS["temperature" if over_temperature else by], LABELS["eta"])
    return fig


def _slopes(ax: Axes, table: pd.DataFrame) -> list[str]:
    """Lines of fitted powers of the richness, and dashed through their middles the theory's; both as text. Of raw learning
    rates alone, as others are scaled with the richness already."""
    if set(table["rate_rule"]) != {"raw"}:
        return []
    found = richness_slopes(table)
    sides = (("lazy", found.lazy, found.richness <= LAZY), ("rich", found.rich, found.richness >= RICH))
    texts = []
    for (name, slope, side), theory in zip(sides, found.theory, strict=True):
        if slope is not None:
            x = np.setdiff1d(found.richness[side], slope.left_out)
            middle = float(np.exp(np.log(x).mean()))
            ax.plot(x, np.exp(slope.intercept) * x**slope.slope, **FITTED)
            ax.plot(x, np.exp(slope.intercept) * middle**slope.slope * (x / middle) ** theory, **THEORY)
            texts.append(f"{name}: γ^{slope_text(slope)}, theory {theory:.3g}")
    return texts


def log10(loss: pd.Series) -> np.ndarray:
    """log10, of zero that of the smallest positive loss; infinite stays so."""
    values = loss.to_numpy(np.float64)
    return np.log10(np.maximum(values, np.min(values, where=values > 0, initial=1.0)))


def heatmap(
    ax: Axes,
    cells: pd.DataFrame,
    by: str,
    values: np.ndarray,
    norm: Normalize,
    cmap: str = "viridis",
    over_temperature: bool = False,
) -> ScalarMappable:
    """The values over a column, or eta divided by it, and eta, on logarithmic axes; hatched where infinite, as those of trials
    that failed are; as points where the cells are no grid."""
    x = cells["eta"] / cells[by] if over_temperature else cells[by]
    log_axis(ax, "x", x)
    log_axis(ax, "y", cells["eta"])
    columns, column = np.unique(cells[by], return_inverse=True)
    rows, row = np.unique(cells["eta"], return_inverse=True)
    finite = np.isfinite(values)
    if len(values) < FILLED * len(columns) * len(rows):
        if not finite.all():
            ax.scatter(x[~finite], cells["eta"][~finite], marker="x", color=FAILED["edgecolor"], s=20, label="failed")
        at = (x[finite], cells["eta"][finite])
        return ax.scatter(*at, c=values[finite], norm=norm, cmap=cmap, s=30, edgecolors=EXACT, linewidths=0.4)
    grid = np.full((len(rows), len(columns)), np.nan)
    grid[row, column] = np.where(finite, values, np.nan)
    across, up = np.meshgrid(_edges(columns), _edges(rows))
    # Over the temperature cells are slanted, and leave no gaps whatever the steps of both.
    across = up / across if over_temperature else across
    corners = np.stack([across, up], axis=-1)
    lost = [Polygon([corners[i, j], corners[i, j + 1], corners[i + 1, j + 1], corners[i + 1, j]])
            for i, j in zip(row[~finite], column[~finite], strict=True)]  # fmt: skip
    if lost:
        ax.add_collection(PatchCollection(lost, **FAILED))
        ax.fill(np.nan, np.nan, **FAILED, label="failed")  # a legend cannot show the collection
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
