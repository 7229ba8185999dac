"""The report of a study: one HTML file that needs nothing else, no script either."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lambda_hat.batch_size.critical import EXCESS
from lambda_hat.batch_size.fits import LAZY, RICH, Slope, richness_slopes, width_transfer
from lambda_hat.batch_size.plots import CAPTIONS
from lambda_hat.batch_size.study import Group, Study, comparable, distinct, failures, groups, losses, settings, swept
from lambda_hat.batch_size.trades import trades
from lambda_hat.specs.text import number
from lambda_hat.studies.page import VERSIONS, page
from lambda_hat.studies.plots import Drawn
from lambda_hat.targets.trials.engine import ALIVE

#: Rows of the tables: the best settings, fits, and single trials; the others are in the study's own table.
MAX_BEST, MAX_FITS, MAX_TRIALS = 10, 60, 500
#: The setting of a fit to all trials.
ALL = "all trials"
#: What a trial ended with, in the order of the tables.
RESULTS = (
    "final_loss", "test_loss", "train_accuracy", "test_accuracy", "llc", "sharpness", "hessian_trace", "gradient_noise_scale",
)  # fmt: skip


class Fit(NamedTuple):
    """A number fitted to the trials of one setting, with its 95 % interval, what is expected, and what it is of. Where it would
    lie beyond what was tried there is the interval alone."""

    quantity: str
    setting: str
    value: float | None
    interval: tuple[float, float] | None
    expected: str
    note: str


def study_report(
    study_id: str, name: str, study: Study, plots: Drawn, made_at: str = "", chosen: Sequence[str] = (), num_trials: int = 0
) -> str:
    """The report of a study's trials, or of a selection of them.

    Args:
      made_at: when its last trial was trained. chosen: the conditions of the selection. num_trials: of the whole study.
    """
    table = study.table
    varied = swept(table)
    values = {key: distinct(table[key]) for key in settings(table)}
    constant = {key: of[0] for key, of in values.items() if len(of) == 1}
    several = [*varied, *(key for key, of in values.items() if len(of) > 1 and key not in varied)]
    columns = [*varied, *_known(table)]
    order = table.iloc[losses(table).to_numpy().argsort(kind="stable")[:MAX_TRIALS]]
    fits, failed = list(_fits(study)), failures(table)
    return page(
        "study.html",
        study_id=study_id,
        name=name,
        made_at=made_at,
        versions=VERSIONS,
        counts={"trials": len(table), "failed": sum(failed.values()), **failed, "seconds of training": table["seconds"].sum()},
        off=f"{1 - ALIVE:.0%}",
        constant={key: value for key, value in constant.items() if value not in (None, "", "()")},
        axes=[(key, len(values[key]), _listed(values[key])) for key in several],
        best=_best(table, varied),
        target_loss=study.target_loss,
        fits=fits[:MAX_FITS],
        num_fits=len(fits),
        plots={key: (png, CAPTIONS[key]) for key, png in plots.pngs.items()},
        not_drawn=list(plots.left_out.items()),
        columns=["trial_id", *columns, "failure", "diverged_at_step"],
        trials=order[["trial_id", *columns, "failure", "diverged_at_step"]].to_numpy(object).tolist(),
        num_trials=len(table),
        chosen=chosen,
        of_trials=num_trials,
        cell=_cell,
    )


def _best(table: pd.DataFrame, varied: list[str]) -> tuple[list[str], list[list[Any]]]:
    """Heading and rows of the settings of the lowest final loss; medians over the seeds, failed trials being infinite."""
    names = [name for name in varied if name != "seed"]
    results = _known(table)
    ranked = table.assign(final_loss=losses(table).fillna(np.inf))
    by = ranked.groupby([comparable(ranked[name]) for name in names] or np.zeros(len(ranked)), dropna=False)
    medians = by[results].median().assign(lowest=by["final_loss"].min(), highest=by["final_loss"].max(), seeds=by.size())
    medians = medians[np.isfinite(medians["final_loss"])].sort_values("final_loss", kind="stable").head(MAX_BEST)
    columns = [*results[:1], *(["lowest", "highest", "seeds"] if by.size().max() > 1 else []), *results[1:]]
    keys = medians.index.to_frame().to_numpy(object).tolist() if names else [[]] * len(medians)
    return [*names, *columns], [[*key, *row] for key, row in zip(keys, medians[columns].to_numpy(object).tolist(), strict=True)]


def _known(table: pd.DataFrame) -> list[str]:
    """The results that some trial has; the final loss in any case."""
    return [name for name in RESULTS if name == "final_loss" or (name in table and table[name].notna().any())]


def _fits(study: Study) -> Iterator[Fit]:
    """Exponents of the best learning rate over richness and width, and critical batch sizes."""
    for group in groups(study.table, "richness", "eta"):
        if set(group.table["rate_rule"]) == {"raw"}:
            found = richness_slopes(group.table)
            sides = ((f"lazy, γ ≤ {LAZY}", found.lazy), (f"rich, γ ≥ {RICH:g}", found.rich))
            for (side, slope), expected in zip(sides, found.theory, strict=True):
                yield from _slope(f"exponent of the best η over γ, {side}", group, slope, f"{expected:.3g}")
    for group in groups(study.table, "width", "eta"):
        # Meant by muP with the learning rates of this package; see TrialSpec.
        transfers = set(group.table["parameterization"]) == {"mup"} and "original" not in set(group.table["rate_rule"])
        yield from _slope("exponent of the best η over N", group, width_transfer(group.table).slope, "0" if transfers else "–")
    for trade in trades(study):
        fit = trade.fit
        if fit is None:
            continue
        noise = "–" if trade.noise_scale is None else f"gradient noise scale {trade.noise_scale:.3g}"
        setting = trade.label or ALL
        note = f"to a loss of {study.target_loss:.3g}"
        value, beyond = (fit.batch_size, "") if fit.in_range else (None, "; beyond the batch sizes tried")
        yield Fit("critical batch size", setting, value, fit.batch_size_interval, noise, note + beyond)
        yield Fit("fewest steps", setting, fit.min_steps, fit.min_steps_interval, "–", f"{note}, B → ∞")
        yield Fit("fewest samples", setting, fit.min_samples, fit.min_samples_interval, "–", f"{note}, B → 0")
        if fit.linear_limit is not None:
            excess = f"{note}, {EXCESS:.0%} more samples than at the smallest B"
            yield Fit("end of linear scaling", setting, fit.linear_limit, None, "–", excess)


def _slope(quantity: str, group: Group, slope: Slope | None, expected: str) -> Iterator[Fit]:
    if slope is not None:
        interval = None if math.isnan(slope.low) else (slope.low, slope.high)
        left_out = f", without {_listed(slope.left_out)}" if slope.left_out else ""
        yield Fit(quantity, group.label or ALL, slope.slope, interval, expected, f"of {slope.num_x} values{left_out}")


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(number, values))


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return "[{}, {}]".format(*map(_cell, value))
    if value is None or value != value:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
