"""How policies were trained: accuracy and entropy over updates, one against the other, and the llc of checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lambda_hat.entropy.analysis import exchange_fit
from lambda_hat.entropy.plots.common import MAX_LINES, Policies, by_setting, common
from lambda_hat.entropy.study import EntropyStudy
from lambda_hat.studies.style import BAND, EXACT, MARKERS, color, evenly, finish, grid

#: Points of a fitted curve.
NUM_POINTS = 100


def plot_training(study: EntropyStudy) -> Figure | str:
    """Accuracy and entropy a token of each update's batch over training, a line for each setting, medians and ranges over the
    seeds, and the llc of checkpoints, where it was estimated, with its standard error."""
    found = by_setting(study)
    if not found:
        return "no policy of it was trained by rewards"
    llcs = study.llcs if study.llcs is not None and len(study.llcs) else None
    chosen = evenly(found, MAX_LINES)
    count = 2 if llcs is None else 3
    fig, axes = grid(f"training by rewards{_left_out(chosen, found)}", common(study), count, count)
    steps = {measured.spec.target.target_id: set[int]() for measured in study.measured}
    for measured in study.measured:
        steps[measured.spec.target.target_id].add(int(measured.summary["checkpoint"]))
    for index, policies in enumerate(chosen):
        label = policies.label or ("policy" if len(policies.trainings) == 1 else f"{len(policies.trainings)} seeds")
        marked = sorted(set().union(*(steps.get(training.target_id, ()) for training in policies.trainings)))
        for ax, curve in zip(axes, ("accuracy", "token_entropy"), strict=False):
            _curve(ax, policies, curve, marked, color(index), label)
        if llcs is not None:
            _llcs(axes[2], policies, llcs, color(index), MARKERS[index])
    axes[0].set(title="accuracy", ylabel="mean reward")
    axes[1].set(title="token entropy", ylabel="nats a token", ylim=(0, None))
    marks = [Line2D([], [], marker="o", color=EXACT, linestyle="none", markersize=5, label="measured here")]
    if llcs is not None:
        axes[2].set(title="llc of checkpoints", ylabel="llc")
        if (llcs["verdict"] != "ok").any():
            hollow: dict[str, Any] = {"marker": "o", "color": EXACT, "linestyle": "none", "markerfacecolor": "white"}
            marks.append(Line2D([], [], **hollow, label="llc with a verdict other than ok"))
    for ax in axes:
        ax.title.set_fontsize(9)
    finish(fig, axes, "updates done", axes[0].get_ylabel(), marks)
    return fig


def plot_exchange(study: EntropyStudy) -> Figure | str:
    """Accuracy R against entropy H, both of each update's batch, H the mean over its tokens, with R = -a exp(H) + b fitted to
    each setting, all seeds together."""
    fits = [(policies, *batches(policies)) for policies in by_setting(study)]
    found = [(policies, entropy, accuracy, fit) for policies, entropy, accuracy in fits
             if (fit := exchange_fit(entropy, accuracy)) is not None]  # fmt: skip
    if not found:
        return "it takes three different entropies of a policy's training"
    chosen = evenly(found, MAX_LINES)
    fig, (ax,) = grid(f"accuracy for entropy{_left_out(chosen, found)}", common(study), 1, 1, height=4.2)
    for index, (policies, entropy, accuracy, fit) in enumerate(chosen):
        style: dict[str, Any] = {"color": color(index), "alpha": 0.5, "markersize": 4, "linestyle": "none"}
        ax.plot(entropy, accuracy, marker=MARKERS[index], **style)
        x = np.linspace(np.nanmin(entropy), np.nanmax(entropy), NUM_POINTS)
        text = f"R = −a exp(H) + b: a = {fit.a:.4g}, b = {fit.b:.4g}, R² = {fit.r_squared:.3f}"
        label = f"{policies.label}: {text}" if policies.label else text
        ax.plot(x, fit.b - fit.a * np.exp(x), color=color(index), linewidth=1.8, label=label)
    finish(fig, [ax], "token entropy H (nats), mean over the tokens of an update's batch", "accuracy R, mean reward", ncols=1)
    return fig


def batches(policies: Policies) -> tuple[np.ndarray, np.ndarray]:
    """Token entropies and accuracies of all updates of all seeds."""
    entropy, accuracy = (
        np.concatenate([np.asarray(training.history[curve], np.float64) for training in policies.trainings])
        for curve in ("token_entropy", "accuracy")
    )
    return entropy, accuracy


def _curve(ax: Axes, policies: Policies, name: str, marked: list[int], shade: str, label: str) -> None:
    """Median and range over the seeds; dots where it was measured. A row is of the batch before its update."""
    curves = [np.asarray(training.history[name], np.float64) for training in policies.trainings]
    shortest = min(map(len, curves))
    values = np.array([curve[:shortest] for curve in curves])
    done = np.arange(shortest)
    dots = [step for step in marked if step < shortest]
    middle = np.median(values, axis=0)
    ax.plot(done, middle, color=shade, linewidth=1.3, marker="o", markersize=5, markevery=dots, label=label)
    if len(values) > 1:
        ax.fill_between(done, values.min(axis=0), values.max(axis=0), **BAND, color=shade)


def _llcs(ax: Axes, policies: Policies, llcs: pd.DataFrame, shade: str, marker: str) -> None:
    for training in policies.trainings:
        rows = llcs[(llcs["target_id"] == training.target_id) & llcs["llc"].notna()].sort_values("checkpoint")
        ax.plot(rows["checkpoint"], rows["llc"], color=shade, linewidth=0.8, alpha=0.6)
        for good in (True, False):
            part = rows[(rows["verdict"] == "ok") == good]
            if len(part):
                style: dict[str, Any] = {"fmt": marker, "color": shade, "capsize": 2, "markersize": 5}
                face = shade if good else "white"
                ax.errorbar(part["checkpoint"], part["llc"], part["mcse"].fillna(0), **style, markerfacecolor=face)


def _left_out(chosen: list, found: list) -> str:
    return f" · {len(chosen)} of {len(found)} settings" if len(found) > len(chosen) else ""
