"""A sweep as one HTML file that needs nothing else: no network, no other file, no script to be read or printed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lambda_hat.llc.diagnostics import Diagnosis, Finding
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.spec import dotted
from lambda_hat.specs.text import verdict_text, with_error
from lambda_hat.store.manifest import DIAGNOSIS_VERSION
from lambda_hat.studies.page import VERSIONS, page

#: Verdicts after which the number is no estimate; the others are warnings.
WRONG = ("diverged", "nan chains", "temperature jumped", "negative llc", "llc above", "loss below w*", "poor approximation")


#: Bytes of plots of single runs that one file is to hold; the other runs' are in the store alone.
MAX_RUN_PLOT_BYTES = 12_000_000

#: Of a target, what its card begins with, where it has it; its spec follows.
CARD = ("num_params", "num_data", "init_loss", "true_llc", "train_accuracy", "test_accuracy")

#: Columns of the results: heading, how to explain it, and a field of the diagnosis with the form of its number.
COLUMNS: tuple[tuple[str, str, str, str], ...] = (
    ("exact", "where theory gives it", "true_llc", "{:.6g}"),
    ("error", "relative to the exact llc", "relative_error", "{:+.1%}"),
    ("ESS", "effective draws", "ess_bulk", "{:,.0f}"),
    ("R-hat", "1 where chains agree", "rhat", "{:.3f}"),
    ("accept", "Metropolis acceptance rate", "acceptance_rate", "{:.2f}"),
    ("FGE", "work in full-data gradient equivalents, all chains, burn-in included", "fge", "{:,.0f}"),
    ("seconds", "of sampling", "seconds", "{:.1f}"),
)


@dataclass(frozen=True)
class ReportRun:
    """A finished run: its (target, sampler) label, and its plots (name -> PNG), none where there is no room for them."""

    label: tuple[str, str]
    spec: RunSpec
    diagnosis: Diagnosis
    plots: Mapping[str, bytes]


@dataclass(frozen=True)
class ReportTarget:
    """A target of the sweep: the metrics in its summary, and its plots (name -> PNG)."""

    metrics: Mapping[str, Any]
    plots: Mapping[str, bytes]


def sweep_report(
    sweep_id: str, runs: Sequence[ReportRun], targets: Mapping[str, ReportTarget], plots: Mapping[str, bytes], made_at: str = ""
) -> str:
    """The report of a sweep's finished runs.

    Args:
      targets: by target_id. plots: over all targets. made_at: when its last run was diagnosed.
    """
    of_target: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        of_target[run.spec.target_id].append(_run(run))
    return page(
        "sweep.html",
        sweep_id=sweep_id,
        made_at=made_at,
        columns=COLUMNS,
        verdicts=_verdicts(runs),
        findings=_findings(runs),
        plots=plots,
        targets=[
            {"id": target_id, "name": of_runs[0]["target"], "card": _card(targets[target_id], of_runs[0]["spec"]),
             "plots": targets[target_id].plots, "runs": of_runs}
            for target_id, of_runs in of_target.items()
        ],
        runs=[run for of_runs in of_target.values() for run in of_runs],
        versions=f"{VERSIONS}, diagnosis {DIAGNOSIS_VERSION}",
    )  # fmt: skip


def severity(verdict: str) -> str:
    """ "good", "bad" (the number is no estimate) or "doubtful"."""
    return "good" if verdict == "ok" else "bad" if verdict.startswith(WRONG) else "doubtful"


def _run(run: ReportRun) -> dict[str, Any]:
    found = run.diagnosis
    cells = []
    for _, _, field, form in COLUMNS:
        value = getattr(found, field)
        text = "–" if value is None else form.format(value)
        cells.append({"text": (found.true_llc_text or text) if field == "true_llc" else text, "value": _sortable(value)})
    beyond = {name: with_error(getattr(found, name), getattr(found, f"{name}_mcse"))
              for name in ("full_llc", "wbic", "free_energy", "singular_fluctuation", "nbeta_sensitivity")
              if getattr(found, name) is not None}  # fmt: skip
    return {
        "id": run.spec.run_id, "target": run.label[0], "sampler": run.label[1], "plots": run.plots,
        "llc": {"text": with_error(found.llc, found.mcse), "value": _sortable(found.llc)},
        "cells": cells, "verdict": verdict_text(found.verdict, found.prior_share), "severity": severity(found.verdict),
        "findings": found.findings, "notes": found.notes,
        "chains": found.chains, "datasets": found.llc_by_dataset, "beyond": beyond,
        "spec": run.spec, "config": dotted(run.spec.model_dump(mode="json", exclude={"target"})),
    }  # fmt: skip


def _card(target: ReportTarget, spec: RunSpec) -> dict[str, Any]:
    return {name: target.metrics[name] for name in CARD if target.metrics.get(name) is not None} | dotted(
        spec.target.model_dump(mode="json", exclude={"checkpoint"})
    )


def _verdicts(runs: Sequence[ReportRun]) -> dict[str, tuple[int, str]]:
    """How many runs have each verdict, the most frequent first, and its severity."""
    counts: dict[str, int] = defaultdict(int)
    for run in runs:
        counts[run.diagnosis.verdict] += 1
    return {name: (counts[name], severity(name)) for name in sorted(counts, key=lambda name: -counts[name])}


def _findings(runs: Sequence[ReportRun]) -> dict[Finding, list[ReportRun]]:
    """The runs of each finding."""
    found: dict[Finding, list[ReportRun]] = defaultdict(list)
    for run in runs:
        for finding in run.diagnosis.findings:
            found[finding].append(run)
    return dict(found)


def _sortable(value: float | None) -> str:
    """A number in a form that sorts; empty, which comes last, for none."""
    return "" if value is None else repr(float(value))
