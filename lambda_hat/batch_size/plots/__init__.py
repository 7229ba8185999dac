"""Plots of studies by name. A new one is one function and its name here; a plot that does not apply returns None."""

from __future__ import annotations

import functools
from collections.abc import Callable

from matplotlib.figure import Figure

from lambda_hat.batch_size.plots.curves import plot_losscurve_grid, plot_losscurve_temp_eff_steps, plot_losscurve_temp_samples
from lambda_hat.batch_size.plots.maps import plot_heatmap_batch, plot_heatmap_gamma, plot_heatmap_temp
from lambda_hat.batch_size.plots.measures import plot_llc, plot_sharpness
from lambda_hat.batch_size.plots.scaling import plot_coordinate_check, plot_steps_to_target, plot_width_transfer
from lambda_hat.batch_size.study import Study
from lambda_hat.plots import draw_chosen

PLOTS: dict[str, Callable[[Study], Figure | None]] = {
    "heatmap_batch": plot_heatmap_batch,
    "heatmap_temp": plot_heatmap_temp,
    "heatmap_gamma": plot_heatmap_gamma,
    "losscurve_temp_samples": plot_losscurve_temp_samples,
    "losscurve_temp_eff_steps": plot_losscurve_temp_eff_steps,
    "losscurve_grid": plot_losscurve_grid,
    "width_transfer": plot_width_transfer,
    "coordinate_check": plot_coordinate_check,
    "steps_to_target": plot_steps_to_target,
    "sharpness": plot_sharpness,
    "llc": plot_llc,
}


#: (study, names) -> PNG files by name: see `draw_chosen`.
draw_plots = functools.partial(draw_chosen, PLOTS)


__all__ = ["PLOTS", "draw_plots"]
