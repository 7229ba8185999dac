"""The steps of a study, each from specs to a published artifact: trials trained together, curvatures, the study.

Every step computes only what the store does not hold, so calling it again, in any process, is free.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from lambda_hat.batch_size.ends import Place, load_ends, pack_ends
from lambda_hat.batch_size.study import Study, failures
from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.llc import artifacts
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.spec import InvalidInput, content_id, dotted
from lambda_hat.store.arrays import flatten, pack_arrays, unpack_arrays
from lambda_hat.store.manifest import (
    DIAGNOSIS_VERSION,
    STUDY_VERSION,
    Address,
    ArtifactError,
    Manifest,
    curvature_address,
    diagnosis_address,
    study_address,
    target_address,
    trials_address,
)
from lambda_hat.store.store import Store
from lambda_hat.targets.families import AnyTargetSpec, TargetSpec
from lambda_hat.targets.trials.spec import TrialSpec

#: Trials of one artifact at most, all trained by one program; an interrupted study goes on within it.
MAX_TOGETHER = 512

#: What a curvature has a column of in the study's table.
_MEASURED = ("sharpness", "hessian_trace", "gradient_noise_scale")


def batches(specs: Sequence[TrialSpec], places: Mapping[str, Place] | None = None) -> list[list[TrialSpec]]:
    """The trials one program can train together: different in eta, richness and seed only.

    Args:
      places: trial_id -> where it goes on, see `find_ends`; those that go on from different steps are trained apart.
    """
    groups: dict[tuple[TrialSpec, int], list[TrialSpec]] = defaultdict(list)
    for spec in specs:
        place = (places or {}).get(spec.target_id)
        groups[spec.static(), 0 if place is None else place.step].append(spec)
    return [group[start : start + MAX_TOGETHER] for group in groups.values() for start in range(0, len(group), MAX_TOGETHER)]


def trials_id(specs: Sequence[TrialSpec]) -> str:
    """Of these trials, trained together."""
    return content_id("trl", sorted(spec.target_id for spec in specs))


def trained(store: Store) -> dict[str, Address]:
    """Where each trial that was ever trained is: trial_id -> address of the trials it was trained with."""
    found = store.manifests(store.addresses("trials"))
    return {trial_id: manifest.address for manifest in found for trial_id in manifest.spec["trial_ids"]}


def train_batch(specs: Sequence[TrialSpec], store: Store, keep: bool = False, progress: Progress = no_progress) -> Manifest:
    """Trains a batch of `batches`, or finds it: each trial's result in results.json, their loss curves in curves.npz, and in
    ends.npz where a longer training goes on.

    Interrupted training goes on from where it was saved last, longer training from where a shorter one of the same trials
    ended; both give the numbers of an uninterrupted one.

    Args:
      keep: publish the networks of trials that have not failed as targets; of trials found in the store, `build_target` does.
    """
    address = trials_address(trials_id(specs))
    if (manifest := store.manifest(address)) is not None:
        store.clear_checkpoint(address)
        return manifest
    from lambda_hat.targets.trials.engine import train_trials
    from lambda_hat.targets.trials.result import to_target

    # A checkpoint is of the trials' places side by side, which must be the same in whatever order they come, and numbers depend
    # on them in the last digits: longer trainings of the same trials have the same.
    specs = sorted(specs, key=lambda spec: spec.course_id)
    save = functools.partial(artifacts.save_training, store, address)
    results = train_trials(specs, progress, artifacts.load_training(store, address), save, load_ends(store, specs))
    if keep:
        for result in results:
            if result.failure is None:
                artifacts.publish_target(to_target(result), store)
    rows: list[dict[str, Any]] = [
        {"trial_id": result.spec.target_id, "spec": result.spec.model_dump(mode="json", exclude={"checkpoint"}),
         "diverged_at_step": result.diverged_at_step, "failure": result.failure, "metrics": result.metrics,
         "seconds": result.seconds}
        for result in results
    ]  # fmt: skip
    curves = {"steps": np.asarray(results[0].steps), "losses": np.stack([result.losses for result in results])}
    text = json.dumps(json.loads(json.dumps(rows), parse_constant=lambda _: None))  # JSON knows no NaN
    manifest = store.publish(
        address,
        {"results.json": text.encode(), "curves.npz": pack_arrays(curves), **pack_ends([result.end for result in results])},
        spec={"trial_ids": [spec.target_id for spec in specs], "course_ids": [spec.course_id for spec in specs]},
        summary={
            "num_trials": len(rows), "num_failed": sum(row["failure"] is not None for row in rows),
            "end_step": results[0].end.step,
            "seconds": sum(row["seconds"] for row in rows), "made_with": artifacts.made_with(),
        },
    )  # fmt: skip
    store.clear_checkpoint(address)
    return manifest


def intact(store: Store, trial_ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of these trials that were trained and whose results can be read; what is wrong with the results of others."""
    places, problems = trained(store), {}
    for address in {places[trial_id] for trial_id in trial_ids if trial_id in places}:
        try:
            for name in ("results.json", "curves.npz"):
                store.read(address, name)
        except ArtifactError as error:
            problems[address] = str(error)
    return [name for name in trial_ids if name in places and places[name] not in problems], list(problems.values())


