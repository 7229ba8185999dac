"""The report of an entropy study: one HTML file that needs nothing else, no script either."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from lambda_hat.entropy.analysis import all_influences, exchange_fit, quartile_table, rates, signs
from lambda_hat.entropy.plots import CAPTIONS
from lambda_hat.entropy.plots.common import View, by_setting, label, views
from lambda_hat.entropy.plots.training import batches
from lambda_hat.entropy.study import EntropyStudy, Measured
from lambda_hat.specs.spec import dotted
from lambda_hat.specs.text import with_error
from lambda_hat.studies.page import VERSIONS, page
from lambda_hat.studies.plots import Drawn

#: Measurements, those with a table of their changes over eta, and the most influential sequences.
MAX_MEASUREMENTS, MAX_CHANGES, MAX_SEQUENCES = 200, 50, 25
#: Letters of a prompt or a completion.
MAX_LETTERS = 200

MEASUREMENTS = (
    "measured at", "accuracy", "H", "exact H", "dH/dη", "baseline", "sequences", "η*", "Cov(log p, A)",
    "signs", "left out", "cut off",
)  # fmt: skip
CHANGES = (
    "η", "ΔH", "baseline", "Σvᵢ alone", "residual", "first order", "second order", "exact", "ESS",
    "clipped",
)  # fmt: skip
LINES = ("measured at", "slope", "intercept", "R²", "RMSE", "largest residual", "at η")
SEQUENCES = (
    "measured at", "prompt", "completion", "answer", "reward", "advantage", "tokens", "surprisal", "max surprisal",
    "at token", "influence", "share",
)  # fmt: skip
QUARTILES = ("completions", "quartile of surprisal", "sequences", "mean influence", "share of all |influence|", "outliers")
POLICIES = ("policies", "seeds", "updates", "accuracy", "token entropy", "a", "b", "R²")


def entropy_report(study_id: str, name: str, study: EntropyStudy, plots: Drawn, made_at: str = "") -> str:
    """The report of a study's measurements.

    Args:
      plots: those drawn, and why others are not. made_at: when its last measurement was finished.
    """
    sequences = all_influences(study) if study.measured else None
    found = views(study)
    shortfall = sum(measured.summary["shortfall"] for measured in study.measured)
    asked = sum(measured.summary["groups_asked"] for measured in study.measured)
    drawn = sum(len(measured.update) for measured in study.measured)
    evaluated = sum(view.found["num_sequences"] for view in found)
    cut = sum(of["truncated"] for of in (*(measured.summary for measured in study.measured), *(view.found for view in found)))
    common, varied = _settings(study)
    return page(
        "entropy.html",
        study_id=study_id,
        name=name,
        made_at=made_at,
        versions=VERSIONS,
        counts={
            "measurements": len(study.measured),
            "policies": len(study.policies),
            "training sequences": drawn,
            "evaluation sequences": evaluated,
            "completions cut off": f"{cut} of {drawn + evaluated}" if cut else "none",
            "groups left out": f"{shortfall} of {asked}" if shortfall else f"none of {asked}",
            "seconds of measuring": float(sum(measured.summary["seconds"] for measured in study.measured)),
        },
        shortfall=shortfall,
        cut=cut,
        policies=(POLICIES, list(_policies(study))),
        measurements=(MEASUREMENTS, [_measurement(study, view) for view in found[:MAX_MEASUREMENTS]]),
        num_measurements=len(found),
        columns=CHANGES,
        changes=[(label(study, view), list(_changes(view))) for view in found[:MAX_CHANGES]],
        lines=(LINES, [row for view in found[:MAX_MEASUREMENTS] for row in _lines(study, view)]),
        sequences=(SEQUENCES, [] if sequences is None else list(_largest(study, sequences))),
        num_sequences=0 if sequences is None else len(sequences),
        quartiles=(QUARTILES, [] if sequences is None else list(_quartiles(sequences))),
        answer="" if sequences is None else _answer(sequences),
        plots={key: (png, CAPTIONS[key]) for key, png in plots.pngs.items()},
        not_drawn=list(plots.left_out.items()),
        common=common,
        varied=varied,
        cell=_cell,
    )


def _policies(study: EntropyStudy) -> Iterator[tuple[Any, ...]]:
    """A row of POLICIES for each setting: from the first to the last update, and the fit of R = -a exp(H) + b."""
    for policies in by_setting(study):
        entropy, accuracy = batches(policies)
        fit = exchange_fit(entropy, accuracy)
        over = []
        for curve in ("accuracy", "token_entropy"):
            first, last = (np.mean([training.history[curve][index] for training in policies.trainings]) for index in (0, -1))
            over.append(f"{first:.3g} → {last:.3g}")
        numbers = (None, None, None) if fit is None else (fit.a, fit.b, fit.r_squared)
        updates = max(len(training.history["accuracy"]) for training in policies.trainings)
        yield (policies.label or "all", len(policies.trainings), updates, *over, *numbers)


def _measurement(study: EntropyStudy, view: View) -> tuple[Any, ...]:
    """A row of MEASUREMENTS."""
    summary, found = view.measured.summary, view.found
    here = rates(_only(view))
    asked, shortfall = summary["groups_asked"], summary["shortfall"]
    return (
        label(study, view), summary["accuracy"], _error(found["entropy"], found["entropy_error"]), found["exact_entropy"],
        _error(here.full, here.full_error), _error(here.baseline, here.baseline_error),
        _error(here.grad, here.grad_error), found["eta_star"], summary["covariance"], signs(_only(view)),
        f"{shortfall} of {asked}" if shortfall else "none",
        f"{summary['truncated']} of {summary['num_update']}, {found['truncated']} of {found['num_sequences']}",
    )  # fmt: skip


def _only(view: View) -> Measured:
    """The measurement with this evaluation batch alone."""
    measured = view.measured
    return measured._replace(summary=measured.summary | {"evaluations": [view.found]}, matrices=[measured.matrices[view.batch]])


def _changes(view: View) -> Iterator[tuple[Any, ...]]:
    """Rows of CHANGES."""
    for row in view.changes.to_dict("records"):
        errors = (_error(row[part], row[f"{part}_error"]) for part in ("full", "baseline", "first_order"))
        full, baseline, first = errors
        yield (
            row["eta"], full, baseline, row["grad_sum"], row["residual"], first, row["second_order"],
            row["exact"], round(row["ess"]), f"{row['clip_fraction']:.1%}",
        )  # fmt: skip


def _lines(study: EntropyStudy, view: View) -> Iterator[tuple[Any, ...]]:
    """A row of LINES, where there is a line: of two etas or more."""
    line = view.found.get("linearity")
    if line and len(view.changes) > 1:
        etas = [view.measured.spec.etas[index] for index in line["worst"]]
        numbers = [float(line[name]) for name in ("slope", "intercept", "r_squared", "rmse", "max_residual")]
        yield (label(study, view), *numbers, ", ".join(f"{eta:g}" for eta in etas))


def _largest(study: EntropyStudy, sequences: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """Rows of SEQUENCES, by their share of their measurement's influences."""
    for row in sequences.sort_values("share", ascending=False, kind="stable").head(MAX_SEQUENCES).to_dict("records"):
        yield (
            label(study, study.measured[row["measurement"]]),
            *(_short(row[text]) for text in ("prompt", "completion", "answer")),
            float(row["reward"]), float(row["advantage"]), int(row["length"]), float(row["surprisal"]),
            float(row["max_surprisal"]), int(row["max_surprisal_position"]) + 1,
            _error(row["influence"], row["influence_error"]), f"{row['share']:.1%}",
        )  # fmt: skip


