"""Plots over all targets of a sweep."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lambda_hat.llc.diagnostics import Diagnosis
from lambda_hat.llc.run import RunSpec
from lambda_hat.studies.style import BAND, EXACT, MARKERS, Picture, color, head, legend

#: The relative error shown as a band.
BAND_ERROR = 0.05


def plot_llc_vs_true(runs: Sequence[tuple[RunSpec, Diagnosis]]) -> Figure | None:
    """Estimates against exact values, on linear axes, over all targets that have one; None for fewer than two such values.

    The legend has each sampler's median relative error and order preservation: the share of pairs of targets it puts in the
    right order. Open marks are verdicts other than ok; runs without an estimate are counted only.
    """
    by_kind: dict[str, list[Diagnosis]] = {}
    for spec, diagnosis in runs:
        if diagnosis.true_llc is not None:
            by_kind.setdefault(spec.sampler.kind, []).append(diagnosis)
    exact = [diagnosis.true_llc for diagnosis in itertools.chain(*by_kind.values())]
    if len(set(exact)) < 2:
        return None
    fig = Picture(figsize=(6.5, 5.6 + 0.19 * len(by_kind)), layout="constrained")
    ax = fig.subplots()
    top = 1.06 * max(float(value) for value in exact if value is not None)
    line = np.array([0.0, top])
    ax.plot(line, line, color=EXACT, linestyle="--", linewidth=1.2, label="exact")
    ax.fill_between(line, (1 - BAND_ERROR) * line, (1 + BAND_ERROR) * line, **BAND, color=EXACT, label=f"± {BAND_ERROR:.0%}")
    for index, (kind, of_kind) in enumerate(by_kind.items()):
        points = [(d.true_llc, d.llc, d.mcse or 0.0, d.verdict == "ok") for d in of_kind if d.llc is not None]
        if not points:
            ax.plot([], [], " ", label=f"{kind}: no estimate")
            continue
        x, y, error, ok = np.array(points, np.float64).T
        name = f"{kind}: median |error| {np.median(np.abs(y / x - 1)):.1%}, order {_order_preservation(x, y):.2f}"
        if len(points) < len(of_kind):
            name += f", {len(of_kind) - len(points)} without an estimate"
        style: dict[str, Any] = {
            "color": color(index),
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": "none",
            "markersize": 6,
        }
        ax.errorbar(x, y, error, capsize=2, markerfacecolor="none", label=name, **style)
        ax.plot(x[ok > 0], y[ok > 0], **style)
    # An estimate far off is at the edge: its place would squash all others.
    ax.set(xlim=(0, top), ylim=(0, 1.5 * top) if ax.dataLim.y1 > 1.5 * top else (min(0.0, ax.dataLim.y0), None))
    ax.set(xlabel="exact llc", ylabel="llc (filled: verdict ok)")
    head(fig, "llc against exact values", f"{len(set(exact))} exact values, {sum(map(len, by_kind.values()))} runs")
    legend(fig, ax, ncols=1)
    return fig


def _order_preservation(exact: np.ndarray, llc: np.ndarray) -> float:
    """The share of pairs with different exact values that the estimates order alike; 1 without such pairs."""
    lower = exact[:, None] < exact
    return float(np.mean((llc[:, None] < llc)[lower])) if lower.any() else 1.0
