"""A study as people read it on a terminal: what it would train, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lambda_hat.batch_size.artifacts import batches, trained
from lambda_hat.batch_size.ends import find_ends
from lambda_hat.batch_size.plan import StudyPlan
from lambda_hat.batch_size.study import Study, failed_text, failures, losses, swept
from lambda_hat.store.store import Store
from lambda_hat.studies.table import aligned, files_of, what_failed
from lambda_hat.targets.trials.spec import TrialSpec

#: Trials that are shown, the best first.
NUM_BEST = 10


def preview(plan: StudyPlan, store: Store) -> str:
    """What a study would train: its programs, how many of their trials are in the store, and the work of the others."""
    done = trained(store)
    ends = find_ends(store, [trial for trial in plan.trials if trial.target_id not in done])
    cells, samples = [], 0
    for batch in batches(plan.trials):
        spec, missing = batch[0], [trial for trial in batch if trial.target_id not in done]
        known = sum(ends[trial.target_id].step * trial.batch_size for trial in missing if trial.target_id in ends)
        samples += sum(trial.total_steps * trial.batch_size for trial in missing) - known
        cells.append({
            "task": spec.task.kind, "width": f"{spec.width}", "depth": f"{spec.depth}", "batch size": f"{spec.batch_size}",
            "optimizer": f"{spec.optimizer} {spec.parameterization}", "steps": f"{spec.total_steps}",
            "trials": f"{len(batch)}", "to train": f"{len(missing)}",
        })  # fmt: skip
    sampled = ", and the llc of each" if plan.sampling else ""
    longer = f", {len(ends)} of them from the ends of shorter ones" if ends else ""
    return f"{aligned(cells, RIGHT)}\n{len(plan.trials)} trials{sampled}{longer}; {samples:,} samples to train on"


def label(trials: Sequence[TrialSpec]) -> str:
    """A name for trials that are trained together, or for one alone."""
    first = trials[0]
    program = f"{first.task.kind}, width {first.width}, batch size {first.batch_size}"
    if len(trials) > 1:
        return f"{program}: {len(trials)} trials"
    return f"{program}: eta {first.eta:g}, richness {first.richness:g}, seed {first.seed}"


def outcome(
    plan: StudyPlan, ids: Sequence[str], rows: Sequence[Mapping[str, Any]], errors: Sequence[str], unmeasured: Sequence[str]
) -> dict[str, Any]:
    """The result of the flow, before it is published: what could not be computed, and why.

    Args:
      ids: of the trials that are finished. rows: of the runs that sample them. errors, unmeasured: what went wrong with the
        training, and with the measuring of what was trained.
    """
    failed = [row for row in rows if row["status"] == "failed"]
    return {
        "name": plan.name, "num_trials": len(plan.trials), "num_untrained": len(plan.trials) - len(ids),
        "runs_failed": len(unmeasured) + len(failed),
        "run_ids": [row["run_id"] for row in rows if row["status"] != "failed"],
        "errors": list(dict.fromkeys([*errors, *unmeasured, *(row["remedy"] for row in failed)])),
    }  # fmt: skip


def summary(study: Study) -> dict[str, Any]:
    """What came of a study, in JSON's own types: how many trials failed and how, and the best, their cells as text."""
    table = study.table
    best = table.iloc[losses(table).to_numpy().argsort(kind="stable")[:NUM_BEST]]
    names = ("final_loss", "test_loss", "test_accuracy", "llc", "sharpness", "gradient_noise_scale", "failure")
    shown = [*swept(table), *(name for name in names if name in table and best[name].notna().any()), "trial_id"]
    rows = [{name: _text(value) for name, value in row.items()} for row in best[shown].to_dict("records")]
    return {"failures": failures(table), "best": rows}


def incomplete(result: Mapping[str, Any], kept: bool = True) -> str:
    """What could not be computed, in a sentence. A trial that was trained and failed is a result. kept: whether the rest is."""
    counts = {
        f"of {result['num_trials']} trainings": result["num_untrained"],
        "measurements of trained networks": result["runs_failed"],
    }
    return what_failed(counts, kept)


def text(result: Mapping[str, Any], kept: bool = True) -> str:
    """The result of the flow for a terminal: the best trials, what could not be computed and why, and where the files are.
    kept: whether it is in a store that stays."""
    lines = [aligned(result["best"], RIGHT)] if "best" in result else []
    lines += [incomplete(result, kept)] if result["num_untrained"] or result["runs_failed"] else []
    lines += [f"  {error}" for error in result["errors"]]
    if "best" in result:
        counts = f"{result['num_trials'] - result['num_untrained']} trials, {failed_text(result['failures'])}"
        lines += [f"{result.get('study_id', result['name'])}: {counts}; the best of them above"]
    if files := result.get("files"):
        lines += files_of(files)
        lines += [f"  {name} is not drawn: {why}" for name, why in result["not_drawn"].items()]
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
