"""The corridor's steps, each from spec to published artifact: target, run, diagnosis, sweep.

Every step computes only what the store does not hold, so calling it again, in any process, is free.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from pydantic import TypeAdapter

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.llc.plan import spec_from_json
from lambda_hat.llc.run import RunSpec, labels
from lambda_hat.llc.sampling import Run, lane_width, sample_runs
from lambda_hat.llc.trace import Checkpoint, Trace
from lambda_hat.samplers.posterior import PosteriorSpec
from lambda_hat.specs.spec import InvalidInput, content_id
from lambda_hat.store.arrays import flatten, pack_arrays, unflatten, unpack_arrays
from lambda_hat.store.manifest import (
    DIAGNOSIS_VERSION,
    Address,
    ArtifactError,
    Manifest,
    diagnosis_address,
    run_address,
    sweep_address,
    target_address,
)
from lambda_hat.store.store import Store
from lambda_hat.targets.custom import CustomSpec
from lambda_hat.targets.families import AnyTargetSpec
from lambda_hat.targets.selection import num_selected, select
from lambda_hat.targets.target import Dataset, Params, Target, TargetSpec, Unfinished, mean_loss_float64, metrics_at


def steps(spec: RunSpec) -> tuple[Address, Address, Address]:
    """What a finished run has in the store: its target, its draws, its diagnosis."""
    ids = spec.target_id, spec.run_id
    return target_address(spec.target_id), run_address(*ids), diagnosis_address(*ids)


def found(store: Store, specs: Sequence[RunSpec]) -> dict[Address, Manifest]:
    """Which steps of these runs the store has; a remote one is asked for many at a time."""
    addresses = dict.fromkeys(address for spec in specs for address in steps(spec))
    return {manifest.address: manifest for manifest in store.manifests(addresses)}


def build_target(spec: TargetSpec, store: Store, progress: Progress = no_progress) -> Manifest:
    """Builds the target, or finds it: its arrays as .npz files (docs/storage.md), and its metrics as summary.

    Interrupted training goes on from where it was saved last and gives the numbers of an uninterrupted one.
    """
    address = target_address(spec.target_id)
    if (manifest := store.manifest(address)) is not None:
        store.clear_checkpoint(address)
        return manifest
    target = spec.build(progress, load_training(store, address), functools.partial(save_training, store, address))
    manifest = publish_target(target, store)
    store.clear_checkpoint(address)
    return manifest


def publish_target(target: Target, store: Store) -> Manifest:
    """Publishes a target that was trained, wherever it was."""
    arrays = {
        "params": flatten(target.params_star),
        "samples": target.dataset.samples,
        "constants": target.dataset.constants,
        "history": target.history,
        "observables": flatten({name: dataset.samples for name, dataset in target.observables.items()}),
    }
    arrays |= {_checkpoint_name(step): flatten(params) for step, params in target.checkpoints.items()}
    arrays |= {_state_name(step): flatten(state) for step, state in target.states.items()}
    files = {
        f"{name}.npz": pack_arrays({key: np.asarray(array) for key, array in group.items()}) for name, group in arrays.items()
    }
    # Which checkpoint is sampled is no part of the target.
    content = target.spec.model_copy(update={"checkpoint": None}).model_dump(mode="json")
    summary = target.metrics | {"made_with": made_with()}
    return store.publish(target_address(target.target_id), files, spec=content, summary=summary)


def load_target(store: Store, target_id: str, checkpoint: int | None = None) -> Target:
    """Reads a target back: with params_star and the metrics at `checkpoint` (a training step) where one is given.

    Raises:
      ArtifactError: it is not in the store, or its bytes have changed.
      InvalidInput: it has no such checkpoint.
    """
    address = target_address(target_id)
    manifest = store.manifest(address)
    if manifest is None:
        raise ArtifactError(f"A target must be built before it is sampled; {target_id} is not in {store.uri}. Run the sweep.")
    metrics = metrics_at(manifest.summary, checkpoint)
    spec: TargetSpec = TypeAdapter(AnyTargetSpec).validate_json(json.dumps(manifest.spec), strict=True)
    if spec.target_id != target_id:  # it may name a function to call: none but that of the spec which was asked for
        raise ArtifactError(
            f"A target's spec must be the one its id is made from; that of {target_id} in {store.uri} gives {spec.target_id}. "
            "Build it again, with this version of lambda_hat, in another store."
        )
    parts = ("params" if checkpoint is None else _checkpoint_name(checkpoint), "samples", "constants", "history", "observables")
    params, samples, constants, history, observables = (unpack_arrays(store.read(address, f"{part}.npz")) for part in parts)
    return Target(
        spec.model_copy(update={"checkpoint": checkpoint}), unflatten(params), Dataset(samples, constants), metrics, history,
        {name: Dataset(observed, constants) for name, observed in unflatten(observables).items()},
    )  # fmt: skip


def load_state(store: Store, target_id: str, checkpoint: int) -> Params:
    """The optimizer's state after a training step of a target in the store.

    Raises:
      ArtifactError: it is not in the store, or its bytes have changed.
    """
    return unflatten(unpack_arrays(store.read(target_address(target_id), f"{_state_name(checkpoint)}.npz")))


def sample_batch(specs: Sequence[RunSpec], store: Store, progress: Progress = no_progress) -> list[Manifest]:
    """Samples a batch (`llc.run.batches`) by one program, or finds its runs: each one's draws as trace.npz, its work and
    time as summary.

    Interrupted sampling goes on from its last checkpoint and gives the numbers of an uninterrupted run.
    """
    addresses = [run_address(spec.target_id, spec.run_id) for spec in specs]
    manifests = [store.manifest(address) for address in addresses]
    missing = [index for index, manifest in enumerate(manifests) if manifest is None]
    checkpoints = {index: _load_checkpoint(store, addresses[index]) for index in missing}
    groups: list[tuple[list[int], tuple[list[int], int]]] = []
    if missing:
        target = load_target(store, specs[0].target_id, specs[0].target.checkpoint)
        _check_custom(target)
        width = lane_width(len(specs), target.params_star, specs[0].sampler.num_chains)
        groups = list(_together(checkpoints, width))
    for place, (indices, lanes) in enumerate(groups):
        saved = [checkpoint for index in indices if (checkpoint := checkpoints[index]) is not None]
        traces = sample_runs(
            specs[0].target.objective(), target.params_star, target.dataset,
            [Run(specs[index].posterior, specs[index].sampler) for index in indices],
            metric=specs[0].metric, observables=target.observables, resume=saved or None, lanes=lanes,
            progress=functools.partial(_progress_of, progress, place, len(groups)),
            save=functools.partial(_save_checkpoints, store, [addresses[index] for index in indices]),
        )  # fmt: skip
        for index, trace in zip(indices, traces, strict=True):
            manifests[index] = _publish_run(specs[index], trace, store)
    for address in addresses:
        store.clear_checkpoint(address)
    return [manifest for manifest in manifests if manifest is not None]


def _check_custom(target: Target) -> None:
    """Refuses to sample a user's function that has changed since its target was built: its source is not part of the id."""
    if not isinstance(target.spec, CustomSpec):
        return
    built = target.metrics["init_loss"]
    found = mean_loss_float64(target.spec.objective(), target.params_star, target.dataset)
    if not np.isclose(found, built, rtol=1e-4, atol=1e-12):
        raise InvalidInput(
            f"The function of a custom target must give the loss at w* that it gave when the target was built, {built:.6g}; "
            f"{target.spec.path} now gives {found:.6g}. Set target.version to something new."
        )


