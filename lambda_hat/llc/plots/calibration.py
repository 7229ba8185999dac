"""The calibration map: what a sampler gives as its step size and the posterior vary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambda_hat.llc.diagnostics import Diagnosis
from lambda_hat.llc.plots.common import Run, target_name
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.spec import canonical_json
from lambda_hat.studies.style import EXACT, MARKERS, Picture, head

#: The axes of a map besides the step size, as fields of the posterior.
AGAINST = ("localization", "nbeta")
#: Cells of a side in which there is room for numbers.
MAX_NUMBERS = 10
#: The brightness above which a colour takes black text.
BRIGHT = 0.5

Cells = dict[tuple[float, float], list[Diagnosis]]


def plot_calibration(runs: Sequence[Run]) -> Figure | None:
    """Maps of the llc and the acceptance rate (or the ESS, of a sampler that accepts all) over step size and localisation or
    nbeta: a row for each sampler of which a whole grid of these was run. None where there is no grid.

    A mark in a cell is a verdict other than ok. Runs that differ in the seed alone are averaged.
    """
    maps = [(field, *of) for field in AGAINST for of in _grids(runs, field)]
    if not maps:
        return None
    marks = _marks([cells for _, _, cells in maps])
    fig = Picture(figsize=(11, 0.8 + 3.6 * len(maps)), layout="constrained")
    head(fig, f"{target_name(runs[0][0])} · calibration", runs[0][0].target_id)
    rows = fig.subplots(len(maps), 2, squeeze=False)
    for (field, spec, cells), (left, right) in zip(maps, rows, strict=True):
        name = f"{spec.sampler.kind}: llc"
        exact = next(iter(cells.values()))[0].true_llc_text
        _map(fig, left, field, cells, "llc", name if exact is None else f"{name}, exact {exact}")
        _mark(left, cells, marks)
        accepts = any((found.acceptance_rate or 1.0) < 1.0 for of in cells.values() for found in of)
        if accepts:
            _map(fig, right, field, cells, "acceptance_rate", "acceptance rate")
        else:
            _map(fig, right, field, cells, "ess_bulk", "effective draws")
    for verdict, marker in marks.items():
        rows[0][0].scatter([], [], marker=marker, color="white", edgecolors="black", label=verdict)
    if marks:
        fig.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    return fig


def _grids(runs: Sequence[Run], field: str) -> list[tuple[RunSpec, Cells]]:
    """The runs that differ in step size, `field` and seed alone, as cells of (step size, field); of two by two and more."""
    groups: dict[str, tuple[RunSpec, Cells]] = {}
    for spec, _, diagnosis in runs:
        step_size = getattr(spec.sampler, "step_size", None)
        if not isinstance(step_size, float):
            continue
        rest = spec.model_dump(mode="json", exclude={"sampler": {"step_size", "seed"}, "posterior": {field}})
        value = spec.nbeta if field == "nbeta" else spec.posterior.localization
        cells = groups.setdefault(canonical_json(rest), (spec, {}))[1]
        cells.setdefault((step_size, value), []).append(diagnosis)
    return [of for of in groups.values() if all(len({cell[axis] for cell in of[1]}) > 1 for axis in (0, 1))]


def _axes(cells: Cells) -> tuple[list[float], list[float]]:
    return sorted({x for x, _ in cells}), sorted({y for _, y in cells})


def _marks(maps: Sequence[Cells]) -> dict[str, str]:
    """A marker for each verdict other than ok."""
    verdicts = {found.verdict for cells in maps for of in cells.values() for found in of} - {"ok"}
    return {verdict: MARKERS[index % len(MARKERS)] for index, verdict in enumerate(sorted(verdicts))}


def _map(fig: Figure, ax: Axes, field: str, cells: Cells, name: str, title: str) -> None:
    xs, ys = _axes(cells)
    values = np.full((len(ys), len(xs)), np.nan)
    trusted = []
    for (x, y), of in cells.items():
        known = [value for found in of if (value := getattr(found, name)) is not None]
        values[ys.index(y), xs.index(x)] = np.mean(known) if known else np.nan
        trusted += known if all(found.verdict == "ok" for found in of) else []
    # One run that left w* would take all the colours.
    top = max(trusted) if name == "llc" and trusted else None
    image = ax.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmax=top)
    fig.colorbar(image, ax=ax, extend="max" if top is not None and np.nanmax(values) > top else "neither")
    ax.set_facecolor(EXACT)  # where there is no value
    if max(values.shape) <= MAX_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "black" if np.mean(image.to_rgba(value)[:3]) > BRIGHT else "white"
                ax.text(
                    column,
                    row,
                    f"{value:.3g}" if value < 1000 else f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=ink,
                )
    ax.set_xticks(range(len(xs)), [f"{x:.3g}" for x in xs], fontsize=8)
    ax.set_yticks(range(len(ys)), [f"{y:.4g}" for y in ys], fontsize=8)
    ax.set_title(title, fontsize=9)
    ax.set(xlabel="step_size", ylabel=field)


def _mark(ax: Axes, cells: Cells, marks: dict[str, str]) -> None:
    xs, ys = _axes(cells)
    for (x, y), of in cells.items():
        for found in of:
            if found.verdict in marks:
                place = (xs.index(x) + 0.33, ys.index(y) + 0.28)
                ax.scatter(*place, marker=marks[found.verdict], color="white", edgecolors="black", s=30)