def succeeded(store: Store, trial_ids: Sequence[str]) -> set[str]:
    """Those of these trained trials that have not failed: the others' networks are not examined."""
    table = load_study(store, trial_ids).table
    return set(table["trial_id"][table["failure"].isna()])


def unexamined(store: Store, trials: Sequence[TrialSpec], curvature: bool) -> list[TrialSpec]:
    """Those of these trials whose network is not kept as a target, or, with `curvature`, was not measured."""
    address = curvature_address if curvature else target_address
    there = {manifest.id for manifest in store.manifests(address(trial.target_id) for trial in trials)}
    return [trial for trial in trials if trial.target_id not in there]


def find_target(store: Store, text: str) -> TargetSpec:
    """The spec of the target whose id is `text` or, it alone, begins with it; or of such a trial, whose network was not kept.

    Raises:
      InvalidInput: `text` begins no id of a target, or there is none, or several. ArtifactError: the trial's result is damaged.
    """
    listed = "`lambda-hat ls targets` lists targets, lambda-hat study latest --format csv the trials of a study."
    if not text.startswith("tgt_"):
        raise InvalidInput(f"A target in the store is named by its id, tgt_..., or the beginning of it; got {text!r}: {listed}")
    kept = [address for address in store.addresses("target") if address.id.startswith(text)]
    targets, places = {manifest.id: manifest for manifest in store.manifests(kept)}, trained(store)
    found = sorted({*targets, *(trial_id for trial_id in places if trial_id.startswith(text))})
    if len(found) != 1:
        names = ", ".join(found[:5]) or "none"
        raise InvalidInput(f"An id or its beginning must fit one target in {store.uri}; {text!r} fits {names}: {listed}")
    if found[0] in targets:
        spec: TargetSpec = TypeAdapter(AnyTargetSpec).validate_json(json.dumps(targets[found[0]].spec), strict=True)
        return spec
    [row] = [row for row in _rows(store, places[found[0]]) if row["trial_id"] == found[0]]
    return TrialSpec.from_dict(row["spec"])


def measure_curvature(target_id: str, store: Store) -> Manifest:
    """Measures the curvature and the gradient noise scale of a target in the store at w*, or finds them."""
    address = curvature_address(target_id)
    if (manifest := store.manifest(address)) is not None:
        return manifest
    import jax

    from lambda_hat.batch_size.curvature import curvature
    from lambda_hat.batch_size.noise_scale import gradient_noise_scale

    target = artifacts.load_target(store, target_id)
    found, noise = curvature(target, jax.random.key(0)), gradient_noise_scale(target, jax.random.key(1))
    summary = {
        "sharpness": found.sharpness, "eigenvalues": found.eigenvalues.largest.tolist(),
        "eigenvalue_errors": found.eigenvalues.largest_errors.tolist(), "smallest_eigenvalue": found.eigenvalues.smallest,
        "hessian_trace": found.trace.value, "hessian_trace_error": found.trace.error, "made_with": artifacts.made_with(),
        "gradient_noise_scale": noise.noise_scale, "gradient_noise_scale_error": noise.error,
    }  # fmt: skip
    density = pack_arrays({"grid": found.density.grid, "density": found.density.density})
    return store.publish(address, {"density.npz": density}, spec={"target_id": target_id}, summary=summary)


def load_study(store: Store, trial_ids: Sequence[str], runs: Sequence[RunSpec] = (), target_loss: float | None = None) -> Study:
    """The table and the curves of these trials, with the curvatures there are, and the llc of these runs that are diagnosed.

    Args:
      target_loss: the study's; none = `default_target` of all these trials.

    Raises:
      ArtifactError: a trial was not trained, or its result is damaged.
    """
    import pandas as pd

    from lambda_hat.batch_size.trades import default_target

    places = trained(store)
    missing = [trial_id for trial_id in trial_ids if trial_id not in places]
    if missing:
        raise ArtifactError(
            f"A study's trials must be trained; {len(missing)} of {len(trial_ids)} are not in {store.uri}. "
            "Run the study again: it trains what is missing."
        )
    rows: dict[str, dict[str, Any]] = {}
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for address in dict.fromkeys(places[trial_id] for trial_id in trial_ids):
        arrays = unpack_arrays(store.read(address, "curves.npz"))
        for row, losses in zip(_rows(store, address), arrays["losses"], strict=True):
            rows[row["trial_id"]], curves[row["trial_id"]] = row, (arrays["steps"], losses)
    table = pd.DataFrame([_table_row(rows[trial_id]) for trial_id in trial_ids])
    measured = {m.id: m.summary for m in store.manifests(map(curvature_address, trial_ids))}
    for name in _MEASURED if measured else ():
        table[name] = np.array([measured.get(trial_id, {}).get(name) for trial_id in trial_ids], np.float64)
    llcs = _llcs(store, runs)
    if llcs:
        table["llc"] = [llcs.get(trial_id, {}).get("llc", np.nan) for trial_id in trial_ids]
        table["llc_mcse"] = [llcs.get(trial_id, {}).get("mcse", np.nan) for trial_id in trial_ids]
        table["verdict"] = [llcs.get(trial_id, {}).get("verdict", "") for trial_id in trial_ids]
    target = default_target(table) if target_loss is None else target_loss
    return Study(table, {trial_id: curves[trial_id] for trial_id in trial_ids}, target)


