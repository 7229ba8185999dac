"""Plots by name. A new one is one function and its name here; a plot that does not apply returns None."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lambda_hat.llc.diagnostics import Diagnosis
from lambda_hat.llc.plots.calibration import plot_calibration
from lambda_hat.llc.plots.common import Run
from lambda_hat.llc.plots.datasets import plot_influence, plot_llc_by_dataset
from lambda_hat.llc.plots.run import (
    plot_autocorrelation,
    plot_energy,
    plot_rank,
    plot_running_llc,
    plot_theta_trace,
    plot_trace,
)
from lambda_hat.llc.plots.sweep import plot_llc_vs_true
from lambda_hat.llc.plots.target import plot_llc_convergence, plot_llc_over_training, plot_temperature
from lambda_hat.llc.run import RunSpec
from lambda_hat.llc.trace import Trace
from lambda_hat.studies.style import save_png

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


__all__ = ["RUN_PLOTS", "SWEEP_PLOTS", "TARGET_PLOTS", "Run", "draw", "save_png"]
