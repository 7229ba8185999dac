"""Plots of studies by name. A new one is one function, its name and its caption here; one that cannot be drawn returns why."""

from __future__ import annotations

import functools
from collections.abc import Callable

from matplotlib.figure import Figure

from lambda_hat.batch_size.plots.curves import plot_losscurve_grid, plot_losscurve_temp_eff_steps, plot_losscurve_temp_samples
from lambda_hat.batch_size.plots.maps import plot_heatmap_batch, plot_heatmap_gamma, plot_heatmap_temp
from lambda_hat.batch_size.plots.measures import plot_llc, plot_sharpness
from lambda_hat.batch_size.plots.scaling import plot_coordinate_check, plot_steps_to_target, plot_width_transfer
from lambda_hat.batch_size.study import Study
from lambda_hat.studies.plots import draw_chosen

PLOTS: dict[str, Callable[[Study], Figure | str]] = {
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


#: What a plot shows and how it is read, in a report.
CAPTIONS = {
    "heatmap_batch": (
        "The training loss at the end, over batch size and learning rate: the darker a cell, the lower the loss. A circle is "
        "the best learning rate of a batch size. It rises with the batch size as long as minibatch noise limits training, and "
        "stays where stability does"
    ),
    "heatmap_temp": (
        "The same losses over the temperature η/B, which sets the strength of the minibatch noise. Where columns have one "
        "colour from bottom to top the temperature alone decides the loss; where they do not, the learning rate itself does"
    ),
    "heatmap_gamma": (
        "The training loss at the end, over richness γ and learning rate. For raw learning rates a line through the best ones "
        "is the fitted power of γ, a dashed one the power that theory expects, γ² on the lazy side and γ^(2/L) on the rich "
        "one (for Adam half of both)"
    ),
    "losscurve_temp_samples": (
        "Training losses over the samples seen, for batch sizes at one temperature η/B in each panel. The curves are one "
        "where the temperature alone decides; a panel says up to which batch size they are"
    ),
    "losscurve_temp_eff_steps": (
        "The same losses over η × step, the time of gradient flow. The dashed curve, the same in every panel, is the largest "
        "batch size at its best learning rate: the nearer the others, the less minibatch noise matters"
    ),
    "losscurve_grid": (
        "Training losses over steps, a line for each learning rate and a panel for each other setting. A cross is where a "
        "curve ends that has failed"
    ),
    "width_transfer": (
        "The training loss at the end over learning rate, a line for each width, its best learning rate a star. Where the "
        "stars are above one another, the learning rate found on a narrow network is right for a wide one"
    ),
    "coordinate_check": (
        "How much each layer's output changes in training, over the width, at the learning rate that is best for all widths "
        "together. In muP the lines are level: every layer learns as much however wide the network is"
    ),
    "steps_to_target": (
        "Steps (left) and samples (right) until the target loss of the study, each batch size at the learning rate that needs "
        "fewest. The line is the fit S(B) = S_min (1 + B_crit / B); at the critical batch size, the vertical line, training "
        "takes twice the fewest steps and twice the fewest samples. Dotted is the gradient noise scale, which is expected "
        "near it"
    ),
    "sharpness": (
        "The largest eigenvalue of the loss's Hessian at the end of training, over batch size and learning rate, and against "
        "the learning rate that the weights feel. Gradient descent is stable below the dashed line"
    ),
    "llc": (
        "The loss at the end of training and, beside it, the local learning coefficient of the network found there: the "
        "lower, the more degenerate the minimum"
    ),
}

#: (study, names) -> the plots that can be drawn, and why others cannot: see `draw_chosen`.
draw_plots = functools.partial(draw_chosen, PLOTS)


__all__ = ["CAPTIONS", "PLOTS", "draw_plots"]
