"""Results as people read them: one table over runs, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lambda_hat.llc.artifacts import sweep_id
from lambda_hat.llc.run import RunSpec, labels
from lambda_hat.specs.text import verdict_text, with_error
from lambda_hat.store.manifest import run_address, sweep_address, target_address
from lambda_hat.store.store import Store
from lambda_hat.studies.table import aligned


def row(
    label: tuple[str, str], spec: RunSpec, status: str, result: Mapping[str, Any] | None, reason: str = ""
) -> dict[str, Any]:
    """One run's result for machines: the diagnosis where there is one, and why not where there is none.

    Args:
      status: "computed", "cached" or "failed". result: a diagnosis as a dict. reason: of a failure, one line.
    """
    head = {"target": label[0], "sampler": label[1], "status": status, "target_id": spec.target_id, "run_id": spec.run_id}
    return head | (dict(result) if result is not None else {"verdict": "failed", "remedy": reason})


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each row as the text of its cells, for people."""
    return [
        {
            "target": row["target"],
            "sampler": row["sampler"],
            "llc": with_error(row.get("llc"), row.get("mcse")),
            "exact": _number(row.get("true_llc")),
            "ESS": _number(row.get("ess_bulk"), "{:.0f}"),
            "R-hat": _number(row.get("rhat"), "{:.3f}"),
            "FGE": _number(row.get("fge"), "{:,.0f}"),
            "seconds": _number(row.get("seconds"), "{:.1f}"),
            "status": row["status"],
            "verdict": verdict_text(row["verdict"], row.get("prior_share")),
        }
        for row in rows
    ]


def _number(value: float | None, form: str = "{:.6g}") -> str:
    return "-" if value is None else form.format(value)


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in aligned plain text, with each verdict but "ok", and what else should be known, explained below it."""
    remedies = Counter((row["verdict"], row.get("remedy") or "") for row in rows if row["verdict"] != "ok")
    lines = [f"{verdict} ({count}): {remedy}" for (verdict, remedy), count in remedies.items()]
    notes = Counter(note for row in rows for note in row.get("notes", ()))
    return "\n".join([aligned(table(rows)), *lines, *(f"note ({count}): {note}" for note, count in notes.items())])


def plan_table(specs: Sequence[RunSpec], store: Store) -> str:
    """What a sweep would do: its runs, which are in the store, and the work of the others."""
    cells, work = [], 0.0
    for (target, sampler), spec in zip(labels(specs), specs, strict=True):
        address = run_address(spec.target_id, spec.run_id)
        status = "exists" if store.exists(address) else "to compute"
        if status != "exists":
            work += spec.fge
            if store.load_checkpoint(address) is not None:
                status = "to resume"
        cells.append({"target": target, "sampler": sampler, "run": spec.run_id, "FGE": f"{spec.fge:,.0f}", "status": status})
    targets = {spec.target_id: spec for spec in specs}
    built = sum(store.exists(target_address(target_id)) for target_id in targets)
    total = (
        f"{len(specs)} runs of {len(targets)} targets, {built} of them built; "
        f"{work:,.0f} full-data gradient equivalents (FGE) to compute"
    )
    doubts = dict.fromkeys(spec.posterior.doubt(spec.target.num_data) for spec in specs)
    return "\n".join([aligned(cells), total, *(f"note: {doubt}" for doubt in doubts if doubt)])


def plot_places(specs: Sequence[RunSpec], store: Store) -> str:
    """Where the plots of a finished sweep are."""
    address = sweep_address(sweep_id(specs))
    manifest = store.manifest(address) if specs else None
    if manifest is None:
        return "no run finished, so there are no plots"
    plots = [store.url(address, file.name) for file in manifest.files if file.name.endswith(".png")]
    pages = [store.url(address, file.name) for file in manifest.files if file.name.endswith(".html")]
    return "\n".join([
        *(f"report: {page}" for page in pages),
        "plots:", *(f"  {plot}" for plot in plots), f"  of one run: lambda-hat show {specs[0].run_id}",
    ])  # fmt: skip
