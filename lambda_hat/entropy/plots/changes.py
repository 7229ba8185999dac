"""What an update does to the entropy: over the learning rate, part by part, and what tells whether to trust it."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lambda_hat.entropy.analysis import rates
from lambda_hat.entropy.plots.common import (
    MAX_LINES,
    MAX_PANELS,
    NO_MEASUREMENT,
    View,
    common,
    entropy_label,
    label,
    rate_label,
    views,
)
from lambda_hat.entropy.study import EntropyStudy, Measured
from lambda_hat.studies.style import (
    BAND,
    COLORS,
    EXACT,
    MARKERS,
    STYLES,
    color,
    evenly,
    finish,
    grid,
    log_axis,
    sequential,
    title,
)

#: Points of the curve to second order.
NUM_POINTS = 100

#: How often the others' range a part must fill to be off the scale.
OFF_SCALE = 3

#: Columns of `changes`: how they are called, their colour, marker, and the column of their errors.
PARTS = (
    ("full", "update v", COLORS[0], "o", "full_error"),
    ("baseline", "baseline b", COLORS[5], "s", "baseline_error"),
    ("grad_sum", "sum of the vᵢ alone", COLORS[2], "^", None),
    ("residual", "residual v − b − Σvᵢ", COLORS[3], "x", None),
    ("exact", "update v, exact", "black", "*", None),
)


def plot_etas(study: EntropyStudy) -> Figure | str:
    """Changes of the entropy over eta, per unit eta, so that a straight line is level: by the update, by its baseline, by its
    training sequences each alone, and what they do together only, with the first order, the second, and eta*, where the second
    is a tenth of the first."""
    found = views(study)
    if not found:
        return NO_MEASUREMENT
    chosen = evenly(found, MAX_PANELS)
    fig, axes = grid("change of the entropy by an update η v, per unit η", common(study), len(chosen), len(found), height=3.6)
    for ax, view in zip(axes, chosen, strict=True):
        off_scale, star = _over_etas(ax, view), view.found["eta_star"]
        known = star is not None and np.isfinite(star)
        title(ax, label(study, view), f"η*={star:.2g}" if known else "", off_scale)
    finish(fig, axes, "η", rate_label(study, "ΔH / η"), ncols=5)
    return fig


def plot_decomposition(study: EntropyStudy) -> Figure | str:
    """The first-order change of the entropy by one update at the policy's own learning rate, with standard errors, and its two
    parts: what the optimizer carries on, and this update's sequences."""
    if not study.measured:
        return NO_MEASUREMENT
    chosen = evenly(study.measured, 4 * MAX_PANELS)
    left_out = f" · {len(chosen)} of {len(study.measured)} measurements" if len(chosen) < len(study.measured) else ""
    heading = f"change of the entropy by one update, first order{left_out}"
    fig, (ax,) = grid(heading, common(study), 1, 1, height=3.8)
    fig.set_figwidth(min(max(7.0, 1.1 * len(chosen)), 14.0))
    place = np.arange(len(chosen))
    parts = ("baseline", "baseline: moments and decay", COLORS[5]), ("grad", "this update's sequences", COLORS[2])
    for offset, (part, called, shade) in enumerate((*parts, ("full", "whole update", COLORS[0]))):
        found = np.array([_scaled(measured, part) for measured in chosen])
        at = place + 0.27 * (offset - 1)
        ax.bar(at, found[:, 0], 0.25, color=shade, label=called)
        known = np.isfinite(found[:, 1])
        ax.errorbar(at[known], found[known, 0], found[known, 1], fmt="none", ecolor="black", elinewidth=1, capsize=2)
    ax.axhline(0, color="black", linewidth=0.8)
    names = [label(study, measured).replace(" · ", "\n") for measured in chosen]
    ax.margins(x=0.02)
    ax.set_xticks(place, names, fontsize=8, rotation=0 if len(chosen) <= 8 else 90)
    finish(fig, [ax], "", entropy_label(study, "η dH/dη"))
    return fig


def plot_covariance(study: EntropyStudy) -> Figure | str:
    """The first-order change of the entropy by one update at the policy's own learning rate against the covariance of log p
    and advantage over its tokens, of opposite signs in the shaded quadrants, where theory expects them."""
    if len(study.measured) < 2:
        return "it needs two measurements or more"
    fig, (ax,) = grid("change of the entropy and covariance of log p with the advantage", common(study), 1, 1, height=4.2)
    targets = list(dict.fromkeys(measured.spec.target.target_id for measured in study.measured))
    covariances = np.array([measured.summary["covariance"] for measured in study.measured])
    changes = np.array([[_scaled(measured, part) for part in ("full", "grad")] for measured in study.measured])
    for index, target in enumerate(evenly(targets, MAX_LINES)):
        of = np.array([measured.spec.target.target_id == target for measured in study.measured])
        for part, face, size in ((1, "white", 9), (0, color(index), 5)):
            style: dict[str, Any] = {"fmt": MARKERS[index], "color": color(index), "markersize": size, "elinewidth": 0.8}
            ax.errorbar(covariances[of], changes[of, part, 0], changes[of, part, 1], markerfacecolor=face, **style)
    shown = [_policy_name(study, target) for target in evenly(targets, MAX_LINES)]
    marks = [Line2D([], [], marker=MARKERS[index], color=color(index), linestyle="none", label=called)
             for index, called in enumerate(shown) if called]  # fmt: skip
    for called, face in (("whole update", EXACT), ("this update's sequences", "white")):
        marks.append(Line2D([], [], marker="o", color=EXACT, markerfacecolor=face, linestyle="none", label=called))
    (left, right), (low, high) = (_around_zero(values) for values in (covariances, changes[..., 0]))
    ax.set(xlim=(left, right), ylim=(low, high))
    for x, y in (((0, right), (low, 0)), ((left, 0), (0, high))):
        ax.fill_between(x, *y, color=EXACT, alpha=0.1, linewidth=0, zorder=0)
    ax.axhline(0, color=EXACT, linewidth=0.8)
    ax.axvline(0, color=EXACT, linewidth=0.8)
    agreeing = int(np.sum(covariances * changes[:, 0, 0] < 0))
    title(ax, f"signs as expected in {agreeing} of {len(covariances)}")
    finish(fig, [ax], "Cov(log p, A) over the update's tokens (nats)", entropy_label(study, "η dH/dη"), marks)
    return fig


