"""Plots of the losses followed on named datasets."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from lambda_hat.llc import observables
from lambda_hat.llc.diagnostics import Diagnosis
from lambda_hat.llc.plots.common import llc_text, run_figure
from lambda_hat.llc.run import RunSpec
from lambda_hat.llc.trace import Trace
from lambda_hat.studies.style import BAND, EXACT, POOLED, color, legend

#: Samples along a side of the influence matrix; of more, evenly spaced ones are shown.
MAX_SAMPLES = 400
#: The share of entries whose colours are told apart; the others are saturated.
SHOWN = 0.99
#: Datasets of which a matrix is small enough to have numbers in it.
MAX_NUMBERS = 12


def plot_llc_by_dataset(spec: RunSpec, trace: Trace, diagnosis: Diagnosis) -> Figure | None:
    """The llc on each dataset, with one Monte Carlo standard error (black) and that of the choice of its samples (grey); None
    where none was followed."""
    found = diagnosis.llc_by_dataset
    if not found:
        return None
    fig = run_figure(spec, diagnosis, height=1.6 + 0.32 * len(found))
    ax = fig.subplots()
    places = np.arange(len(found))[::-1]
    values = [estimate.llc for estimate in found.values()]
    errors = [estimate.mcse or 0.0 for estimate in found.values()]
    choice = [estimate.sample_error or 0.0 for estimate in found.values()]
    ax.barh(places, values, color=color(4), height=0.65)
    ax.errorbar(values, places, xerr=choice, fmt="none", ecolor=EXACT, elinewidth=5, alpha=0.45, label="± choice of samples")
    ax.errorbar(values, places, xerr=errors, fmt="none", ecolor=POOLED, elinewidth=1.2, capsize=3, label="± MCSE")
    ax.set_yticks(places, [f"{name} ({estimate.num_samples})" for name, estimate in found.items()])
    ax.axvline(0, color=POOLED, linewidth=0.8)
    if diagnosis.llc is not None:
        error = diagnosis.mcse or 0.0
        ax.axvline(diagnosis.llc, color=EXACT, linestyle="--", linewidth=1.2, label=f"all training data: {llc_text(diagnosis)}")
        ax.axvspan(diagnosis.llc - error, diagnosis.llc + error, **BAND, color=EXACT)
    legend(fig, ax)
    ax.set(xlabel="nβ (E[L_D(w)] − L_D(w*))", ylabel="dataset (samples)")
    return fig


def plot_influence(spec: RunSpec, trace: Trace, diagnosis: Diagnosis) -> Figure | None:
    """Bayesian influence −Cov[l_i, l_j] among the samples followed, and of the datasets on one another; None without any.

    Blue: more weight on one lowers the expected loss of the other.
    """
    observed = observables.recorded(trace, "observed")
    if observed is None or observed.shape[1] < 2:
        return None
    names = list(trace.observables)
    stride = -(-observed.shape[2] // MAX_SAMPLES)
    among_samples = observables.influence(observed[:, :, ::stride]).values
    among_datasets = observables.influence(observables.block_losses(observed, trace.observables))
    several = len(names) > 1
    fig = run_figure(spec, diagnosis, width=11 if several else 6, height=5.2)
    axes = fig.subplots(1, 2 if several else 1, squeeze=False)[0]
    edges = np.array([block.start for block in observables.blocks(trace.observables).values()] + [observed.shape[2]]) / stride
    _heatmap(fig, axes[0], among_samples, "−Cov[l_i, l_j] (nats²)")
    for edge in edges[1:-1]:
        axes[0].axhline(edge - 0.5, color=POOLED, linewidth=0.6)
        axes[0].axvline(edge - 0.5, color=POOLED, linewidth=0.6)
    middles = (edges[1:] + edges[:-1]) / 2 - 0.5
    _label(axes[0], middles, names)
    axes[0].set_title(f"samples{'' if stride == 1 else f', one in {stride}'}", fontsize=9)
    if several:
        _heatmap(fig, axes[1], among_datasets.values, "−Cov[L_D, L_D'] (nats²)")
        _label(axes[1], np.arange(len(names)), names)
        axes[1].set_title("means over datasets" + (", with errors" if len(names) <= MAX_NUMBERS else ""), fontsize=9)
        if len(names) <= MAX_NUMBERS:
            top = float(np.abs(among_datasets.values).max()) or 1.0
            for (i, j), value in np.ndenumerate(among_datasets.values):
                text = f"{value:.1e}\n±{among_datasets.mcse[i, j]:.0e}"
                ax_color = "white" if abs(value) > 0.6 * top else "black"
                axes[1].text(j, i, text, ha="center", va="center", fontsize=7 if len(names) < 8 else 5, color=ax_color)
    return fig


def _heatmap(fig: Figure, ax, values: np.ndarray, label: str) -> None:
    reach = float(np.quantile(np.abs(values), SHOWN)) or 1.0
    image = ax.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
    bar = fig.colorbar(image, ax=ax, shrink=0.8, extend="both" if np.abs(values).max() > reach else "neither")
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _label(ax, places: np.ndarray, names: list[str]) -> None:
    ax.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(places, names, fontsize=8)
