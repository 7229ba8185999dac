"""What was measured at the end of training, over batch size and learning rate: sharpness, the llc."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lambda_hat.batch_size.plots.common import LABELS, MAX_LINES, loss_label, over_seeds, panels, shown, too_few
from lambda_hat.batch_size.plots.maps import color_bar, heatmap, log10
from lambda_hat.batch_size.study import Group, Study, groups
from lambda_hat.studies.style import BAND, EXACT, evenly, fence, finish, log_axis, sequential, title
from lambda_hat.targets.trials.spec import TrialSpec

#: Settings shown, a row of two panels each.
MAX_ROWS = 3


def plot_sharpness(study: Study) -> Figure | str:
    """The largest Hessian eigenvalue at the end of training over batch size and learning rate, and a line for each batch size
    against the rate applied to the weights, eta times the factors of richness and width. Dashed, of SGD: 2 (1 + momentum) /
    rate, above which gradient descent is unstable.
    """
    found = _measured(study.table, "sharpness")
    if not found:
        return _unmeasured(study.table, "sharpness", "curvature=true")
    chosen = shown(found, MAX_ROWS)
    fig, axes = panels(["sharpness: largest Hessian eigenvalue"], study.table, 2 * len(chosen), 2 * len(found), columns=2)
    for group, left, right in zip(chosen, axes[::2], axes[1::2], strict=True):
        _map(fig, left, group, "sharpness")
        title(left, group.label)
        _against_rate(right, group.table[_known(group.table, "sharpness")])
    finish(fig, axes, LABELS["batch_size"], LABELS["eta"])
    for ax in axes[1::2]:
        ax.set(xlabel="learning rate applied to the weights", ylabel="sharpness")
    return fig


def _against_rate(ax: Axes, rows: pd.DataFrame) -> None:
    trials = (TrialSpec.model_construct(**{str(name): value for name, value in row.items()}) for row in rows.to_dict("records"))
    rows = rows.assign(rate=[max(trial.rates) for trial in trials])
    cells = over_seeds(rows, "batch_size", "rate", of="sharpness")
    log_axis(ax, "x", cells["rate"])
    sizes = evenly(sorted(set(cells["batch_size"])), MAX_LINES)
    for size, color in zip(sizes, sequential(len(sizes)), strict=True):
        line = cells[cells["batch_size"] == size]
        ax.plot(line["rate"], line["median"], ".-", color=color, linewidth=1.4, label=f"B={size}")
        ax.fill_between(line["rate"], line["low"], line["high"], **BAND, color=color)
    top, bottom = cells["high"].max(), cells["low"].min()
    if set(rows["optimizer"]) == {"sgd"}:
        momentum = rows["momentum"].iloc[0] if "momentum" in rows else 0.0
        x = np.geomspace(cells["rate"].min(), cells["rate"].max(), 50)
        name = "2 / rate" if not momentum else "2 (1 + momentum) / rate"
        ax.plot(x, 2 * (1 + momentum) / x, "--", color=EXACT, linewidth=1.4, label=name)
    # The line of stability goes far beyond what is measured at small rates.
    ax.set(yscale="log", ylim=(bottom / 2, 4 * top))


def plot_llc(study: Study) -> Figure | str:
    """The llc at the end of training beside the loss, over batch size and learning rate."""
    found = _measured(study.table, "llc")
    if not found:
        return _unmeasured(study.table, "llc", "sampler=NAME")
    chosen = shown(found, MAX_ROWS)
    fig, axes = panels(["loss and llc at the end of training"], study.table, 2 * len(chosen), 2 * len(found), columns=2)
    for group, left, right in zip(chosen, axes[::2], axes[1::2], strict=True):
        for ax, name in ((left, "final_loss"), (right, "llc")):
            _map(fig, ax, group, name)
            title(ax, "final loss" if ax is left else "llc", group.label)
    finish(fig, axes, LABELS["batch_size"], LABELS["eta"])
    return fig


def _map(fig: Figure, ax: Axes, group: Group, name: str) -> None:
    """One measure over batch size and learning rate, with its own colours."""
    logarithmic = name != "llc"
    cells = over_seeds(group.table, "batch_size", "eta", of=name)
    values = log10(cells["median"]) if logarithmic else cells["median"].to_numpy()
    drawn = heatmap(ax, cells, "batch_size", values, Normalize(*fence(values)), "viridis" if logarithmic else "cividis")
    unit = {"final_loss": f"log₁₀ {loss_label(group.table)}", "sharpness": "log₁₀ sharpness", "llc": "llc"}[name]
    color_bar(fig, drawn, [ax], values, unit)


def _unmeasured(table: pd.DataFrame, name: str, remedy: str) -> str:
    """Why there is no map of a measure."""
    known = table[_known(table, name)] if name in table else table[:0]
    if known.empty:
        return f"no network's {name} was measured; {remedy} of the study does"
    return too_few(known, "batch_size", "eta")


def _known(table: pd.DataFrame, name: str) -> pd.Series:
    """Where it was measured, of trials that did not fail, and has a place in a map: sharpness is on a logarithmic axis, an llc
    may be negative."""
    return table["failure"].isna() & (table[name].notna() if name == "llc" else table[name] > 0)


def _measured(table: pd.DataFrame, name: str) -> list[Group]:
    """The settings for which it was measured at two batch sizes and two learning rates; all their trials."""
    if name not in table:
        return []
    found = groups(table, "batch_size", "eta")
    known = [group.table[_known(group.table, name)] for group in found]
    return [group for group, of in zip(found, known, strict=True) if of["batch_size"].nunique() > 1 and of["eta"].nunique() > 1]