def plot_diagnostics(study: EntropyStudy) -> Figure | str:
    """Of the importance weights over eta: the effective sample size as a share of the evaluation sequences, by the update and,
    dashed, the smallest by a training sequence alone, and the share of log-weights that were clipped."""
    found = views(study)
    if not found:
        return NO_MEASUREMENT
    chosen = evenly(found, MAX_LINES)
    left_out = f" · {len(chosen)} of {len(found)} lines" if len(chosen) < len(found) else ""
    fig, (left, right) = grid(f"importance weights{left_out}", common(study), 2, 2)
    for index, (view, shade) in enumerate(zip(chosen, sequential(len(chosen)), strict=True)):
        size, changes = view.found["num_sequences"], view.changes
        style: dict[str, Any] = {"color": shade, "marker": MARKERS[index], "markersize": 4, "linewidth": 1.4}
        left.plot(changes["eta"], changes["ess"] / size, **style, label=label(study, view))
        influence = view.measured.influence
        least = influence[influence["evaluation"] == view.batch].groupby("eta")["ess"].min()
        left.plot(least.index, least / size, linestyle="--", linewidth=1, color=shade)
        right.plot(changes["eta"], changes["clip_fraction"], **style)
    etas = {eta for view in chosen for eta in view.changes["eta"]}
    for ax in (left, right):
        log_axis(ax, "x", etas)
        ax.set_ylim(-0.03, 1.03)
    title(left, "effective sample size", "dashed: least of the vᵢ alone")
    title(right, "clipped log-weights")
    finish(fig, [left, right], "η", "share of evaluation sequences", ncols=3)
    return fig


def _over_etas(ax: Axes, view: View) -> str:
    """The changes of a view; what does not fit is told."""
    changes, found = view.changes, view.found
    etas = changes["eta"].to_numpy()
    # The training sequences alone may do far more than together.
    drawn: list[np.ndarray] = []
    alone: list[np.ndarray] = []
    for column, called, shade, marker, error in PARTS:
        values = changes[column].to_numpy(np.float64) / etas
        if not np.isfinite(values).any():
            continue
        errors = None if error is None else changes[error].to_numpy(np.float64) / etas
        size = 9 if marker == "*" else 5
        line: dict[str, Any] = {"marker": marker, "color": shade, "markersize": size, "linewidth": 0 if marker == "*" else 1}
        face = "none" if marker == "*" else shade
        ax.errorbar(etas, values, errors, **line, markerfacecolor=face, capsize=2, label=called)
        (alone if column in ("grad_sum", "residual") else drawn).append(values)
        drawn += [] if errors is None else [values - errors, values + errors]
    log_axis(ax, "x", etas)
    first, second, error = found["first"], found["second"], found["first_error"]
    drawn.append(np.array([first - error, first + error, 0.0]))
    x = np.geomspace(etas.min() / 1.5, etas.max() * 1.5, NUM_POINTS)
    ax.axhline(first, color=EXACT, linestyle="--", linewidth=1.2, label="first order of v")
    ax.fill_between(x, first - error, first + error, color=EXACT, **BAND)
    ax.plot(x, first + x * second / 2, color=EXACT, linestyle=STYLES[2], linewidth=1.6, label="second order of v")
    low, high = _range(drawn)
    beyond = max(high - low, *np.abs(_range(alone))) > OFF_SCALE * (high - low)
    low, high = (low, high) if beyond else _range(drawn + alone)
    margin = 0.06 * (high - low) or 1.0
    ax.set(xlim=(x[0], x[-1]), ylim=(low - margin, high + margin))
    ax.axhline(0, color="black", linewidth=0.6)
    star = found["eta_star"]
    if star is not None and x[0] < star < x[-1]:
        ax.axvline(star, color=COLORS[1], linewidth=1.2, linestyle=STYLES[1], label="η*")
    ax.yaxis.set_major_locator(MaxNLocator(6))
    largest = max(_range(alone[:1]), key=abs)
    return f"Σvᵢ alone off the scale, to {largest:.2g}" if beyond else ""


def _range(parts: list[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate(parts)
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)


def _around_zero(values: np.ndarray) -> tuple[float, float]:
    """Limits of the values and of zero, and some more."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    margin = 0.15 * (high - low) or 1.0
    return low - margin, high + margin


def _scaled(measured: Measured, part: str) -> tuple[float, float]:
    """eta dH/deta of the update or a part at the policy's own eta, and its standard error."""
    found, eta = rates(measured), measured.summary["eta_policy"]
    return eta * getattr(found, part), eta * getattr(found, f"{part}_error")


def _policy_name(study: EntropyStudy, target: str) -> str:
    """What sets a policy apart, without its checkpoints."""
    measured = next(measured for measured in study.measured if measured.spec.target.target_id == target)
    return label(study, measured).rpartition(" · ")[0]
