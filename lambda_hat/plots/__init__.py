"""Plots by name. A new one is one function and its name here; a plot that does not apply returns None."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from lambda_hat.diagnostics import Diagnosis
from lambda_hat.plots.calibration import plot_calibration
from lambda_hat.plots.datasets import plot_influence, plot_llc_by_dataset
from lambda_hat.plots.run import (
    plot_autocorrelation,
    plot_energy,
    plot_rank,
    plot_running_llc,
    plot_theta_trace,
    plot_trace,
)
from lambda_hat.plots.style import Run, save_png
from lambda_hat.plots.sweep import plot_llc_vs_true
from lambda_hat.plots.target import plot_llc_convergence, plot_llc_over_training, plot_temperature
from lambda_hat.run import RunSpec
from lambda_hat.settings import nearest
from lambda_hat.spec import InvalidInput
from lambda_hat.trace import Trace

#: Of one run.
RUN_PLOTS: dict[str, Callable[[RunSpec, Trace, Diagnosis], Figure | None]] = {
    "trace": plot_trace,
    "rank": plot_rank,
    "running_llc": plot_running_llc,
    "autocorrelation": plot_autocorrelation,
    "energy": plot_energy,
    "theta_trace": plot_theta_trace,
    "llc_by_dataset": plot_llc_by_dataset,
    "influence": plot_influence,
}
#: Of the runs on one target.
TARGET_PLOTS: dict[str, Callable[[Sequence[Run]], Figure | None]] = {
    "llc_convergence": plot_llc_convergence,
    "calibration": plot_calibration,
    "llc_over_training": plot_llc_over_training,
    "temperature": plot_temperature,
}
#: Of all runs of a sweep; what they say, without their draws.
SWEEP_PLOTS: dict[str, Callable[[Sequence[tuple[RunSpec, Diagnosis]]], Figure | None]] = {"llc_vs_true": plot_llc_vs_true}


def draw(plots: Mapping[str, Callable[..., Figure | None]], *content: Any) -> dict[str, bytes]:
    """The plots of this content that apply, as PNG files: name -> bytes."""
    figures = {name: plot(*content) for name, plot in plots.items()}
    return {name: save_png(figure) for name, figure in figures.items() if figure is not None}


class Drawn(NamedTuple):
    """The plots of a study. pngs: name -> PNG. left_out: name -> why it cannot be drawn."""

    pngs: dict[str, bytes]
    left_out: dict[str, str]


def draw_chosen(plots: Mapping[str, Callable[[Any], Figure | str]], study: Any, names: Sequence[str] | None = None) -> Drawn:
    """The plots of these names, or all, of a study: a plot that cannot be drawn of it returns the reason.

    Raises:
      InvalidInput: a name is not that of a plot. RuntimeError: a plot fails; it says which.
    """
    if unknown := [name for name in names or () if name not in plots]:
        raise InvalidInput(f"A plot must be known by name; got {unknown[0]!r}. {nearest(unknown[0], plots)}")
    drawn = Drawn({}, {})
    for name in plots if names is None else dict.fromkeys(names):
        try:
            found = plots[name](study)
        except Exception as error:
            raise RuntimeError(f"the plot {name} failed: {type(error).__name__}: {error}") from error
        if isinstance(found, Figure):
            drawn.pngs[name] = save_png(found)
        else:
            drawn.left_out[name] = found
    return drawn


__all__ = ["RUN_PLOTS", "SWEEP_PLOTS", "TARGET_PLOTS", "Drawn", "Run", "draw", "draw_chosen", "save_png"]