def study_id(
    name: str, trial_ids: Sequence[str], store: Store, plots: Sequence[str] | None = None, runs: Sequence[RunSpec] = (),
    target_loss: float | None = None,
) -> str:  # fmt: skip
    """The id of a comparison of trained trials; it is another one when other curvatures are in the store."""
    return content_id("sty", {
        "versions": [STUDY_VERSION, DIAGNOSIS_VERSION], "name": name, "plots": plots, "trial_ids": sorted(trial_ids),
        "run_ids": sorted(run.run_id for run in runs), "target_loss": target_loss,
        "curvature_ids": sorted(m.id for m in store.manifests(map(curvature_address, trial_ids))),
    })  # fmt: skip


def publish_study(
    name: str, trial_ids: Sequence[str], store: Store, plots: Sequence[str] | None = None, runs: Sequence[RunSpec] = (),
    target_loss: float | None = None,
) -> Manifest:  # fmt: skip
    """Publishes the comparison of trained trials, or finds it: results.csv, results.parquet, curves.npz, plots, report.html.

    Args:
      plots: names; none given = all that can be drawn. The summary's `not_drawn` has the others, and why. target_loss: see
        `load_study`.

    Raises:
      ArtifactError: a trial was not trained, or its result is damaged. InvalidInput: a plot is not known.
    """
    address = study_address(study_id(name, trial_ids, store, plots, runs, target_loss))
    if (manifest := store.manifest(address)) is not None:
        return manifest
    from lambda_hat.batch_size.plots import draw_plots
    from lambda_hat.batch_size.report import study_report

    study = load_study(store, trial_ids, runs, target_loss)
    places = trained(store)
    drawn = draw_plots(study, plots)
    made_at = max(m.created_at for m in store.manifests({places[trial_id] for trial_id in trial_ids}))
    files = {f"{plot}.png": png for plot, png in drawn.pngs.items()}
    files["results.csv"] = study.table.to_csv(index=False).encode()
    files["results.parquet"] = study.table.to_parquet()
    files["curves.npz"] = pack_arrays(
        flatten({trial_id: {"steps": x, "losses": y} for trial_id, (x, y) in study.curves.items()})
    )
    files["report.html"] = study_report(address.id, name, study, drawn, made_at[:16].replace("T", " ")).encode()
    spec = {
        "name": name, "trials_ids": sorted({places[trial_id].id for trial_id in trial_ids}),
        "target_ids": sorted(trial_ids), "run_ids": sorted(run.run_id for run in runs),  # as targets, as far as they are kept
    }  # fmt: skip
    summary = {
        "num_trials": len(trial_ids), "num_failed": sum(failures(study.table).values()), "target_loss": study.target_loss,
        "not_drawn": drawn.left_out,
    }  # fmt: skip
    return store.publish(address, files, spec=spec, summary=summary)


def _rows(store: Store, address: Address) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(store.read(address, "results.json"))
    return rows


def _table_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A trial as one row of the table; NaN for what a diverged one does not have."""
    spec = TrialSpec.from_dict(row["spec"])
    fields = dotted(spec.model_dump(mode="json", exclude={"family", "checkpoint", "num_epochs"}))
    metrics = row["metrics"]
    names = ("start_loss", "final_loss", "test_loss", "train_accuracy", "test_accuracy")
    known: dict[str, Any] = {"trial_id": row["trial_id"]} | fields | {"num_steps": spec.total_steps}
    known |= {"temperature": spec.eta / spec.batch_size, "samples": spec.total_steps * spec.batch_size}
    measured = {name: metrics.get(name) for name in names}
    measured |= {name: row[name] for name in ("diverged_at_step", "failure")}
    measured |= {f"activation_change_{layer}": change for layer, change in enumerate(metrics["activation_change"], 1)}
    measured["seconds"] = row["seconds"]
    return known | {name: np.nan if value is None else value for name, value in measured.items()}


def _llcs(store: Store, runs: Sequence[RunSpec]) -> dict[str, dict[str, Any]]:
    """The diagnosis of the first of these runs on each target, as far as there is one."""
    first: dict[str, RunSpec] = {}
    for run in runs:
        first.setdefault(run.target_id, run)
    found = store.manifests(diagnosis_address(run.target_id, run.run_id) for run in first.values())
    return {str(m.target_id): {name: np.nan if value is None else value for name, value in m.summary.items()} for m in found}
