"""Plots of entropy studies by name. A new one is one function, its name and its caption here; one that cannot be drawn returns
why."""

from __future__ import annotations

import functools
from collections.abc import Callable

from matplotlib.figure import Figure

from lambda_hat.entropy.plots.changes import plot_covariance, plot_decomposition, plot_diagnostics, plot_etas
from lambda_hat.entropy.plots.sequences import plot_attribution, plot_features, plot_influence, plot_linearity
from lambda_hat.entropy.plots.training import plot_exchange, plot_training
from lambda_hat.entropy.study import EntropyStudy
from lambda_hat.studies.plots import draw_chosen

PLOTS: dict[str, Callable[[EntropyStudy], Figure | str]] = {
    "training": plot_training,
    "exchange": plot_exchange,
    "attribution": plot_attribution,
    "influence": plot_influence,
    "features": plot_features,
    "etas": plot_etas,
    "linearity": plot_linearity,
    "decomposition": plot_decomposition,
    "covariance": plot_covariance,
    "diagnostics": plot_diagnostics,
}


#: What a plot shows and how it is read, in a report.
CAPTIONS = {
    "training": (
        "Accuracy and entropy a token of each update's batch over the training, a line for each setting: medians and "
        "ranges over the seeds. Dots are the updates that were measured; beside them, where it was estimated, the llc of "
        "checkpoints. Entropy usually falls as accuracy rises"
    ),
    "exchange": (
        "Accuracy R against entropy H, both of each update's batch, with R = −a exp(H) + b fitted to each setting: what "
        "accuracy the policy buys with its entropy. Where the line meets H = 0 is the accuracy expected when none is left"
    ),
    "attribution": (
        "First-order contributions to dH/dη: a column for each training sequence, sorted by advantage and influence, a "
        "row for each evaluation sequence. Sums are beside it. A few bright rows mean that few evaluation sequences "
        "decide the estimate"
    ),
    "influence": (
        "What each training sequence adds to dH/dη, with standard errors, sorted and coloured by the sign of its "
        "advantage. The largest are named by prompt and completion; a sequence stands out only where its error is far "
        "smaller"
    ),
    "features": (
        "The same influences against surprisal, advantage and length, correct and incorrect completions apart. Rings are "
        "outliers, beyond Tukey's fences: where they are incorrect completions of high surprisal, these move the entropy "
        "most"
    ),
    "etas": (
        "Changes of the entropy over η, divided by η, so that a straight line is level: by the whole update, by what the "
        "optimizer carries on, by the sequences each alone, and what they do only together, beside the first and the "
        "second order. Beyond η*, where the second order is a tenth of the first, parts no longer add up"
    ),
    "linearity": (
        "Each training sequence's change of the entropy at a finite η, divided by η, against its first-order rate. Points"
        " on the diagonal move the entropy as the derivative says; where they leave it η is too large, or the sample too "
        "small"
    ),
    "decomposition": (
        "The first-order change of the entropy by one update at the policy's own learning rate, with standard errors, and"
        " its two parts: what the optimizer carries on from earlier updates, and this update's sequences"
    ),
    "covariance": (
        "The first-order change of the entropy by one update against the covariance of log p and advantage over its "
        "tokens. Theory expects opposite signs, the shaded quadrants: entropy falls where likely tokens are rewarded"
    ),
    "diagnostics": (
        "Of the importance weights over η: the effective sample size as a share of the evaluation sequences, by the "
        "update and, dashed, the smallest by a sequence alone, and the share of log-weights that were clipped. Changes "
        "are to be trusted where the first is near 1 and the second 0"
    ),
}

#: (study, names) -> the plots that can be drawn, and why others cannot: see `draw_chosen`.
draw_plots = functools.partial(draw_chosen, PLOTS)


__all__ = ["CAPTIONS", "PLOTS", "draw_plots"]
