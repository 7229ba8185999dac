"""Plots of runs. A new one is one function here and its name in `RUN_PLOTS` or `TARGET_PLOTS`."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from PIL import Image
from scipy.stats import rankdata

from lambda_hat.diagnostics import Diagnosis
from lambda_hat.llc import MIN_DRAWS, finite_chains, finite_draws, llc_draws, running_llc
from lambda_hat.run import RunSpec, labels
from lambda_hat.sampling import Trace

Run = tuple[RunSpec, Trace, Diagnosis]

#: Okabe & Ito's colours for all kinds of sight, less yellow, too pale for a line, and black, the pooled estimate's.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = ("-", "-.", ":")
POOLED, EXACT = "black", "#666666"

#: Points of a line, some two pixels apart; more are not seen.
MAX_POINTS = 400
#: A line of fewer points shows them; one of a single point is nothing else.
FEW_POINTS = 20
#: Points at which errors of a running estimate are computed.
MAX_ERRORS = 40
#: Chains that are named in a legend.
MAX_NAMED = 8
#: The share of a run after which a running mean has calmed down enough for its range to be shown.
SETTLED = 0.1
#: Kolmogorov's 95 % limit: of N draws, sqrt(N) times the largest distance between empirical and true distribution.
KOLMOGOROV_95 = 1.358

#: Where a chain stops being finite.
CROSS: dict[str, Any] = {"marker": "X", "s": 70, "edgecolors": "black", "zorder": 3, "clip_on": False}
#: A shaded range.
BAND: dict[str, Any] = {"alpha": 0.2, "linewidth": 0}
#: The end of a running estimate, marked.
LAST: dict[str, Any] = {"marker": "o", "markersize": 4, "markevery": [-1]}

LLC_LABEL = "llc: nβ (L(w) − L(w*))"


def save_png(fig: Figure) -> bytes:
    """The figure as a PNG file of 256 colours, which takes a third of the room and looks the same."""
    raw, small = io.BytesIO(), io.BytesIO()
    fig.savefig(raw, format="png", dpi=110)
    # An octree keeps rare colours; a median cut, the default, gives a short line its neighbour's.
    picture = Image.open(raw).convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()


def plot_trace(spec: RunSpec, trace: Trace, diagnosis: Diagnosis) -> Figure:
    """The llc of each draw, chain by chain: burn-in shaded, and where a chain stops being finite."""
    fig, ax = _figure(spec, diagnosis)
    llc, kept, per_draw = llc_draws(trace, spec.nbeta), finite_chains(trace), spec.sampler.num_steps_bw_draws
    steps = (np.arange(llc.shape[1]) + 1) * per_draw
    # Draws before the first that is not finite.
    ends = np.where(kept, llc.shape[1], np.argmin(finite_draws(trace), axis=1))
    shown = llc.shape[1] if kept.any() else min(llc.shape[1], 2 * int(ends.max()) + 1)
    if kept.any():
        ax.set_ylim(_range(llc[kept, trace.num_burnin_draws :], diagnosis.true_llc, tails=0.001))
    else:
        ax.set_yscale("symlog", linthresh=1.0)
        ax.locator_params(axis="y", numticks=8)
    stride = -(-shown // MAX_POINTS)
    for chain, draws in enumerate(llc):
        drawn = slice(0, ends[chain], stride)
        label = f"chain {chain}" if len(llc) <= MAX_NAMED else None
        marker = "." if ends[chain] <= FEW_POINTS else None
        ax.plot(steps[drawn], draws[drawn], color=_color(chain), linewidth=0.7, alpha=0.7, marker=marker, label=label)
    lost = np.flatnonzero(~kept)
    if len(lost):
        # At the top of the axes wherever the last value was: values before the end are too large to show.
        label = f"not finite from here: {len(lost)} of {len(llc)} chains"
        place = {"transform": ax.get_xaxis_transform()}
        ax.scatter(
            steps[ends[lost]], np.full(len(lost), 0.97), c=[_color(chain) for chain in lost], label=label, **CROSS | place
        )
    if trace.num_burnin_draws:
        ax.axvspan(0, trace.num_burnin_draws * per_draw, **BAND, color="0.5", label="burn-in")
    if diagnosis.llc is not None:
        ax.axhline(diagnosis.llc, color=POOLED, linewidth=1.2, label=f"llc {_with_error(diagnosis)}")
    _exact_line(ax, diagnosis)
    ax.set(xlabel="step", ylabel=LLC_LABEL, xlim=(0, shown * per_draw))
    _legend(fig, ax)
    return fig


def plot_running_llc(spec: RunSpec, trace: Trace, diagnosis: Diagnosis) -> Figure:
    """The estimate as draws come in: each chain's, and the pooled one with a band of one standard error."""
    fig, ax = _figure(spec, diagnosis)
    llc = llc_draws(trace, spec.nbeta)[finite_chains(trace), trace.num_burnin_draws :]
    steps = (np.arange(llc.shape[1]) + 1) * spec.sampler.num_steps_bw_draws
    settled = int(SETTLED * llc.shape[1])
    if len(llc):
        means = np.cumsum(llc, axis=1) / (np.arange(llc.shape[1]) + 1)
        names = np.flatnonzero(finite_chains(trace))
        stride = -(-llc.shape[1] // MAX_POINTS)
        for chain, line in zip(names, means, strict=True):
            label = f"chain {chain}" if len(names) <= MAX_NAMED else None
            ax.plot(steps[::stride], line[::stride], color=_color(chain), linewidth=0.9, label=label)
        counts = _counts(llc.shape[1])
        pooled, errors = running_llc(llc, counts)
        ax.plot(steps[counts - 1], pooled, color=POOLED, linewidth=1.8, **LAST, label=f"llc {_with_error(diagnosis)}")
        ax.fill_between(steps[counts - 1], pooled - errors, pooled + errors, **BAND, color=POOLED, label="± 1 MCSE")
        ax.set_ylim(_range(means[:, settled:], diagnosis.true_llc))
    else:
        _say(ax, "no chain stayed finite")
    _exact_line(ax, diagnosis)
    ax.set(xlabel="step after burn-in", ylabel="mean llc so far", xlim=(0, steps[-1]))
    _legend(fig, ax)
    return fig


def plot_rank(spec: RunSpec, trace: Trace, diagnosis: Diagnosis) -> Figure:
    """How each chain's draws rank among all: the distribution of its ranks less the uniform one.

    Chains that sample the same posterior stay in the band, Kolmogorov's 95 % limit for their effective number of draws. One
    that ranks too high shows a valley, one that ranks too low a hill (Säilynoja et al. 2022).
    """
    fig, ax = _figure(spec, diagnosis)
    kept = np.flatnonzero(finite_chains(trace))
    llc = llc_draws(trace, spec.nbeta)[kept, trace.num_burnin_draws :]
    if len(kept) > 1:
        ranks = np.sort(rankdata(llc, axis=None).reshape(llc.shape) / llc.size, axis=1)
        levels = np.linspace(0, 1, 201)
        for chain, own in zip(kept, ranks, strict=True):
            label = f"chain {chain}" if len(kept) <= MAX_NAMED else None
            difference = np.searchsorted(own, levels, side="right") / len(own) - levels
            ax.plot(levels, difference, color=_color(chain), linewidth=1.2, label=label)
        effective = [ess for chain in kept if (ess := diagnosis.chains[chain].ess_bulk) is not None] or [1.0]
        # A chain is part of the pool it is ranked in, so it strays less from it than from the true distribution.
        limit = KOLMOGOROV_95 * np.sqrt((1 - 1 / len(kept)) / np.mean(effective))
        ax.axhspan(-limit, limit, **BAND, color="0.5", label=f"95 % for {np.mean(effective):.0f} effective draws a chain")
        reach = 1.15 * max(limit, float(np.abs(ax.dataLim.intervaly).max()))
        ax.set_ylim(-reach, reach)
    else:
        _say(ax, "ranks compare chains: fewer than two stayed finite")
    ax.axhline(0, color=POOLED, linewidth=0.8)
    ax.set(xlabel="rank among all chains' draws / number of draws", ylabel="share of draws below − uniform", xlim=(0, 1))
    _legend(fig, ax)
    return fig


def plot_llc_convergence(runs: Sequence[Run]) -> Figure:
    """The estimates of all runs on one target against their work, burn-in and tuning counted; one standard error as a band."""
    rows = len(runs) + 1
    fig = Figure(figsize=(9, 4.2 + 0.19 * rows), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    shown = []
    spans: dict[Axes, list[float]] = {ax: [] for ax in axes}
    for index, ((spec, trace, diagnosis), (_, label)) in enumerate(zip(runs, labels([run[0] for run in runs]), strict=True)):
        style = {"color": _color(index), "linestyle": STYLES[index // len(COLORS) % len(STYLES)]}
        llc = llc_draws(trace, spec.nbeta)[finite_chains(trace), trace.num_burnin_draws :]
        counts = _counts(llc.shape[1])
        means, errors = running_llc(llc, counts) if len(llc) else np.full((2, len(counts)), np.nan)
        sampler = spec.sampler
        work_per_draw = sampler.num_chains * sampler.num_steps_bw_draws * sampler.gradients_per_step(spec.target.num_data)
        work = spec.fge - (llc.shape[1] - counts) * work_per_draw
        note = f"{label}: {_with_error(diagnosis)}" + ("" if diagnosis.verdict == "ok" else f" ({diagnosis.verdict})")
        # Time goes with work: each step of a run takes the same.
        for ax, x in zip(axes, (work, work / spec.fge * diagnosis.seconds), strict=True):
            spans[ax].extend(x[[0, -1]])
            ax.plot(x, means, label=note, linewidth=1.6, **style, **LAST)
            ax.fill_between(x, means - errors, means + errors, **BAND, color=style["color"])
        if len(llc):
            error = np.nan_to_num(errors[-1])
            shown.append(np.append(means[counts > SETTLED * llc.shape[1]], [means[-1] - error, means[-1] + error]))
    first = runs[0][2]
    for ax, xlabel, unit in zip(axes, ("work (full-data gradient equivalents)", "time (seconds)"), ("", "s"), strict=True):
        _exact_line(ax, first)
        # Set because Matplotlib finds no limits for runs without an estimate.
        ax.set(xlabel=xlabel, xscale="log", xlim=(min(spans[ax]) / 1.1, max(spans[ax]) * 1.1))
        _log_ticks(ax, unit)
    if shown:
        axes[0].set_ylim(_comparable_range(shown, first.true_llc))
    axes[0].set_ylabel("mean llc so far")
    fig.suptitle(f"{runs[0][0].target.family} · llc against work", x=0.01, ha="left", fontsize=11)
    fig.text(0.99, 0.99, runs[0][0].target_id, ha="right", va="top", fontsize=7, color=EXACT)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", fontsize=8, frameon=False)
    return fig


RUN_PLOTS: dict[str, Callable[[RunSpec, Trace, Diagnosis], Figure]] = {
    "trace": plot_trace,
    "rank": plot_rank,
    "running_llc": plot_running_llc,
}
TARGET_PLOTS: dict[str, Callable[[Sequence[Run]], Figure]] = {"llc_convergence": plot_llc_convergence}


def _figure(spec: RunSpec, diagnosis: Diagnosis) -> tuple[Figure, Axes]:
    fig = Figure(figsize=(7.5, 4.2), layout="constrained")
    ax = fig.subplots()
    ax.set_title(f"{spec.target.family} · {spec.sampler.kind} · {diagnosis.verdict}", loc="left", fontsize=11)
    ax.set_title(spec.run_id, loc="right", fontsize=7, color=EXACT)
    return fig, ax


def _color(index: int | np.integer) -> str:
    return COLORS[index % len(COLORS)]


def _legend(fig: Figure, ax: Axes) -> None:
    handles, names = ax.get_legend_handles_labels()
    if handles:
        fig.legend(handles, names, loc="outside lower left", ncols=4, fontsize=8, frameon=False)


def _exact_line(ax: Axes, diagnosis: Diagnosis) -> None:
    if diagnosis.true_llc is not None:
        ax.axhline(diagnosis.true_llc, color=EXACT, linestyle="--", linewidth=1.2, label=f"exact {diagnosis.true_llc_text}")


def _log_ticks(ax: Axes, unit: str) -> None:
    """Some three to nine labelled ticks on a logarithmic x axis, however many decades it spans."""
    decades = np.diff(np.log10(ax.get_xlim()))[0]
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5) if decades > 0.7 else tuple(range(1, 10))))
    ax.xaxis.set_major_formatter(EngFormatter(unit, sep=" " if unit else ""))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.6, text, transform=ax.transAxes, ha="center")