def _quartiles(sequences: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """Rows of QUARTILES."""
    for row in quartile_table(sequences).reset_index().to_dict("records"):
        quartile = {1: "1, likely tokens alone", 4: "4, an unlikely token"}.get(row["quartile"], str(row["quartile"]))
        yield (
            "correct" if row["correct"] else "incorrect", quartile, int(row["sequences"]),
            _error(row["mean"], row["error"]), f"{row['share']:.1%}", int(row["outliers"]),
        )  # fmt: skip


def _answer(sequences: pd.DataFrame) -> str:
    """Whether incorrect completions with unlikely tokens stand out, in numbers."""
    these = sequences[~sequences["correct"] & (sequences["quartile"] == 4)]
    of = len(these) / len(sequences)
    share = these["share"].sum() / sequences["measurement"].nunique()
    outliers = int(sequences["outlier"].sum())
    far = f"{int(these['outlier'].sum())} of the {outliers} outliers" if outliers else "no outlier, as there is none"
    return (
        f"Incorrect completions in the fourth quartile are {of:.0%} of all sequences, and have {share:.0%} of the influence "
        f"and {far}."
    )


def _settings(study: EntropyStudy) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Settings that all measurements share, and the values of the others."""
    fields = [dotted(measured.spec.model_dump(mode="json")) for measured in study.measured]
    names = dict.fromkeys(name for of in fields for name in of)
    values = {name: list(dict.fromkeys(str(of.get(name)) for of in fields)) for name in names}
    common = {name: _short(of[0]) for name, of in values.items() if len(of) == 1 and of[0] not in ("None", "", "[]")}
    return common, [(name, _short(", ".join(of))) for name, of in values.items() if len(of) > 1]


def _error(value: float, error: float) -> str:
    """A value and its error, if it is known, in one line."""
    return with_error(value, error if np.isfinite(error) else None).replace(" ", "\N{NO-BREAK SPACE}")


def _short(text: str) -> str:
    return text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 1] + "…"


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
