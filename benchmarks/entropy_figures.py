"""The figures of `benchmarks/entropy_science.py`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from entropy_updates import DIRECTIONS, NETWORK, PROMPTS, draw, draw_update, update_of
from matplotlib.figure import Figure

from lambda_hat.entropy.attribution import Training, attribution_matrix
from lambda_hat.entropy.estimators import baselines
from lambda_hat.entropy.sequences import all_token_stats
from lambda_hat.studies.style import EXACT, MARKERS, STYLES, Picture, color, head, legend
from lambda_hat.targets.policies.train import PolicyCheckpoint


class Fit(NamedTuple):
    """R = -a exp(H) + b by least squares, with standard errors, and R^2 of it and of a line in H."""

    a: float
    a_error: float
    b: float
    b_error: float
    r_squared: float
    line: float


def draw_course(course: pd.DataFrame, fits: dict[str, Fit]) -> Figure:
    fig = Picture(figsize=(10, 3.6), layout="constrained")
    head(fig, "Entropy falls in RL, and the mean reward follows it", "exact values")
    axes = fig.subplots(1, 3)
    for index, (seed, part) in enumerate(course.groupby("seed")):
        line = {"color": color(index), "marker": MARKERS[index], "markersize": 4, "label": f"seed {seed}"}
        axes[0].plot(part["step"], part["entropy"], linewidth=1.2, **line)
        axes[1].plot(part["step"], part["accuracy"], linewidth=1.2, **line)
        axes[2].plot(part["token_entropy"], part["accuracy"], linestyle="", **line)
    found, h = fits["all seeds"], np.linspace(0, course["token_entropy"].max(), 100)
    label = f"all: R = {found.b:.2f} − {found.a:.2f} exp(H), R² = {found.r_squared:.3f}"
    axes[2].plot(h, found.b - found.a * np.exp(h), color=EXACT, linestyle=STYLES[1], label=label)
    labels = (("update", "entropy of a completion (nats)"), ("update", "probability of the right answer"),
              ("mean token entropy H (nats)", "mean reward R"))  # fmt: skip
    for ax, (x, y) in zip(axes, labels, strict=True):
        ax.set_xlabel(x)
        ax.set_ylabel(y)
    legend(fig, axes[2], ncols=6)
    return fig


def draw_signs(updates: pd.DataFrame) -> Figure:
    fig = Picture(figsize=(10, 3.9), layout="constrained")
    head(fig, "Covariance of log-probability and advantage, and the change of entropy", f"{len(updates)} updates")
    axes = fig.subplots(1, 2)
    for ax, name in zip(axes, ("gradient", "full"), strict=True):
        for (rewards, part), marker in zip(updates.groupby("rewards"), MARKERS, strict=False):
            style = {"s": 14, "cmap": "viridis", "linewidths": 0, "alpha": 0.8, "marker": marker}
            points = ax.scatter(part["covariance"], part[name], c=part["step"], label=f"{rewards} rewards", **style)
        ax.axhline(0, color=EXACT, linewidth=0.8)
        ax.axvline(0, color=EXACT, linewidth=0.8)
        ax.set_yscale("symlog", linthresh=0.1 if name == "gradient" else 1)
        ax.set_title(DIRECTIONS[name], fontsize=9)
        ax.set_xlabel("Cov(log p, A) over the update's tokens")
        ax.set_ylabel("dH/dη, exact (nats)")
    fig.colorbar(points, ax=axes, label="update")
    legend(fig, axes[0])
    return fig


def draw_sequences(saved: dict[int, PolicyCheckpoint], seed: int) -> Figure:
    """Of one redrawn update at each checkpoint, measured as a study does."""
    fig = Picture(figsize=(10, 3.8), layout="constrained")
    head(fig, "What each training sequence of an update does to the entropy", f"seed {seed}")
    axes = fig.subplots(1, len(saved))
    for ax, (step, checkpoint) in zip(axes, saved.items(), strict=True):
        params = checkpoint.params
        drawn = draw_update(params, (seed, step, 0))
        _, update = update_of(checkpoint, drawn)
        evaluation, _ = draw(params, np.random.default_rng(8).integers(0, len(PROMPTS.texts), 1024), (8, step))
        controls = baselines(all_token_stats(NETWORK.apply, params, evaluation), evaluation.mask_BT, "entropy")
        training = Training(drawn.batch, drawn.weights, update)
        matrix = attribution_matrix(NETWORK.apply, params, training, evaluation, controls)
        columns, errors = matrix.sum(axis=0), np.sqrt(len(matrix)) * np.std(matrix, axis=0, ddof=1)
        surprisal = -np.asarray(all_token_stats(NETWORK.apply, params, drawn.batch).logp_BT).min(axis=1)
        moving = drawn.advantages != 0
        for index, (label, reward) in enumerate((("correct", 1), ("incorrect", 0))):
            rows = (drawn.rewards == reward) & moving
            ax.errorbar(surprisal[rows], columns[rows], errors[rows], color=color(index), marker=MARKERS[index], markersize=3.5,
                        linestyle="", elinewidth=0.8, label=label)  # fmt: skip
        low, high = np.quantile(columns[moving], (0.25, 0.75))
        for index, fence in enumerate((low - 1.5 * (high - low), high + 1.5 * (high - low))):
            ax.axhline(fence, color=EXACT, linestyle="--", linewidth=1, label="Tukey's fences" if index == 0 else None)
        ax.set_title(f"update {step}", fontsize=9)
        ax.set_xlabel("surprisal of the least likely token (nats)")
    axes[0].set_ylabel("dH/dη along v_i (nats), ± s.e.")
    legend(fig, axes[0])
    return fig
