"""The corridor's steps, each from spec to published artifact: target, run, diagnosis, sweep.

Every step computes only what the store does not hold, so calling it again, in any process, is free.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from importlib.metadata import version

import jax
import numpy as np
from pydantic import TypeAdapter

from lambda_hat.arrays import flatten, pack_arrays, unflatten, unpack_arrays
from lambda_hat.chunks import Progress, no_progress
from lambda_hat.manifest import ArtifactError, Manifest, diagnosis_address, run_address, sweep_address, target_address
from lambda_hat.plan import spec_from_json
from lambda_hat.run import RunSpec
from lambda_hat.sampling import Checkpoint, Trace, sample
from lambda_hat.spec import InvalidInput, content_id
from lambda_hat.store import Store
from lambda_hat.target import Dataset, Target, TargetSpec
from lambda_hat.targets import AnyTargetSpec


def build_target(spec: TargetSpec, store: Store, progress: Progress = no_progress) -> Manifest:
    """Builds the target, or finds it: params.npz, samples.npz, constants.npz, history.npz, and its metrics as summary."""
    address = target_address(spec.target_id)
    if (manifest := store.manifest(address)) is not None:
        return manifest
    target = spec.build(progress)
    arrays = {
        "params": flatten(target.params_star),
        "samples": target.dataset.samples,
        "constants": target.dataset.constants,
        "history": target.history,
    }
    files = {
        f"{name}.npz": pack_arrays({key: np.asarray(array) for key, array in group.items()}) for name, group in arrays.items()
    }
    return store.publish(
        address, files, spec=spec.model_dump(mode="json"), summary=target.metrics | {"made_with": _made_with()}
    )


def load_target(store: Store, target_id: str) -> Target:
    """Reads a target back.

    Raises:
      ArtifactError: it is not in the store, or its bytes have changed.
    """
    address = target_address(target_id)
    manifest = store.manifest(address)
    if manifest is None:
        raise ArtifactError(f"A target must be built before it is sampled; {target_id} is not in {store.uri}. Run the sweep.")
    spec: TargetSpec = TypeAdapter(AnyTargetSpec).validate_json(json.dumps(manifest.spec), strict=True)
    params, samples, constants, history = (
        unpack_arrays(store.read(address, f"{name}.npz")) for name in ("params", "samples", "constants", "history")
    )
    return Target(spec, unflatten(params), Dataset(samples, constants), manifest.summary, history)


def sample_run(spec: RunSpec, store: Store, progress: Progress = no_progress) -> Manifest:
    """Samples the run, or finds it: trace.npz, and its work and time as summary.

    Interrupted sampling goes on from its last checkpoint and gives the numbers of an uninterrupted run.
    """
    address = run_address(spec.target_id, spec.run_id)
    if (manifest := store.manifest(address)) is not None:
        store.clear_checkpoint(address)
        return manifest
    target = load_target(store, spec.target_id)
    trace = sample(
        spec.target.objective(), target.params_star, target.dataset, spec.posterior, spec.sampler,
        resume=_load_checkpoint(store, spec), progress=progress,
        save=lambda checkpoint: store.save_checkpoint(address, _pack_checkpoint(checkpoint)),
    )  # fmt: skip
    summary = {"fge": spec.fge, "seconds": trace.seconds, "nbeta": spec.nbeta, "made_with": _made_with()}
    manifest = store.publish(
        address, {"trace.npz": pack_arrays(trace.draws)}, spec=spec.model_dump(mode="json"), summary=summary
    )
    store.clear_checkpoint(address)
    return manifest


def load_trace(store: Store, spec: RunSpec) -> Trace:
    """Reads a run's draws back.

    Raises:
      ArtifactError: the run is not in the store, or its bytes have changed.
    """
    address = run_address(spec.target_id, spec.run_id)
    draws = unpack_arrays(store.read(address, "trace.npz"))
    manifest = store.manifest(address)
    assert manifest is not None  # it was just read
    return Trace(draws, spec.sampler.num_burnin_draws, manifest.summary["seconds"])


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
    """Diagnoses the run, or finds its diagnosis: result.json (also the summary) and the run's plots."""
    from lambda_hat.diagnostics import diagnose
    from lambda_hat.plots import RUN_PLOTS, save_png

    address = diagnosis_address(spec.target_id, spec.run_id)
    if (manifest := store.manifest(address)) is not None:
        return manifest
    trace = load_trace(store, spec)
    target = store.manifest(target_address(spec.target_id))
    assert target is not None  # the run was sampled from it
    diagnosis = diagnose(spec, trace, target.summary)
    result = diagnosis.to_dict()
    files = {"result.json": json.dumps(result, indent=1).encode()}
    files |= {f"{name}.png": save_png(plot(spec, trace, diagnosis)) for name, plot in RUN_PLOTS.items()}
    return store.publish(address, files, spec=spec.model_dump(mode="json"), summary=result)


def sweep_id(specs: Sequence[RunSpec]) -> str:
    return content_id("swp", sorted({spec.run_id for spec in specs}))


def publish_sweep(specs: Sequence[RunSpec], store: Store) -> Manifest:
    """Publishes the comparison of finished runs, or finds it: each target's plots over its runs, and results.json.

    Raises:
      ArtifactError: a run or its diagnosis is damaged.
    """
    from lambda_hat.diagnostics import Diagnosis
    from lambda_hat.plots import TARGET_PLOTS, save_png

    address = sweep_address(sweep_id(specs))
    if (manifest := store.manifest(address)) is not None:
        return manifest
    files: dict[str, bytes] = {}
    results = []
    by_target = itertools.groupby(sorted(specs, key=lambda spec: spec.target_id), lambda spec: spec.target_id)
    for target_id, runs_of_target in by_target:
        runs = []
        for spec in runs_of_target:
            result = store.read(diagnosis_address(target_id, spec.run_id), "result.json")
            runs.append((spec, load_trace(store, spec), Diagnosis.model_validate_json(result)))
            results.append({"target_id": target_id, "run_id": spec.run_id} | json.loads(result))
        files |= {f"{name}-{target_id}.png": save_png(plot(runs)) for name, plot in TARGET_PLOTS.items()}
    files["results.json"] = json.dumps(results, indent=1).encode()
    summary = {"num_runs": len(specs)}
    return store.publish(address, files, spec={"run_ids": sorted(spec.run_id for spec in specs)}, summary=summary)


def _made_with() -> dict[str, str]:
    """What an id leaves out and the last digits depend on."""
    return {"jax": jax.__version__, "blackjax": version("blackjax"), "backend": jax.default_backend()}


def _pack_checkpoint(checkpoint: Checkpoint) -> bytes:
    leaves = {str(index): leaf for index, leaf in enumerate(checkpoint.leaves)}
    return pack_arrays(flatten({"leaf": leaves, "draws": checkpoint.draws, "seconds": checkpoint.seconds}))


def _load_checkpoint(store: Store, spec: RunSpec) -> Checkpoint | None:
    content = store.load_checkpoint(run_address(spec.target_id, spec.run_id))
    if content is None:
        return None
    groups = unflatten(unpack_arrays(content))
    leaves = [groups["leaf"][str(index)] for index in range(len(groups["leaf"]))]
    return Checkpoint(leaves, groups["draws"], {name: float(value) for name, value in groups["seconds"].items()})