def _publish_run(spec: RunSpec, trace: Trace, store: Store) -> Manifest:
    summary = {
        "fge": trace.fge, "seconds": trace.seconds, "nbeta": spec.nbeta,
        "observables": trace.observables, "made_with": made_with(),
    }  # fmt: skip
    address = run_address(spec.target_id, spec.run_id)
    return store.publish(address, {"trace.npz": pack_arrays(trace.draws)}, spec=spec.model_dump(mode="json"), summary=summary)


def _save_checkpoints(store: Store, addresses: Sequence[Address], checkpoints: Sequence[Checkpoint]) -> None:
    for address, checkpoint in zip(addresses, checkpoints, strict=True):
        store.save_checkpoint(address, _pack_checkpoint(checkpoint))


def _progress_of(progress: Progress, place: int, count: int, done: int, total: int, unit: str, note: str) -> None:
    """The progress of one of `count` equal parts as that of the whole."""
    progress(place * total + done, count * total, unit, note)


def _together(checkpoints: Mapping[int, Checkpoint | None], width: int) -> Iterator[tuple[list[int], tuple[list[int], int]]]:
    """Runs of a batch that are sampled together, and their lanes: those saved at one draw in the lanes they had; those never
    saved, as after a kill between two runs' checkpoints, in the lanes they have without one. Runs that an earlier sweep sampled
    apart may have been in one lane: they go on apart.
    """
    groups: dict[Any, dict[int, int]] = {}  # of (number of lanes, ...): each run's lane
    for index, checkpoint in checkpoints.items():
        if checkpoint is None:
            groups.setdefault((width, index // width), {})[index] = index % width
            continue
        place: Any = (checkpoint.num_lanes, checkpoint.num_draws, checkpoint.num_parts, checkpoint.observables)
        while checkpoint.lane in groups.get(place, {}).values():
            place = (*place, "another")
        groups.setdefault(place, {})[index] = checkpoint.lane
    for (num_lanes, *_), lanes in groups.items():
        yield list(lanes), (list(lanes.values()), num_lanes)


def load_trace(store: Store, spec: RunSpec) -> Trace:
    """Reads a run's draws back.

    Raises:
      ArtifactError: the run is not in the store, or its bytes have changed.
    """
    address = run_address(spec.target_id, spec.run_id)
    draws = unpack_arrays(store.read(address, "trace.npz"))
    manifest = store.manifest(address)
    assert manifest is not None  # it was just read
    counts = manifest.summary["observables"]  # which a manifest sorts by name
    observables = {name: counts[name] for name in spec.sampler.observables}
    return Trace(draws, spec.sampler.num_burnin_draws, manifest.summary["seconds"], observables)


def find_run_spec(store: Store, text: str) -> RunSpec:
    """The spec the run of this id, or beginning of an id, was made from.

    Raises:
      InvalidInput: it is no run's id, or not in the store.
    """
    address = store.find(text)
    manifest = store.manifest(address)
    if address.kind != "run" or manifest is None:
        raise InvalidInput(f"Only a run can be repeated; {text!r} names a {address.kind}. `lambda-hat ls runs` lists the runs.")
    return spec_from_json(json.dumps(manifest.spec))


def diagnose_run(spec: RunSpec, store: Store) -> Manifest:
    """Diagnoses the run, or finds its diagnosis of this version: result.json (also the summary) and the run's plots."""
    address = diagnosis_address(spec.target_id, spec.run_id)
    if (manifest := store.manifest(address)) is not None:
        return manifest
    from lambda_hat.llc.diagnostics import diagnose
    from lambda_hat.llc.plots import RUN_PLOTS, draw

    trace = load_trace(store, spec)
    diagnosis = diagnose(spec, trace, _metrics(spec, store))
    result = diagnosis.to_dict()
    files = {"result.json": json.dumps(result, indent=1).encode()}
    files |= _png_files(draw(RUN_PLOTS, spec, trace, diagnosis))
    return store.publish(address, files, spec=spec.model_dump(mode="json"), summary=result)


def sweep_id(specs: Sequence[RunSpec]) -> str:
    """Of the comparison of these runs by this version of the diagnosis."""
    return content_id("swp", {"diagnosis_version": DIAGNOSIS_VERSION, "run_ids": sorted({spec.run_id for spec in specs})})


def publish_sweep(specs: Sequence[RunSpec], store: Store) -> Manifest:
    """Publishes the comparison of finished runs, or finds it: each target's plots over its runs and those over all targets,
    results.json, and report.html.

    Raises:
      ArtifactError: a run or its diagnosis is damaged.
    """
    address = sweep_address(sweep_id(specs))
    if (manifest := store.manifest(address)) is not None:
        return manifest
    from lambda_hat.llc.diagnostics import Diagnosis
    from lambda_hat.llc.plots import SWEEP_PLOTS, TARGET_PLOTS, draw
    from lambda_hat.llc.report import MAX_RUN_PLOT_BYTES, ReportRun, ReportTarget, sweep_report

    named = sorted(zip(labels(specs), specs, strict=True), key=lambda run: run[1].target_id)
    runs: list[ReportRun] = []
    targets: dict[str, ReportTarget] = {}
    results, made_at, room = [], "", MAX_RUN_PLOT_BYTES
    for target_id, of_target in itertools.groupby(named, lambda run: run[1].target_id):
        compared = []
        for label, spec in of_target:
            at = diagnosis_address(target_id, spec.run_id)
            result = store.read(at, "result.json")
            diagnosed = store.manifest(at)
            assert diagnosed is not None  # it was just read
            names = [file.name for file in diagnosed.files if file.name.endswith(".png")]
            room -= sum(diagnosed.file(name).size for name in names)
            pngs = {name.removesuffix(".png"): store.read(at, name) for name in names} if room >= 0 else {}
            diagnosis = Diagnosis.model_validate_json(result)
            compared.append((spec, load_trace(store, spec), diagnosis))
            runs.append(ReportRun(label, spec, diagnosis, pngs))
            results.append({"target_id": target_id, "run_id": spec.run_id} | json.loads(result))
            made_at = max(made_at, diagnosed.created_at)
        targets[target_id] = ReportTarget(_summary(target_id, store), draw(TARGET_PLOTS, compared))
    over_all = draw(SWEEP_PLOTS, [(run.spec, run.diagnosis) for run in runs])
    files = _png_files(over_all)
    for target_id, target in targets.items():
        files |= _png_files(target.plots, f"-{target_id}")
    files["results.json"] = json.dumps(results, indent=1).encode()
    files["report.html"] = sweep_report(address.id, runs, targets, over_all, made_at[:16].replace("T", " ")).encode()
    summary = {"num_runs": len(specs)}
    return store.publish(address, files, spec={"run_ids": sorted(spec.run_id for spec in specs)}, summary=summary)


def _png_files(plots: Mapping[str, bytes], suffix: str = "") -> dict[str, bytes]:
    return {f"{name}{suffix}.png": png for name, png in plots.items()}


def _summary(target_id: str, store: Store) -> dict[str, Any]:
    manifest = store.manifest(target_address(target_id))
    assert manifest is not None  # a run was sampled from it
    return manifest.summary


def _metrics(spec: RunSpec, store: Store) -> dict[str, Any]:
    """The target's metrics for a run: at its checkpoint, of the parameters that move."""
    summary = _summary(spec.target_id, store)
    metrics = metrics_at(summary, spec.target.checkpoint)
    if spec.posterior.parameters != PosteriorSpec().parameters:
        params = load_target(store, spec.target_id).params_star
        metrics["num_params"] = num_selected(params, select(params, spec.posterior.parameters))
    if metrics["num_params"] < summary["num_params"] or spec.target.checkpoint is not None:
        metrics["true_llc"] = None  # it is of all parameters, at w*
    return metrics


def made_with() -> dict[str, str]:
    """What an id leaves out and the last digits depend on."""
    return {"jax": jax.__version__, "blackjax": version("blackjax"), "backend": jax.default_backend()}


def _pack_checkpoint(work: Checkpoint | Unfinished) -> bytes:
    """Work cut short, its leaves under their numbers."""
    groups = work._asdict()
    return pack_arrays(flatten(groups | {"leaves": {str(index): leaf for index, leaf in enumerate(work.leaves)}}))


def _load_groups(store: Store, address: Address) -> dict[str, Any] | None:
    """The fields of what `_pack_checkpoint` was given, numbers and texts as arrays; None where nothing is saved."""
    content = store.load_checkpoint(address)
    if content is None:
        return None
    groups = unflatten(unpack_arrays(content))
    return groups | {"leaves": [groups["leaves"][str(index)] for index in range(len(groups["leaves"]))]}


def _load_checkpoint(store: Store, address: Address) -> Checkpoint | None:
    groups = _load_groups(store, address)
    if groups is None:
        return None
    seconds = {name: float(value) for name, value in groups["seconds"].items()}
    numbers = {name: int(groups[name]) for name in ("lane", "num_lanes", "num_parts")}
    return Checkpoint(groups["leaves"], groups["draws"], seconds, **numbers, observables=tuple(groups["observables"].tolist()))


def save_training(store: Store, address: Address, unfinished: Unfinished) -> None:
    """Replaces what is saved of a training that goes on."""
    store.save_checkpoint(address, _pack_checkpoint(unfinished))


def load_training(store: Store, address: Address) -> Unfinished | None:
    """What `save_training` saved last; None where nothing is saved."""
    groups = _load_groups(store, address)
    if groups is None:
        return None
    # Its keys are parts of the arrays' names, and an empty one leaves none.
    checkpoints = {int(step): params for step, params in groups.get("checkpoints", {}).items()}
    return Unfinished(int(groups["step"]), groups["leaves"], checkpoints)


def _checkpoint_name(step: int) -> str:
    """Of a training checkpoint's file: each is read alone."""
    return f"params-{step}"


def _state_name(step: int) -> str:
    """The same of the optimizer's state."""
    return f"state-{step}"
