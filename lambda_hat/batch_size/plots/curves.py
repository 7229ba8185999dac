"""Loss curves: over samples or learning rate times steps at equal temperature, and over steps for each setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambda_hat.batch_size.critical import collapse
from lambda_hat.batch_size.plots.common import (
    MAX_LINES,
    MAX_PANELS,
    columns_of,
    fullest,
    loss_axis,
    loss_label,
    panels,
    shown,
    some,
    temperature,
    too_few,
)
from lambda_hat.batch_size.smoothing import smooth, updates_done
from lambda_hat.batch_size.study import Study, groups, losses
from lambda_hat.batch_size.trades import WINDOW, smoothed
from lambda_hat.specs.text import number
from lambda_hat.studies.style import BAND, EXACT, evenly, finish, sequential, title

#: Where a curve ends that failed; named in the legend where it is drawn.
FAILED: dict[str, Any] = {"marker": "x", "markersize": 7, "markeredgewidth": 2, "linestyle": "none", "label": "failed"}


def plot_losscurve_temp_samples(study: Study) -> Figure | str:
    """Loss against samples seen, a panel for each temperature eta/B and a line for each batch size: one line where the
    temperature alone matters."""
    return _by_temperature(study, "samples seen", "batch_size", reference=False)


def plot_losscurve_temp_eff_steps(study: Study) -> Figure | str:
    """Loss against eta × step, the time of gradient flow, a panel for each temperature and a line for each batch size; dashed
    in every panel the largest batch size at its best learning rate."""
    return _by_temperature(study, "gradient-flow time η × step", "eta", reference=True)


def plot_losscurve_grid(study: Study) -> Figure | str:
    """Loss against steps, a panel for each setting and a line for each learning rate."""
    found = groups(study.table, "eta", least=1)
    if not found:
        return too_few(study.table, "eta", least=1)
    chosen, rates = shown(found), sorted(set(study.table["eta"]))
    lines = {eta: study.table["eta"] == eta for eta in evenly(rates, MAX_LINES)}
    heading = ["smoothed training loss", some(list(lines), rates, "learning rates")]
    fig, axes = panels(heading, study.table, len(chosen), len(found), columns_of(chosen), sharey=True)
    for ax, group in zip(axes, chosen, strict=True):
        for (eta, of), color in zip(lines.items(), sequential(len(lines)), strict=True):
            _draw(ax, study, group.table[of.loc[group.table.index]], 1.0, color=color, label=f"η={number(eta)}")
        title(ax, group.label)
    return _finish(fig, axes, "step", loss_label(study.table))


def _by_temperature(study: Study, xlabel: str, clock: str, reference: bool) -> Figure | str:
    found = groups(study.table, "batch_size", "eta")
    if not found:
        return too_few(study.table, "batch_size", "eta")
    group = fullest(found)
    table = group.table
    temperatures = temperature(table)
    sizes = table["batch_size"].where(table["failure"].isna()).groupby(temperatures).nunique()
    several = sorted(sizes.index[sizes > 1])
    if not several:
        return "it takes two batch sizes at one temperature η/B, with trials that did not fail; no temperature has them"
    chosen = evenly(several, MAX_PANELS)
    every = sorted(set(table["batch_size"][temperatures.isin(chosen)]))
    shown_sizes = evenly(every, MAX_LINES)
    left_out = some([group], found, "settings"), some(shown_sizes, every, "batch sizes")
    heading = ["smoothed training loss at equal η/B", group.label, *left_out]
    fig, axes = panels(heading, study.table, len(chosen), len(several), sharex=True, sharey=True)
    largest = table[table["batch_size"] == table["batch_size"].max()]
    drawn = set()
    for ax, value in zip(axes, chosen, strict=True):
        if reference and largest["failure"].isna().any():
            best = largest[largest["eta"] == losses(largest).groupby(largest["eta"]).median().idxmin()]
            name = f"B={best['batch_size'].iloc[0]}, η={number(best['eta'].iloc[0])}"
            _draw(ax, study, best, best[clock].iloc[0], color=EXACT, linestyle="--", label=name)
        for size, color in zip(shown_sizes, sequential(len(shown_sizes)), strict=True):
            rows = table[(temperatures == value) & (table["batch_size"] == size)]
            if len(rows) and _draw(ax, study, rows, rows[clock].iloc[0], color=color):
                drawn.add(size)
        title(ax, f"η/B={number(value)}", _parting(study, table[temperatures == value]))
    for size, color in zip(shown_sizes, sequential(len(shown_sizes)), strict=True):
        if size in drawn:
            axes[0].plot([], [], color=color, label=f"B={size}")  # in order, whichever panel has the line
    return _finish(fig, axes, xlabel, loss_label(table))


def _parting(study: Study, trials: pd.DataFrame) -> str:
    """From which batch size on the curves at one temperature differ over samples seen."""
    found = collapse(smoothed(study, trials))
    return "" if found is None or found.breaks_at is None else f"one curve up to B≈{float(f'{found.breaks_at:.2g}'):g}"


def _draw(ax: Axes, study: Study, trials: pd.DataFrame, per_step: float, **style: Any) -> bool:
    """The smoothed losses' median over seeds and their range; a cross at its end where half of the trials failed. Whether there
    is anything to draw."""
    trials = trials[trials["trial_id"].isin(study.curves)]
    if trials.empty:
        return False
    curves = [study.curves[name] for name in trials["trial_id"]]
    steps = curves[0][0]
    losses = np.array([smooth(steps, of, relative=WINDOW) for at, of in curves if np.array_equal(at, steps)])
    losses = np.where(np.isfinite(losses) & (losses > 0), losses, np.inf)
    middle = np.median(losses, axis=0)
    updates = updates_done(steps)
    good = np.isfinite(middle) & (updates > 0)
    if not good.any():
        return False
    x = updates[good] * per_step
    ax.plot(x, middle[good], linewidth=1.4, **style)
    if len(losses) > 1:
        high = np.where(np.isfinite(losses), losses, 0).max(axis=0)
        ax.fill_between(x, losses.min(axis=0)[good], high[good], **BAND, color=style["color"])
    if 2 * trials["failure"].count() >= len(trials):
        ax.plot(x[-1], middle[good][-1], color=style["color"], **FAILED)
    return True


def _finish(fig: Figure, axes: Sequence[Axes], xlabel: str, ylabel: str) -> Figure | str:
    """Axes, limits that diverging trials do not squash, and one legend."""
    values = [np.asarray(line.get_ydata(), np.float64) for ax in axes for line in ax.lines]
    if not sum(map(len, values)):
        return "there is no loss curve with a finite loss after the first step"
    for ax in axes:
        ax.set(xscale="log")
    loss_axis(axes, np.concatenate(values))
    finish(fig, axes, xlabel, ylabel)
    return fig
