"""What plots of runs share: their heads, the exact value, the limits of running estimates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lambda_hat.llc.diagnostics import Diagnosis
from lambda_hat.llc.estimates import MIN_DRAWS
from lambda_hat.llc.run import RunSpec
from lambda_hat.llc.trace import Trace
from lambda_hat.specs.text import with_error
from lambda_hat.studies.style import EXACT, Picture, head, limits

Run = tuple[RunSpec, Trace, Diagnosis]


#: Points at which errors of a running estimate are computed.
MAX_ERRORS = 40


#: Chains that are named in a legend.
MAX_NAMED = 8


#: The share of a run after which a running mean has calmed down enough for its range to be shown.
SETTLED = 0.1


LLC_LABEL = "llc: nβ (L(w) − L(w*))"


def run_figure(spec: RunSpec, diagnosis: Diagnosis, width: float = 7.5, height: float = 4.2) -> Figure:
    """A figure under the run's name, verdict and id."""
    fig = Picture(figsize=(width, height), layout="constrained")
    head(fig, f"{target_name(spec)} · {spec.sampler.kind} · {diagnosis.verdict}", spec.run_id)
    return fig


def target_name(spec: RunSpec) -> str:
    step = spec.target.checkpoint
    return spec.target.family + ("" if step is None else f" at step {step}")


def chain_label(chain: int | np.integer, count: int) -> str | None:
    """Chains' names in a legend; none for more than it can hold."""
    return f"chain {chain}" if count <= MAX_NAMED else None


def exact_line(ax: Axes, diagnosis: Diagnosis) -> None:
    if diagnosis.true_llc is not None:
        ax.axhline(diagnosis.true_llc, color=EXACT, linestyle="--", linewidth=1.2, label=f"exact {diagnosis.true_llc_text}")


def llc_text(diagnosis: Diagnosis) -> str:
    return "no estimate" if diagnosis.llc is None else with_error(diagnosis.llc, diagnosis.mcse)


def counts(num_draws: int) -> np.ndarray:
    """Numbers of draws at which a running estimate is shown, evenly spaced in log."""
    return np.unique(np.geomspace(min(MIN_DRAWS, num_draws), num_draws, MAX_ERRORS).astype(int))


def comparable_limits(lines: Sequence[np.ndarray], exact: float | None) -> tuple[float, float]:
    """Limits for several runs' estimates; of one far beyond the exact value, or else the others, only the legend tells."""
    centre = float(np.median([np.median(line) for line in lines])) if exact is None else exact
    reach = 1.5 * abs(centre) or 1.0
    low, high = limits(np.concatenate(lines), exact)
    return max(low, centre - reach), min(high, centre + reach)
