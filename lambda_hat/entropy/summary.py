"""An entropy study as people read it on a terminal: what it would measure, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lambda_hat.entropy.plan import EntropyPlan
from lambda_hat.entropy.spec import EntropySpec
from lambda_hat.entropy.study import differing, measurement_settings
from lambda_hat.specs.text import with_error
from lambda_hat.store.manifest import entropy_address, target_address
from lambda_hat.store.store import Store
from lambda_hat.studies.table import aligned, files_of, what_failed

#: Columns of numbers.
RIGHT = {
    "seed", "checkpoint", "prompts", "completions", "evaluation", "etas", "accuracy", "entropy", "dH/deta", "of baseline",
    "of sequences", "eta*", "flat groups", "cut off",
}  # fmt: skip


def preview(plan: EntropyPlan, store: Store) -> str:
    """What a study would measure, and what of it the store has."""
    policies = {spec.target.target_id for spec in plan.specs}
    trained = {manifest.id for manifest in store.manifests(map(target_address, policies))}
    measured = {manifest.id for manifest in store.manifests(entropy_address(spec.entropy_id) for spec in plan.specs)}
    cells = [{
        "policy": spec.target.target_id, "task": spec.target.task.kind, "seed": f"{spec.target.seed}",
        "checkpoint": f"{spec.target.checkpoint}", "prompts": f"{spec.update.count}",
        "completions": f"{spec.update.num_completions}",
        "evaluation": f"{spec.evaluation.num_batches} x {spec.evaluation.num_sequences}", "etas": f"{len(spec.etas)}",
        "status": "measured" if spec.entropy_id in measured else "to measure",
    } for spec in plan.specs]  # fmt: skip
    sampled = f", and the llc by {len(plan.runs)} runs" if plan.runs else ""
    return (
        f"{aligned(cells, RIGHT)}\n{len(plan.specs)} updates of {len(policies)} policies, of which {len(trained)} are trained; "
        f"{len(plan.specs) - len(measured)} to measure{sampled}"
    )


def label(spec: EntropySpec) -> str:
    """A name for one measurement."""
    return f"{spec.target.task.kind}, seed {spec.target.seed}, checkpoint {spec.target.checkpoint}, batch seed {spec.seed}"


def outcome(
    plan: EntropyPlan, fine: Sequence[EntropySpec], rows: Sequence[Mapping[str, Any]], errors: Sequence[str]
) -> dict[str, Any]:
    """The result of the flow, before it is published: what failed, and why.

    Args:
      fine: what is measured. rows: of the runs that sample the policies. errors: what went wrong with training and measuring.
    """
    failed = [row for row in rows if row["status"] == "failed"]
    return {
        "name": plan.name, "num_measurements": len(plan.specs), "num_failed": len(plan.specs) - len(fine),
        "runs_failed": len(failed), "run_ids": [row["run_id"] for row in rows if row["status"] != "failed"],
        "errors": list(dict.fromkeys([*errors, *(row["remedy"] for row in failed)])),
    }  # fmt: skip


def table(store: Store, specs: Sequence[EntropySpec]) -> list[dict[str, str]]:
    """A row for each measurement, of its first evaluation batch, with the settings in which they differ. cut off: completions
    without an end token, of the update and of the evaluation batch."""
    summaries = {manifest.id: manifest.summary for manifest in store.manifests(entropy_address(s.entropy_id) for s in specs)}
    varied = [name for name in differing(map(measurement_settings, specs)) if name != "seed"]
    rows = []
    for spec in sorted(specs, key=lambda spec: (spec.target.target_id, spec.target.checkpoint)):
        if spec.entropy_id not in summaries:
            continue
        found = summaries[spec.entropy_id]
        first = found["evaluations"][0]
        own = measurement_settings(spec)
        rows.append({
            "policy": spec.target.target_id, "checkpoint": f"{spec.target.checkpoint}", "measurement": spec.entropy_id,
            **{name: str(own.get(name)) for name in varied},
            "accuracy": f"{found['accuracy']:.3f}", "entropy": with_error(first["entropy"], first["entropy_error"]),
            "dH/deta": with_error(first["first"], first["first_error"]), "of baseline": f"{first['baseline_first']:.4g}",
            "of sequences": f"{first['grad_first']:.4g}", "eta*": f"{first['eta_star']:.2g}" if first["eta_star"] else "-",
            "flat groups": f"{found['shortfall']} of {found['groups_asked']}",
            "cut off": f"{found['truncated']} of {found['num_update']}, {first['truncated']} of {first['num_sequences']}",
        })  # fmt: skip
    return rows


def failures(result: Mapping[str, Any]) -> str:
    """What failed, in a sentence."""
    return what_failed(
        {
            f"of {result['num_measurements']} measurements": result["num_failed"],
            "runs that sample the policies": result["runs_failed"],
        }
    )


def text(result: Mapping[str, Any]) -> str:
    """The result of the flow for a terminal: the measurements, what failed and why, and where the files are."""
    lines = [aligned(result["measurements"], RIGHT)] if result.get("measurements") else []
    lines += [failures(result)] if result["num_failed"] or result["runs_failed"] else []
    lines += [f"  {error}" for error in result["errors"]]
    if files := result.get("files"):
        lines += [f"{result['study_id']}: {result['num_measurements'] - result['num_failed']} updates measured"]
        lines += files_of(files)
        lines += [f"  {name} is not drawn: {why}" for name, why in result["not_drawn"].items()]
    return "\n".join(lines)