def _with_error(diagnosis: Diagnosis) -> str:
    if diagnosis.llc is None:
        return "no estimate"
    return f"{diagnosis.llc:.4g}" + ("" if diagnosis.mcse is None else f" ± {diagnosis.mcse:.2g}")


def _counts(num_draws: int) -> np.ndarray:
    """Numbers of draws at which a running estimate is shown, evenly spaced in log."""
    return np.unique(np.geomspace(min(MIN_DRAWS, num_draws), num_draws, MAX_ERRORS).astype(int))


def _range(values: np.ndarray, exact: float | None, tails: float = 0.0) -> tuple[float, float]:
    """Limits that show all but the tails of `values`, and the exact llc."""
    low, high = (float(np.quantile(values, q)) for q in (tails, 1 - tails))
    if exact is not None:
        low, high = min(low, exact), max(high, exact)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _comparable_range(lines: Sequence[np.ndarray], exact: float | None) -> tuple[float, float]:
    """Limits for several runs' estimates; of one far beyond the exact value, or else the others, only the legend tells."""
    centre = float(np.median([np.median(line) for line in lines])) if exact is None else exact
    reach = 1.5 * abs(centre) or 1.0
    low, high = _range(np.concatenate(lines), exact)
    return max(low, centre - reach), min(high, centre + reach)
