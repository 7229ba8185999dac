"""Plots of entropy studies by name. A new one is one function and its name here; a plot that does not apply returns None."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from lambda_hat.entropy.plots.changes import plot_covariance, plot_decomposition, plot_diagnostics, plot_etas
from lambda_hat.entropy.plots.sequences import plot_attribution, plot_features, plot_influence, plot_linearity
from lambda_hat.entropy.plots.training import plot_exchange, plot_training
from lambda_hat.entropy.study import EntropyStudy
from lambda_hat.plots import draw
from lambda_hat.settings import nearest
from lambda_hat.spec import InvalidInput

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


def draw_plots(study: EntropyStudy, names: Sequence[str] = ()) -> dict[str, bytes]:
    """The plots of these names, all if there are none, that apply to the study, as PNG files: name -> bytes.

    Raises:
      InvalidInput: a name is not that of a plot.
    """
    if unknown := [name for name in names if name not in PLOTS]:
        raise InvalidInput(f"A plot must be known by name; got {unknown[0]!r}. {nearest(unknown[0], PLOTS)}")
    return draw({name: PLOTS[name] for name in names or PLOTS}, study)


__all__ = ["PLOTS", "draw_plots"]
