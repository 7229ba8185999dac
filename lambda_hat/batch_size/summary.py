"""A study as people read it on a terminal: what it would train, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lambda_hat.batch_size.artifacts import batches, trained
from lambda_hat.batch_size.plan import StudyPlan
from lambda_hat.batch_size.study import Study, swept
from lambda_hat.manifest import Manifest, study_address
from lambda_hat.report import aligned
from lambda_hat.store import Store

#: Trials that are shown, the best first.
NUM_BEST = 10


def preview(plan: StudyPlan, store: Store) -> str:
    """What a study would train: its programs, how many of their trials are in the store, and the work of the others."""
    done = trained(store)
    cells, samples = [], 0
    for batch in batches(plan.trials):
        spec, missing = batch[0], [trial for trial in batch if trial.target_id not in done]
        samples += sum(trial.total_steps * trial.batch_size for trial in missing)
        cells.append({
            "task": spec.task.kind, "width": f"{spec.width}", "depth": f"{spec.depth}", "batch size": f"{spec.batch_size}",
            "optimizer": f"{spec.optimizer} {spec.parameterization}", "steps": f"{spec.total_steps}",
            "trials": f"{len(batch)}", "to train": f"{len(missing)}",
        })  # fmt: skip
    sampled = ", and the llc of each" if plan.sampling else ""
    return f"{aligned(cells, RIGHT)}\n{len(plan.trials)} trials{sampled}; {samples:,} samples to train on"


def summary(manifest: Manifest, study: Study, store: Store) -> dict[str, Any]:
    """What came of a study, in JSON's own types."""
    table = study.table
    shown = [*swept(table), "final_loss", "test_loss", "test_accuracy", "llc", "sharpness", "gradient_noise_scale", "trial_id"]
    best = table.sort_values("final_loss").head(NUM_BEST)[
        [name for name in shown if name in table and table[name].notna().any()]
    ]
    return {
        "study_id": manifest.id, "name": manifest.spec["name"], **manifest.summary,
        "best": [{name: _text(value) for name, value in row.items()} for row in best.to_dict("records")],
        "files": {file.name: store.url(study_address(manifest.id), file.name) for file in manifest.files},
    }  # fmt: skip


def failures(result: Mapping[str, Any]) -> str:
    """What failed, in a sentence."""
    return f"{result['num_failed']} trials and {result['runs_failed']} runs failed; the same command tries them again."


def text(result: Mapping[str, Any]) -> str:
    """The summary for a terminal."""
    lines = [failures(result)] if result["num_failed"] or result["runs_failed"] else []
    if "study_id" in result:
        places = [f"  {url}" for name, url in result["files"].items() if name.endswith(".png")]
        lines = [
            aligned(result["best"], RIGHT), *lines,
            f"{result['study_id']}: {result['num_trials']} trials, {result['num_diverged']} diverged; the best of them above",
            f"report: {result['files']['report.html']}", f"table: {result['files']['results.csv']}", "plots:", *places,
        ]  # fmt: skip
    return "\n".join(lines)


#: Columns of numbers.
RIGHT = {
    "width", "depth", "batch size", "batch_size", "steps", "trials", "to train", "eta", "richness", "seed", "final_loss",
    "test_loss", "test_accuracy", "llc", "sharpness", "gradient_noise_scale",
}  # fmt: skip


def _text(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
