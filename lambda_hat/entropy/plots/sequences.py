"""What single training sequences do to the entropy: which they are, what sets them apart, and how well that is predicted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lambda_hat.entropy.analysis import influences, r_squared, rank_correlation
from lambda_hat.entropy.plots.common import (
    BY_REWARD,
    LOWERED,
    MAX_PANELS,
    NEITHER,
    NO_MEASUREMENT,
    RAISED,
    View,
    by_advantage,
    common,
    label,
    plain,
    rate_label,
    views,
)
from lambda_hat.entropy.study import EntropyStudy
from lambda_hat.specs.text import number
from lambda_hat.studies.style import EXACT, Picture, evenly, finish, grid, say_over, title

#: Matrices shown, rows of panels by feature, and rows and columns of panels by eta.
MAX_MATRICES, MAX_ROWS, MAX_ETAS = 4, 3, 4
#: The largest influences of a panel, labelled; room for a label, as a share of the panel's height.
NUM_LABELLED, LABEL_HEIGHT = 4, 0.075
#: The share of a matrix's entries within its colours.
IN_COLOR = 0.99
#: Around what is beyond Tukey's fences.
RING: dict[str, Any] = {
    "marker": "o", "linestyle": "none", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": "black",
}  # fmt: skip

FEATURES = {
    "max_surprisal": "surprisal of the least likely token (nats)",
    "mean_surprisal": "mean surprisal of tokens (nats)",
    "advantage": "advantage",
    "length": "length (tokens)",
}


def plot_attribution(study: EntropyStudy) -> Figure | str:
    """The matrix M of first-order contributions to dH/deta, training sequences by advantage, then by influence, and evaluation
    sequences by their sum, with both sums beside it."""
    found = views(study)
    if not found:
        return NO_MEASUREMENT
    chosen = evenly(found, MAX_MATRICES)
    columns = math.ceil(math.sqrt(len(chosen)))
    rows = -(-len(chosen) // columns)
    fig = Picture(figsize=(6.6 if columns == 1 else 5.6 * columns, 1 + 4.6 * rows), layout="constrained")
    left_out = f" · {len(chosen)} of {len(found)} matrices" if len(found) > len(chosen) else ""
    heading = f"attribution of dH/dη: M[e, i] by evaluation e and training sequence i{left_out}"
    say_over(fig, heading, common(study))
    parts = fig.subfigures(rows, columns, squeeze=False).ravel()
    for part, view in zip(parts, chosen, strict=False):
        _matrix(part, view, rate_label(study, "M[e, i] of dH/dη"))
        part.suptitle(label(study, view), fontsize=9)
    return fig


def plot_influence(study: EntropyStudy) -> Figure | str:
    """What each training sequence adds to dH/deta, with standard errors, sorted and coloured by the sign of its advantage; the
    largest are named by prompt and completion."""
    if not study.measured:
        return NO_MEASUREMENT
    chosen = evenly(study.measured, MAX_PANELS)
    fig, axes = grid("influence of training sequences on the entropy", common(study), len(chosen), len(study.measured))
    for ax, measured in zip(axes, chosen, strict=True):
        sequences = influences(measured).sort_values("influence", kind="stable", ignore_index=True)
        values, errors = sequences["influence"].to_numpy(), sequences["influence_error"].to_numpy()
        by_advantage(ax, sequences, np.arange(len(values)), values, errors)
        ax.axhline(0, color=EXACT, linewidth=0.8)
        _name_largest(ax, sequences)
        title(ax, label(study, measured))
    finish(fig, axes, "training sequence, by influence", rate_label(study))
    return fig


def plot_features(study: EntropyStudy) -> Figure | str:
    """Influence on dH/deta against surprisal, advantage and length, correct and incorrect completions apart, those beyond
    Tukey's fences ringed: whether unlikely tokens of incorrect completions stand out.

    rho: Spearman's rank correlation of the feature with the absolute influence.
    """
    if not study.measured:
        return NO_MEASUREMENT
    chosen = evenly(study.measured, MAX_ROWS)
    columns = len(FEATURES)
    fig, axes = grid(
        "influence of training sequences by their features",
        common(study), columns * len(chosen), columns * len(study.measured), columns, sharey="row",
    )  # fmt: skip
    for row, measured in enumerate(chosen):
        sequences = influences(measured)
        for ax, feature in zip(axes[columns * row :], FEATURES, strict=False):
            _against(ax, sequences, feature)
            first = feature == next(iter(FEATURES))
            correlation = rank_correlation(sequences[feature].to_numpy(), np.abs(sequences["influence"].to_numpy()))
            known = "" if np.isnan(correlation) else f"ρ(|influence|) = {correlation:+.2f}"
            title(ax, label(study, measured) if first else "", known)
    finish(fig, axes, "", rate_label(study), [Line2D([], [], **RING, label="beyond Tukey's fences")])
    for ax, text in zip(axes, list(FEATURES.values()) * len(chosen), strict=True):
        ax.set_xlabel(text, fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=text == FEATURES["length"]))
    return fig


def plot_linearity(study: EntropyStudy) -> Figure | str:
    """Each training sequence's change of the entropy at a finite eta, by importance sampling and divided by eta, against its
    first-order rate, with R^2 of that prediction; eta is too large where they leave the diagonal.
    """
    pairs = [(view, list(view.changes["eta"])) for view in views(study)]
    if not pairs:
        return NO_MEASUREMENT
    rows = evenly(pairs, MAX_ROWS)
    columns = min(MAX_ETAS, max(len(etas) for _, etas in rows))
    panels = [(view, eta) for view, etas in rows for eta in evenly(etas, columns)]
    found = sum(len(etas) for _, etas in pairs)
    fig, axes = grid("changes by single training sequences and their prediction", common(study), len(panels), found, columns)
    for ax, (view, eta) in zip(axes, panels, strict=True):
        influence = view.measured.influence
        here = influence[(influence["evaluation"] == view.batch) & (influence["eta"] == eta)]
        joined = here.merge(view.measured.update[["sequence", "advantage"]], on="sequence")
        predicted, change, error = (joined[column].to_numpy() / eta for column in ("first_order", "change", "error"))
        by_advantage(ax, joined, predicted, change, error)
        ends = np.array([predicted.min(), predicted.max()])
        ax.plot(ends, ends, "--", color=EXACT, linewidth=1.2, label="prediction")
        title(ax, label(study, view), f"η={number(eta)}", f"R²={r_squared(change, predicted):.3f}")
    finish(fig, axes, rate_label(study, "first order"), rate_label(study, "ΔH(η vᵢ)/η"))
    return fig


def _matrix(part: Any, view: View, unit: str) -> None:
    """One matrix with its sums, and its colours' scale."""
    matrix = view.measured.matrices[view.batch]
    advantage = view.measured.update["advantage"].to_numpy()
    sums, contributions = matrix.sum(axis=0), matrix.sum(axis=1)
    columns, rows = np.lexsort((sums, advantage)), np.argsort(contributions, kind="stable")
    ((above, corner), (ax, beside)) = part.subplots(
        2, 2, sharex="col", sharey="row", gridspec_kw={"width_ratios": [5, 1], "height_ratios": [1, 4]}
    )
    corner.remove()
    reach = float(np.quantile(np.abs(matrix), IN_COLOR)) or float(np.max(np.abs(matrix))) or 1.0
    image = ax.imshow(matrix[rows][:, columns], aspect="auto", cmap="RdBu_r", norm=Normalize(-reach, reach))
    for sign, (color, _) in ((-1, LOWERED), (0, NEITHER), (1, RAISED)):
        (block,) = np.nonzero(np.sign(advantage[columns]) == sign)
        if block.size:  # one run of columns, since they are sorted
            above.stairs(sums[columns][block], np.arange(block[0], block[-1] + 2) - 0.5, fill=True, color=color)
    beside.stairs(contributions[rows], np.arange(len(rows) + 1) - 0.5, fill=True, color=EXACT, orientation="horizontal")
    for line in (above.axhline, beside.axvline):
        line(0, color="black", linewidth=0.6)
    above.set_ylabel("sum over e", fontsize=8)
    beside.set_xlabel("sum over i", fontsize=8)
    ax.set_xlabel("training sequence i, by advantage (< 0 orange, > 0 blue), then sum", fontsize=8)
    ax.set_ylabel("evaluation sequence e, by sum", fontsize=8)
    for each in (ax, above, beside):
        each.tick_params(labelsize=8)
    beside.tick_params(axis="x", labelrotation=90)
    bar = part.colorbar(image, ax=[ax, beside], location="bottom", aspect=40, extend="both")
    bar.set_label(unit, fontsize=8)
    bar.ax.xaxis.set_major_locator(MaxNLocator(5))
    bar.ax.tick_params(labelsize=8)


