"""How things scale: the best learning rate and the layers' changes with the width, the steps needed with the batch size."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lambda_hat.batch_size.fits import power_slope, width_transfer
from lambda_hat.batch_size.plots.common import (
    LABELS,
    MAX_LINES,
    columns_of,
    loss_axis,
    loss_label,
    optima,
    over_seeds,
    panels,
    shown,
    slope_text,
    some,
    too_few,
)
from lambda_hat.batch_size.study import Study, groups
from lambda_hat.batch_size.trades import Trade, trades
from lambda_hat.specs.text import number
from lambda_hat.studies.style import BAND, COLORS, EXACT, MARKERS, color, evenly, finish, log_axis, sequential, title


def plot_width_transfer(study: Study) -> Figure | str:
    """Final loss against learning rate, a line for each width with its best rate, and a panel for each other setting: the best
    rates are one where the rate transfers."""
    found = groups(study.table, "width", "eta")
    if not found:
        return too_few(study.table, "width", "eta")
    if study.table["failure"].notna().all():
        return "every trial failed"
    chosen, every = shown(found), sorted(set(study.table["width"]))
    widths = evenly(every, MAX_LINES)
    heading = ["learning-rate transfer across widths", some(widths, every, "widths")]
    fig, axes = panels(heading, study.table, len(chosen), len(found), columns_of(chosen), sharey=True)
    drawn = []
    stars: dict[str, Line2D] = {}  # those that are drawn, in no width's colour
    for ax, group in zip(axes, chosen, strict=True):
        cells = over_seeds(group.table, "width", "eta")
        best = optima(group.table, "width")
        log_axis(ax, "x", cells["eta"])
        for width, shade in zip(widths, sequential(len(widths)), strict=True):
            line = cells[(cells["width"] == width) & np.isfinite(cells["median"])]
            if line.empty:
                continue
            drawn.append(line["median"])
            ax.plot(line["eta"], line["median"], ".-", color=shade, linewidth=1.4, label=f"N={width}")
            high = line["high"].where(np.isfinite(line["high"]), line["median"])
            ax.fill_between(line["eta"], line["low"], high, **BAND, color=shade)
            if width in best:
                at_end = best[width].flag == "edge"
                label, face = ("at an end of the η tried", "white") if at_end else ("best η", None)
                ax.plot(2.0 ** best[width].log2_eta, best[width].loss, "*", color=shade, ms=12, mfc=face or shade)
                stars[label] = Line2D([], [], marker="*", ls="none", color=EXACT, ms=10, mfc=face or EXACT, label=label)
        slope = width_transfer(group.table).slope
        title(ax, group.label, "" if slope is None else f"exponent of best η over N: {slope_text(slope)}")
    loss_axis(axes, np.concatenate(drawn))
    finish(fig, axes, LABELS["eta"], f"final {loss_label(study.table)}", list(stars.values()))
    return fig


def plot_coordinate_check(study: Study) -> Figure | str:
    """The root mean square change of each layer's output in training against the width, at the learning rate that is best for
    all widths together, of those at which none failed; slopes near 0 are what muP is made for."""
    layers = [str(name) for name in study.table if str(name).startswith("activation_change_")]
    several = [group for group in groups(study.table, "width", "eta", least=1) if group.table["width"].nunique() > 1]
    rates = [_common_rate(group.table) for group in several]
    found = [group._replace(table=group.table[group.table["eta"] == rate])
             for group, rate in zip(several, rates, strict=True) if rate is not None]  # fmt: skip
    if not several:
        return too_few(study.table, "width")
    if not found:
        return "it takes a learning rate at which fewer than half of the seeds fail, at every width; there is none"
    if not any((group.table[layers] > 0).any(axis=None) for group in found):
        return "no layer's output changed"
    chosen, heading = shown(found), ["change of each layer's output in training"]
    fig, axes = panels(heading, study.table, len(chosen), len(found), columns_of(chosen), sharey=True)
    drawn: list[float] = []
    for ax, group in zip(axes, chosen, strict=True):
        log_axis(ax, "x", group.table["width"])
        for index, name in enumerate(layers):
            rows = group.table[(group.table[name] > 0) & group.table["failure"].isna()]
            if rows.empty:
                continue
            cells = over_seeds(rows, "width", of=name)
            drawn += [cells["low"].min(), cells["high"].max()]
            errors = [cells["median"] - cells["low"], cells["high"] - cells["median"]]
            slope = power_slope(rows["width"].to_numpy(), rows[name].to_numpy())
            text = f"layer {index + 1}" + ("" if slope is None else f": slope {slope_text(slope)}")
            marker = MARKERS[index % len(MARKERS)]
            ax.errorbar(cells["width"], cells["median"], errors, color=color(index), marker=marker, capsize=2, label=text)
        title(ax, group.label, f"η={number(group.table['eta'].iloc[0])}")
        ax.legend(fontsize=7, framealpha=0.8)
    # A decade at least, on which what does not change looks so.
    low, high = min(drawn), max(drawn)
    reach = max(math.sqrt(10), math.sqrt(high / low)) * 1.2
    axes[0].set(yscale="log", ylim=(math.sqrt(low * high) / reach, math.sqrt(low * high) * reach))
    finish(fig, axes, LABELS["width"], "RMS change of activations", named=False)
    return fig


def plot_steps_to_target(study: Study) -> Figure | str:
    """Steps and samples to the target loss, each batch size at the learning rate that needs fewest, with the fitted trade of
    one for the other, the critical batch size and, where it was measured, the gradient noise scale."""
    needed = trades(study)
    if not needed:
        goal = "a loss" if study.target_loss is None else f"the target loss, {study.target_loss:.3g}"
        return f"it takes three batch sizes of one setting that reach {goal} after the first step; no setting has them"
    chosen = evenly(needed, len(COLORS))
    heading = [f"training to a loss of {study.target_loss:.3g}", some(chosen, needed, "settings")]
    fig, axes = panels(heading, study.table, 2, 2, height=3.6 + 0.12 * len(chosen))
    for index, trade in enumerate(chosen):
        _trade(axes, trade, color(index))
    for ax in axes:
        log_axis(ax, "x", pd.concat([trade.table["batch_size"] for trade in chosen]))
        ax.set(yscale="log", xlabel=LABELS["batch_size"])
    hollow = Line2D([], [], marker="o", linestyle="none", color=EXACT, mfc="white", label="at an end of the η tried")
    at_end = any(trade.table["at_end"].any() for trade in chosen)
    finish(fig, axes, LABELS["batch_size"], "steps to the target", [hollow] if at_end else [], ncols=1)
    axes[1].set_ylabel("samples to the target")
    return fig


def _trade(axes: list[Axes], trade: Trade, shade: str) -> None:
    """Steps and samples over the batch size, and the fit."""
    table, fit = trade.table, trade.fit
    cells = over_seeds(table, "batch_size", of="steps")
    sizes = cells["batch_size"].to_numpy(np.float64)
    at_end = table.groupby("batch_size")["at_end"].any().to_numpy()
    texts = [trade.label] if trade.label else []
    if fit is not None:
        interval = "[{:.3g}, {:.3g}]".format(*fit.batch_size_interval)
        texts.append(f"B_crit {fit.batch_size:.3g} {interval}" if fit.in_range else "B_crit beyond the batch sizes tried")
    if trade.noise_scale is not None:
        texts.append(f"gradient noise scale {trade.noise_scale:.3g} (dotted)")
    for ax, unit in zip(axes, (np.ones_like(sizes), sizes), strict=True):
        steps, low, high = (cells[name].to_numpy() * unit for name in ("median", "low", "high"))
        ax.errorbar(sizes, steps, [steps - low, high - steps], fmt="o", color=shade, capsize=2, markersize=5)
        ax.plot(sizes[at_end], steps[at_end], "o", color=shade, markerfacecolor="white", markersize=5, zorder=3)
        ax.plot([], [], "o-", color=shade, label=", ".join(texts) or "steps")
        if fit is not None:
            x = np.geomspace(sizes[0], sizes[-1], 100)
            ax.plot(x, fit.min_steps * (1 + fit.batch_size / x) * (x if unit is sizes else 1.0), color=shade, linewidth=1.4)
            if fit.in_range:
                ax.axvline(fit.batch_size, color=shade, linestyle="--", linewidth=1.2)
        if trade.noise_scale is not None:
            ax.axvline(trade.noise_scale, color=shade, linestyle=":", linewidth=1.6)


def _common_rate(table: pd.DataFrame) -> float | None:
    """The learning rate of the lowest loss, on geometric average over the widths, of those at which no width failed."""
    losses = over_seeds(table, "width", "eta").pivot(index="eta", columns="width", values="median")
    survived = losses[np.isfinite(losses).all(axis=1)]
    if survived.empty:
        return None
    mean = np.log(survived.clip(lower=np.finfo(float).tiny).to_numpy()).mean(axis=1)
    return float(survived.index.to_numpy()[int(np.argmin(mean))])
