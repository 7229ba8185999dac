"""Plots that compare the runs on one target."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambda_hat.llc.estimates import finite_chains, llc_draws, running_llc
from lambda_hat.llc.observables import free_energy_by_integration
from lambda_hat.llc.plots.common import SETTLED, Run, comparable_limits, counts, exact_line, llc_text, target_name
from lambda_hat.llc.run import RunSpec, labels
from lambda_hat.specs.spec import canonical_json
from lambda_hat.studies.style import BAND, COLORS, LAST, MARKERS, STYLES, Picture, color, head, legend, log_ticks

#: Runs whose lines are told apart; more are for maps.
MAX_RUNS = 24
#: What was measured in training, apart from the samplers' colours.
GREYS = ("black", "#8A8A8A", "#BBBBBB")
#: Temperatures that make a curve.
MIN_TEMPERATURES = 3


def plot_llc_convergence(runs: Sequence[Run]) -> Figure | None:
    """The estimates of all runs on one target against their work, burn-in and tuning counted; one standard error as a band.

    None for more runs than lines can show.
    """
    if len(runs) > MAX_RUNS:
        return None
    rows = len(runs) + 1
    fig = Picture(figsize=(9, 4.2 + 0.19 * rows), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    shown = []
    spans: dict[Axes, list[float]] = {ax: [] for ax in axes}
    for index, ((spec, trace, diagnosis), label) in enumerate(zip(runs, _names(runs), strict=True)):
        style = _style(index)
        llc = llc_draws(trace, spec.nbeta)[finite_chains(trace), trace.num_burnin_draws :]
        at = counts(llc.shape[1])
        means, errors = running_llc(llc, at) if len(llc) else np.full((2, len(at)), np.nan)
        so_far = np.cumsum(np.nansum(trace.draws["work"], axis=0, dtype=np.float64))
        work = so_far[trace.num_burnin_draws + at - 1]
        note = f"{label}: {llc_text(diagnosis)}" + ("" if diagnosis.verdict == "ok" else f" ({diagnosis.verdict})")
        # Time goes with work.
        for ax, x in zip(axes, (work, work / so_far[-1] * diagnosis.seconds), strict=True):
            spans[ax].extend(x[[0, -1]])
            ax.plot(x, means, label=note, linewidth=1.6, **style, **LAST)
            ax.fill_between(x, means - errors, means + errors, **BAND, color=style["color"])
        if len(llc):
            error = np.nan_to_num(errors[-1])
            shown.append(np.append(means[at > SETTLED * llc.shape[1]], [means[-1] - error, means[-1] + error]))
    first = runs[0][2]
    for ax, xlabel, unit in zip(axes, ("work (full-data gradient equivalents)", "time (seconds)"), ("", "s"), strict=True):
        exact_line(ax, first)
        # Set because Matplotlib finds no limits for runs without an estimate.
        ax.set(xlabel=xlabel, xscale="log", xlim=(min(spans[ax]) / 1.1, max(spans[ax]) * 1.1))
        log_ticks(ax, unit)
    if shown:
        axes[0].set_ylim(comparable_limits(shown, first.true_llc))
    axes[0].set_ylabel("mean llc so far")
    head(fig, f"{runs[0][0].target.family} · llc against work", runs[0][0].target_id)
    legend(fig, axes[0], ncols=1)
    return fig


def plot_llc_over_training(runs: Sequence[Run]) -> Figure | None:
    """The llc at each checkpoint of a training, and what else was measured there; None for fewer than two checkpoints.

    Open marks are verdicts other than ok.
    """
    steps = [_step(spec) for spec, _, _ in runs]
    if len(set(steps)) < 2:
        return None
    fig = Picture(figsize=(8, 6.2), layout="constrained")
    above, below = fig.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for index, (name, lines) in enumerate(_grouped(runs, _sampler_names(runs)).items()):
        of_sampler = sorted((run for run in lines if run[2].llc is not None), key=lambda run: _step(run[0]))
        x = [_step(spec) for spec, _, _ in of_sampler]
        values, errors = _estimates(of_sampler)
        style = _style(index)
        above.errorbar(x, values, errors, linewidth=1.4, capsize=2, label=name, **style)
        for position, value, (_, _, diagnosis) in zip(x, values, of_sampler, strict=True):
            face = style["color"] if diagnosis.verdict == "ok" else "white"
            above.plot(position, value, MARKERS[0], markersize=4, markerfacecolor=face, markeredgecolor=style["color"])
    measured = {_step(spec): diagnosis for spec, _, diagnosis in runs}
    ordered = sorted(measured)
    series: dict[str, dict[str, list[float | None]]] = {
        "loss": {"train": [measured[step].init_loss for step in ordered]}, "accuracy": {}
    }  # fmt: skip
    for name in sorted({name for diagnosis in measured.values() for name in diagnosis.metrics}):
        for what, of in series.items():
            if what in name:
                of[name.replace(f"_{what}", "")] = [measured[step].metrics.get(name) for step in ordered]
    names = sorted(series["loss"].keys() | series["accuracy"].keys(), reverse=True)
    for kind, ax, line in (("loss", below, "-"), ("accuracy", below.twinx() if series["accuracy"] else below, "--")):
        for name, measurements in series[kind].items():
            index = names.index(name)
            known = [np.nan if value is None else value for value in measurements]
            below.plot([], [], line, color=GREYS[index % len(GREYS)], label=f"{kind}, {name}")  # for the legend
            ax.plot(ordered, known, line, color=GREYS[index % len(GREYS)], linewidth=1.4)
    below.set(
        xlabel="training step", ylabel="loss (nats)", yscale="log" if (measured[ordered[0]].init_loss or 0) > 0 else "linear"
    )
    if series["accuracy"]:
        fig.axes[-1].set(ylabel="accuracy (dashed)", ylim=(0, 1.03))
    positive = [step for step in ordered if step > 0]
    above.set_ylabel("llc")
    if positive:
        below.set_xscale(**{"value": "symlog", "linthresh": min(positive)} if 0 in ordered else {"value": "log"})
        below.set_xlim(0 if 0 in ordered else ordered[0] / 1.1, 1.1 * ordered[-1])
    head(fig, f"{runs[0][0].target.family} · llc over training", runs[0][0].target_id)
    handles, entries = (
        a + b for a, b in zip(above.get_legend_handles_labels(), below.get_legend_handles_labels(), strict=True)
    )
    fig.legend(handles, entries, loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    return fig


def plot_temperature(runs: Sequence[Run]) -> Figure | None:
    """The llc at several nbeta, and the free energy by integrating it, crosses by smc's own weights; None for fewer than three.

    A free energy is shown less that at the smallest nbeta and less (nbeta - the smallest) L(w*), in nats.
    """
    groups = _grouped(runs, [_but_nbeta(spec) for spec, _, _ in runs])
    curves = []
    for group in groups.values():
        by_nbeta = {run[0].nbeta: run for run in group if run[2].llc is not None and run[2].verdict != "diverged"}
        if len(by_nbeta) >= MIN_TEMPERATURES:
            curves.append([by_nbeta[nbeta] for nbeta in sorted(by_nbeta)])
    if not curves or len(curves) > MAX_RUNS:
        return None
    fig = Picture(figsize=(9, 4.2 + 0.19 * len(curves)), layout="constrained")
    left, right = fig.subplots(1, 2)
    # All but their nbeta, in which the runs of a curve differ.
    alike = [
        spec.model_copy(update={"posterior": spec.posterior.model_copy(update={"nbeta": None})}) for (spec, _, _), *_ in curves
    ]
    names = [sampler for _, sampler in labels(alike)]
    for index, (curve, name) in enumerate(zip(curves, names, strict=True)):
        nbeta = np.array([spec.nbeta for spec, _, _ in curve])
        values, errors = _estimates(curve)
        style = _style(index)
        left.errorbar(nbeta, values, errors, marker="o", markersize=4, capsize=2, label=name, **style)
        energies = free_energy_by_integration(nbeta, values, errors)
        right.errorbar(nbeta, energies.values, energies.mcse, marker="o", markersize=4, capsize=2, **style)
        own = [(b, d.free_energy - b * d.init_loss, d.free_energy_mcse or 0.0)
               for b, (_, _, d) in zip(nbeta, curve, strict=True)
               if d.free_energy is not None and d.init_loss is not None]  # fmt: skip
        if own:
            at, energy, error = np.array(own).T
            right.errorbar(at, energy - energy[0], error, fmt="x", markersize=8, color=style["color"])
    exact_line(left, runs[0][2])
    for ax, ylabel in ((left, "llc"), (right, "free energy, less its first and the loss at w* (nats)")):
        ax.set(xscale="log", xlabel="nβ", ylabel=ylabel)
        log_ticks(ax)
    head(fig, f"{target_name(runs[0][0])} · llc and free energy against temperature", runs[0][0].target_id)
    legend(fig, left, ncols=3)
    return fig


def _style(index: int) -> dict[str, Any]:
    return {"color": color(index), "linestyle": STYLES[index // len(COLORS) % len(STYLES)]}


def _names(runs: Sequence[Run]) -> list[str]:
    """The sampler's label, and the checkpoint where runs differ in it."""
    several = len({_step(spec) for spec, _, _ in runs}) > 1
    samplers = _sampler_names(runs)
    return [f"step {_step(run[0])}, {name}" if several else name for run, name in zip(runs, samplers, strict=True)]


def _sampler_names(runs: Sequence[Run]) -> list[str]:
    return [sampler for _, sampler in labels([spec for spec, _, _ in runs])]


def _step(spec: RunSpec) -> int:
    """The training step whose parameters are sampled; that of w* is the last planned."""
    if spec.target.checkpoint is not None:
        return spec.target.checkpoint
    return spec.target.training.num_steps if hasattr(spec.target, "training") else 0


def _but_nbeta(spec: RunSpec) -> str:
    return canonical_json(spec.model_dump(mode="json", exclude={"posterior": {"nbeta"}}))


def _grouped(runs: Sequence[Run], keys: Sequence[str]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run, key in zip(runs, keys, strict=True):
        groups[key].append(run)
    return dict(groups)


def _estimates(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Estimates and their errors, 0 where there is none."""
    return np.array([d.llc for _, _, d in runs], np.float64), np.array([d.mcse or 0.0 for _, _, d in runs])
