"""What all plots share: colours, titles, limits, and how a figure becomes a file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from PIL import Image

from lambda_hat.diagnostics import Diagnosis
from lambda_hat.llc import MIN_DRAWS
from lambda_hat.run import RunSpec
from lambda_hat.text import with_error
from lambda_hat.trace import Trace

Run = tuple[RunSpec, Trace, Diagnosis]

#: Okabe & Ito's colours for all kinds of sight, less yellow, too pale for a line, and black, the pooled estimate's.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = ("-", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
POOLED, EXACT = "black", "#666666"

#: Dots per inch of a file.
DPI = 110
#: Points of a line, some two pixels apart; more are not seen.
MAX_POINTS = 400
#: Points at which errors of a running estimate are computed.
MAX_ERRORS = 40
#: Chains that are named in a legend.
MAX_NAMED = 8
#: The share of a run after which a running mean has calmed down enough for its range to be shown.
SETTLED = 0.1

#: A shaded range.
BAND: dict[str, Any] = {"alpha": 0.2, "linewidth": 0}
#: The end of a running estimate, marked.
LAST: dict[str, Any] = {"marker": "o", "markersize": 4, "markevery": [-1]}

LLC_LABEL = "llc: nβ (L(w) − L(w*))"


class Picture(Figure):
    """A figure that a notebook shows: of those that pyplot does not make it shows the names only."""

    def _repr_png_(self) -> bytes:
        return save_png(self)


def save_png(fig: Figure) -> bytes:
    """The figure as a PNG file of 256 colours, which takes a third of the room and looks the same."""
    fig.set_dpi(DPI)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    # An octree keeps rare colours; a median cut, the default, gives a short line its neighbour's.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture = picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.save(file, format="png")
    return file.getvalue()


def run_figure(spec: RunSpec, diagnosis: Diagnosis, width: float = 7.5, height: float = 4.2) -> Figure:
    """A figure under the run's name, verdict and id."""
    fig = Picture(figsize=(width, height), layout="constrained")
    head(fig, f"{target_name(spec)} · {spec.sampler.kind} · {diagnosis.verdict}", spec.run_id)
    return fig


def target_name(spec: RunSpec) -> str:
    step = spec.target.checkpoint
    return spec.target.family + ("" if step is None else f" at step {step}")


def head(fig: Figure, title: str, identity: str) -> None:
    """What is shown on the left, and small on the right what it is of."""
    fig.suptitle(title, x=0.01, ha="left", fontsize=11)
    fig.text(0.99, 0.99, identity, ha="right", va="top", fontsize=7, color=EXACT)


def color(index: int | np.integer) -> str:
    return COLORS[index % len(COLORS)]


def chain_label(chain: int | np.integer, count: int) -> str | None:
    """Chains' names in a legend; none for more than it can hold."""
    return f"chain {chain}" if count <= MAX_NAMED else None


def legend(fig: Figure, ax: Axes, ncols: int = 4) -> None:
    handles, names = ax.get_legend_handles_labels()
    if handles:
        fig.legend(handles, names, loc="outside lower left", ncols=ncols, fontsize=8, frameon=False)


def exact_line(ax: Axes, diagnosis: Diagnosis) -> None:
    if diagnosis.true_llc is not None:
        ax.axhline(diagnosis.true_llc, color=EXACT, linestyle="--", linewidth=1.2, label=f"exact {diagnosis.true_llc_text}")


def log_ticks(ax: Axes, unit: str = "") -> None:
    """Some three to nine labelled ticks on a logarithmic x axis, however many decades it spans."""
    decades = np.diff(np.log10(ax.get_xlim()))[0]
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5) if decades > 0.4 else tuple(range(1, 10))))
    ax.xaxis.set_major_formatter(EngFormatter(unit, sep=" " if unit else ""))
    ax.xaxis.set_minor_formatter(NullFormatter())


def say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.6, text, transform=ax.transAxes, ha="center")


def llc_text(diagnosis: Diagnosis) -> str:
    return "no estimate" if diagnosis.llc is None else with_error(diagnosis.llc, diagnosis.mcse)


def counts(num_draws: int) -> np.ndarray:
    """Numbers of draws at which a running estimate is shown, evenly spaced in log."""
    return np.unique(np.geomspace(min(MIN_DRAWS, num_draws), num_draws, MAX_ERRORS).astype(int))


def limits(values: np.ndarray, exact: float | None = None, tails: float = 0.0) -> tuple[float, float]:
    """Limits that show all but the tails of `values`, and the exact llc."""
    low, high = (float(np.quantile(values, q)) for q in (tails, 1 - tails))
    if exact is not None:
        low, high = min(low, exact), max(high, exact)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def comparable_limits(lines: Sequence[np.ndarray], exact: float | None) -> tuple[float, float]:
    """Limits for several runs' estimates; of one far beyond the exact value, or else the others, only the legend tells."""
    centre = float(np.median([np.median(line) for line in lines])) if exact is None else exact
    reach = 1.5 * abs(centre) or 1.0
    low, high = limits(np.concatenate(lines), exact)
    return max(low, centre - reach), min(high, centre + reach)
