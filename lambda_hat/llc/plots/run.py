"""Plots of one run's chains."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from lambda_hat.llc.diagnostics import Diagnosis
from lambda_hat.llc.estimates import autocorr, finite_chains, finite_draws, llc_draws, running_llc
from lambda_hat.llc.observables import recorded
from lambda_hat.llc.plots.common import LLC_LABEL, SETTLED, chain_label, counts, exact_line, llc_text, run_figure
from lambda_hat.llc.run import RunSpec
from lambda_hat.llc.trace import Trace
from lambda_hat.studies.style import BAND, LAST, MAX_POINTS, POOLED, color, legend, limits, say

#: A line of fewer points shows them; one of a single point is nothing else.
FEW_POINTS = 20
#: Kolmogorov's 95 % limit: of N draws, sqrt(N) times the largest distance between empirical and true distribution.
KOLMOGOROV_95 = 1.358
#: Lags of an autocorrelation are shown to twice where the mean over the chains falls below this.
CORRELATED = 0.05
#: Chains whose coordinates are shown; more would hide one another.
FEW_CHAINS = 4
#: Where a chain stops being finite.
CROSS: dict[str, Any] = {"marker": "X", "s": 70, "edgecolors": "black", "zorder": 3, "clip_on": False}


def plot_trace(spec: RunSpec, trace: Trace, diagnosis: Diagnosis) -> Figure:
    """The llc of each draw, chain by chain: burn-in shaded, and where a chain stops being finite."""
    fig = run_figure(spec, diagnosis)
    ax = fig.subplots()
    llc, kept, per_draw = llc_draws(trace, spec.nbeta), finite_chains(trace), spec.sampler.num_steps_bw_draws
    steps = (np.arange(llc.shape[1]) + 1) * per_draw
    # Draws before the first that is not finite.
    ends = np.where(kept, llc.shape[1], np.argmin(finite_draws(trace), axis=1))
    shown = llc.shape[1] if kept.any() else min(llc.shape[1], 2 * int(ends.max()) + 1)
    if kept.any():
        ax.set_ylim(limits(llc[kept, trace.num_burnin_draws :], diagnosis.true_llc, tails=0.001))
    else:
        ax.set_yscale("symlog", linthresh=1.0)
        ax.locator_params(axis="y", numticks=8)
    stride = -(-shown // MAX_POINTS)
    for chain, draws in enumerate(llc):
        drawn = slice(0, ends[chain], stride)
        label, marker = chain_label(chain, len(llc)), "." if ends[chain] <= FEW_POINTS else None
        ax.plot(steps[drawn], draws[drawn], color=color(chain), linewidth=0.7, alpha=0.7, marker=marker, label=label)
    lost = np.flatnonzero(~kept)
    if len(lost):
        # At the top of the axes wherever the last value was: values before the end are too large to show.
        label = f"not finite from here: {len(lost)} of {len(llc)} chains"
        place = {"transform": ax.get_xaxis_transform()}
        ax.scatter(
            steps[ends[lost]], np.full(len(lost), 0.97), c=[color(chain) for chain in lost], label=label, **CROSS | place
        )
    if trace.num_burnin_draws:
        ax.axvspan(0, trace.num_burnin_draws * per_draw, **BAND, color="0.5", label="burn-in")
    if diagnosis.llc is not None:
        ax.axhline(diagnosis.llc, color=POOLED, linewidth=1.2, label=f"llc {llc_text(diagnosis)}")
    exact_line(ax, diagnosis)
    ax.set(xlabel="step", ylabel=LLC_LABEL, xlim=(0, shown * per_draw))
    legend(fig, ax)
    return fig


def plot_running_llc(spec: RunSpec, trace: Trace, diagnosis: Diagnosis) -> Figure:
    """The estimate as draws come in: each chain's, and the pooled one with a band of one standard error."""
    fig = run_figure(spec, diagnosis)
    ax = fig.subplots()
    llc = llc_draws(trace, spec.nbeta)[finite_chains(trace), trace.num_burnin_draws :]
    steps = (np.arange(llc.shape[1]) + 1) * spec.sampler.num_steps_bw_draws
    settled = int(SETTLED * llc.shape[1])
    if len(llc):
        means = np.cumsum(llc, axis=1) / (np.arange(llc.shape[1]) + 1)
        names = np.flatnonzero(finite_chains(trace))
        stride = -(-llc.shape[1] // MAX_POINTS)
        for chain, line in zip(names, means, strict=True):
            label = chain_label(chain, len(names))
            ax.plot(steps[::stride], line[::stride], color=color(chain), linewidth=0.9, label=label)
        at = counts(llc.shape[1])
        pooled, errors = running_llc(llc, at)
        ax.plot(steps[at - 1], pooled, color=POOLED, linewidth=1.8, **LAST, label=f"llc {llc_text(diagnosis)}")
        ax.fill_between(steps[at - 1], pooled - errors, pooled + errors, **BAND, color=POOLED, label="± 1 MCSE")
        ax.set_ylim(limits(means[:, settled:], diagnosis.true_llc))
    else:
        say(ax, "no chain stayed finite")
    exact_line(ax, diagnosis)
    ax.set(xlabel="step after burn-in", ylabel="mean llc so far", xlim=(0, steps[-1]))
    legend(fig, ax)
    return fig


def plot_rank(spec: RunSpec, trace: Trace, diagnosis: Diagnosis) -> Figure:
    """How each chain's draws rank among all: the distribution of its ranks less the uniform one.

    Chains that sample the same posterior stay in the band, Kolmogorov's 95 % limit for their effective number of draws. One
    that ranks too high shows a valley, one that ranks too low a hill (Säilynoja et al. 2022).
    """
    fig = run_figure(spec, diagnosis)
    ax = fig.subplots()
    kept = np.flatnonzero(finite_chains(trace))
    llc = llc_draws(trace, spec.nbeta)[kept, trace.num_burnin_draws :]
    if len(kept) > 1:
        ranks = np.sort(rankdata(llc, axis=None).reshape(llc.shape) / llc.size, axis=1)
        levels = np.linspace(0, 1, 201)
        for chain, own in zip(kept, ranks, strict=True):
            difference = np.searchsorted(own, levels, side="right") / len(own) - levels
            ax.plot(levels, difference, color=color(chain), linewidth=1.2, label=chain_label(chain, len(kept)))
        effective = [ess for chain in kept if (ess := diagnosis.chains[chain].ess_bulk) is not None] or [1.0]
        # A chain is part of the pool it is ranked in, so it strays less from it than from the true distribution.
        limit = KOLMOGOROV_95 * np.sqrt((1 - 1 / len(kept)) / np.mean(effective))
        ax.axhspan(-limit, limit, **BAND, color="0.5", label=f"95 % for {np.mean(effective):.0f} effective draws a chain")
        reach = 1.15 * max(limit, float(np.abs(ax.dataLim.intervaly).max()))
        ax.set_ylim(-reach, reach)
    else:
        say(ax, "ranks compare chains: fewer than two stayed finite")
    ax.axhline(0, color=POOLED, linewidth=0.8)
    ax.set(xlabel="rank among all chains' draws / number of draws", ylabel="share of draws below − uniform", xlim=(0, 1))
    legend(fig, ax)
    return fig


def plot_autocorrelation(spec: RunSpec, trace: Trace, diagnosis: Diagnosis) -> Figure:
    """How long a chain remembers its llc: the correlation of draws a lag apart, of each chain and in the mean over them."""
    fig = run_figure(spec, diagnosis)
    ax = fig.subplots()
    moving = finite_chains(trace)
    llc = llc_draws(trace, spec.nbeta)[:, trace.num_burnin_draws :]
    moving[moving] = np.ptp(llc[moving], axis=1) > 0
    per_draw = spec.sampler.num_steps_bw_draws
    if moving.any():
        lines = np.array([autocorr(draws) for draws in llc[moving]])
        mean = lines.mean(axis=0)
        below = np.flatnonzero(mean < CORRELATED)
        last = min(len(mean), max(2 * int(below[0]) if len(below) else len(mean), 20))
        stride = -(-last // MAX_POINTS)
        lags = np.arange(0, last, stride)
        for chain, line in zip(np.flatnonzero(moving), lines, strict=True):
            label = chain_label(chain, len(lines))
            ax.plot(lags * per_draw, line[lags], color=color(chain), linewidth=0.9, alpha=0.7, label=label)
        ess = "" if diagnosis.ess_bulk is None else f", {diagnosis.ess_bulk:.0f} effective draws of {lines.size}"
        ax.plot(lags * per_draw, mean[lags], color=POOLED, linewidth=1.8, label=f"mean{ess}")
        noise = 1.96 / np.sqrt(llc.shape[1])
        ax.axhspan(-noise, noise, **BAND, color="0.5", label="95 % for independent draws")
        ax.set_xlim(0, max(lags[-1], 1) * per_draw)
    else:
        say(ax, "no chain stayed finite and moved")
    ax.axhline(0, color=POOLED, linewidth=0.8)
    ax.set(xlabel="lag (steps)", ylabel="autocorrelation of the llc", ylim=(None, 1.05))
    legend(fig, ax)
    return fig


def plot_energy(spec: RunSpec, trace: Trace, diagnosis: Diagnosis) -> Figure:
    """The potential U = nβ (L(w) − L(w*)) + localization/2 |u|² of each draw, and how it changes from draw to draw.

    E-BFMI = E[(U_t − U_{t−1})²] / Var[U] (Betancourt 2016): where the changes are much narrower than U itself, below 0.3 say,
    the chain wanders slowly across energies. Minibatch noise adds to both.
    """
    fig = run_figure(spec, diagnosis, width=9)
    kept = np.flatnonzero(finite_chains(trace))
    llc = llc_draws(trace, spec.nbeta)[kept, trace.num_burnin_draws :]
    pull = spec.posterior.localization / 2 * trace.posterior_draws("squared_distance")[kept].astype(np.float64)
    energy = llc + pull
    over_time, spread = fig.subplots(1, 2, width_ratios=(3, 2))
    steps = (np.arange(llc.shape[1]) + 1) * spec.sampler.num_steps_bw_draws
    stride = -(-len(steps) // MAX_POINTS)
    for chain, line in zip(kept, energy, strict=True):
        label = chain_label(chain, len(kept))
        over_time.plot(steps[::stride], line[::stride], color=color(chain), linewidth=0.7, alpha=0.7, label=label)
    if len(kept):
        over_time.set_ylim(limits(energy, tails=0.001))
        centred, changes = energy - energy.mean(axis=1, keepdims=True), np.diff(energy, axis=1)
        low, high = limits(np.concatenate([centred, changes], axis=1), tails=0.001)
        bins = np.linspace(low, high, 61)
        variance = float(np.mean(np.square(centred)))
        bfmi = f"{np.mean(np.square(changes)) / variance:.2f}" if variance > 0 else "-"
        shape: dict[str, Any] = {"bins": bins, "density": True}
        spread.hist(np.clip(centred, low, high).ravel(), color="0.6", label="U − its mean", **shape)
        label = f"change of U between draws; E-BFMI {bfmi}"
        spread.hist(np.clip(changes, low, high).ravel(), histtype="step", color=POOLED, linewidth=1.5, label=label, **shape)
        pulled = f"mean: loss {llc.mean():.3g}, pull {pull.mean():.3g}"
        over_time.plot([], [], " ", label=pulled)
        spread.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    else:
        say(over_time, "no chain stayed finite")
    over_time.set(xlabel="step after burn-in", ylabel="energy U (nats)", xlim=(0, steps[-1]))
    spread.set(xlabel="energy (nats)", ylabel="density")
    legend(fig, over_time, ncols=5)
    return fig


def plot_theta_trace(spec: RunSpec, trace: Trace, diagnosis: Diagnosis) -> Figure | None:
    """Some coordinates of the offset u from w*, of the first chains; None where no chain or coordinate is left."""
    coordinates = recorded(trace, "coordinates")
    if coordinates is None:
        return None
    kept = np.flatnonzero(finite_chains(trace))[:FEW_CHAINS]
    count = coordinates.shape[2]
    fig = run_figure(spec, diagnosis, height=1.2 + 0.85 * count)
    axes = fig.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    steps = (np.arange(coordinates.shape[1]) + 1) * spec.sampler.num_steps_bw_draws
    stride = -(-len(steps) // (MAX_POINTS // 2))
    for index, ax in enumerate(axes):
        for chain, draws in zip(kept, coordinates[: len(kept), :, index], strict=True):
            label = chain_label(chain, len(kept))
            ax.plot(steps[::stride], draws[::stride], color=color(chain), linewidth=0.6, alpha=0.7, label=label)
        ax.axhline(0, color=POOLED, linewidth=0.6)
        ax.set_ylim(limits(coordinates[:, :, index], exact=0.0, tails=0.001))
        ax.locator_params(axis="y", nbins=3)
        ax.tick_params(labelsize=8)
    fig.supylabel("offset u from w*, evenly spaced coordinates", fontsize=9)
    axes[-1].set(xlabel="step after burn-in", xlim=(0, steps[-1]))
    legend(fig, axes[0], ncols=8)
    return fig