def _name_largest(ax: Axes, sequences: pd.DataFrame) -> None:
    """Prompts and completions of the largest influences, beside the sorted points where there are none."""
    values = sequences["influence"].to_numpy()
    different = sequences.loc[np.argsort(-np.abs(values), kind="stable")].drop_duplicates(["prompt", "completion"])
    largest = different.index[:NUM_LABELLED]
    low, high = ax.get_ylim()
    height = LABEL_HEIGHT * (high - low)
    for sign in (1, -1):
        # Away from zero, so that each label has room of its own and the next point's is further out.
        order = sorted((index for index in largest if (values[index] >= 0) == (sign > 0)), key=lambda index: abs(values[index]))
        # Positive values are on the right, and what is left of them is lower.
        outermost = min((index if sign > 0 else len(values) - 1 - index for index in order), default=0)
        inset = 1 - min(max(outermost / len(values) - 0.06, 0.6), 0.72)
        at = -np.inf
        for index in order:
            at = max(sign * values[index] + 0.6 * height, at + height)
            row = sequences.iloc[index]
            text = f"{plain(row['prompt'])} → {plain(row['completion']) or '(nothing)'}"
            ax.annotate(
                text, (float(index), values[index]), (1 - inset if sign > 0 else inset, sign * at),
                textcoords=("axes fraction", "data"), fontsize=7, ha="right" if sign > 0 else "left", va="center",
                parse_math=False, arrowprops={"arrowstyle": "-", "color": EXACT, "linewidth": 0.6},
            )  # fmt: skip
            low, high = min(low, sign * at - height), max(high, sign * at + height)
    ax.set_ylim(low, high)


def _against(ax: Axes, sequences: pd.DataFrame, feature: str) -> None:
    for correct, called, (color, marker) in BY_REWARD:
        rows = sequences[sequences["correct"] == correct]
        if len(rows):
            style: dict[str, Any] = {"linestyle": "none", "color": color, "alpha": 0.6, "markersize": 4.5}
            ax.plot(rows[feature], rows["influence"], marker=marker, **style, label=called)
    far = sequences[sequences["outlier"]]
    ax.plot(far[feature], far["influence"], **RING, markeredgewidth=0.8)
    ax.axhline(0, color=EXACT, linewidth=0.8)
