"""Plots of entropy studies by name. A new one is one function and its name here; a plot that does not apply returns None."""

from __future__ import annotations

import functools
from collections.abc import Callable

from matplotlib.figure import Figure

from lambda_hat.entropy.plots.changes import plot_covariance, plot_decomposition, plot_diagnostics, plot_etas
from lambda_hat.entropy.plots.sequences import plot_attribution, plot_features, plot_influence, plot_linearity
from lambda_hat.entropy.plots.training import plot_exchange, plot_training
from lambda_hat.entropy.study import EntropyStudy
from lambda_hat.plots import draw_chosen

PLOTS: dict[str, Callable[[EntropyStudy], Figure | None]] = {
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


#: (study, names) -> the plots that can be drawn: see `draw_chosen`.
draw_plots = functools.partial(draw_chosen, PLOTS)


__all__ = ["PLOTS", "draw_plots"]
