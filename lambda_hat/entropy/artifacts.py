"""The steps of an entropy study, each from specs to a published artifact: a measured update, the study.

Every step computes only what the store does not hold, so calling it again, in any process, is free.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.entropy.spec import EntropySpec
from lambda_hat.entropy.study import EntropyStudy, Measured, PolicyTraining, influence_table, names_of
from lambda_hat.llc import artifacts
from lambda_hat.specs.spec import content_id
from lambda_hat.store.arrays import flatten, pack_arrays, unflatten, unpack_arrays
from lambda_hat.store.manifest import (
    DIAGNOSIS_VERSION,
    STUDY_VERSION,
    ArtifactError,
    Manifest,
    diagnosis_address,
    entropy_address,
    entropy_study_address,
    target_address,
)
from lambda_hat.store.store import Store

if TYPE_CHECKING:
    import pandas as pd


def measure_update(
    spec: EntropySpec, store: Store, grad_chunk_size: int = 0, tf_batch_size: int = 0, progress: Progress = no_progress
) -> Manifest:
    """Measures an update of a policy in the store, or finds it: its files are listed in docs/entropy.md.

    An interrupted measurement goes on from the chunk where it was saved last.

    Raises:
      ArtifactError: the policy is not in the store, or is damaged. InvalidInput: see `entropy.measure.measure`.
    """
    address = entropy_address(spec.entropy_id)
    if (manifest := store.manifest(address)) is not None:
        store.clear_checkpoint(address)
        return manifest
    from lambda_hat.entropy.measure import Work, measure

    checkpoint = spec.target.checkpoint
    assert checkpoint is not None  # the spec has one
    target = artifacts.load_target(store, spec.target.target_id, checkpoint)
    state = artifacts.load_state(store, spec.target.target_id, checkpoint)

    def save(work: Work) -> None:
        store.save_checkpoint(address, _pack_work(work))

    saved = store.load_checkpoint(address)
    measured, details = measure(
        spec, target, state, grad_chunk_size, tf_batch_size, progress, None if saved is None else _unpack_work(saved), save
    )
    summary = measured.summary | {"made_with": artifacts.made_with()}
    files = {"summary.json": json.dumps(summary, indent=1).encode()} | _files(measured, details)
    manifest = store.publish(address, files, spec=spec.model_dump(mode="json"), summary=summary)
    store.clear_checkpoint(address)
    return manifest


def _pack_work(work: Any) -> bytes:
    groups = {"finished": work.finished, "step": work.step, "done": work.columns.done, "columns": work.columns.arrays}
    return pack_arrays(flatten(groups))


def _unpack_work(data: bytes) -> Any:
    from lambda_hat.entropy.attribution import Columns
    from lambda_hat.entropy.measure import Work

    groups = unflatten(unpack_arrays(data))
    columns = Columns(int(groups["done"]), groups.get("columns", {}))
    return Work(groups.get("finished", {}), str(groups["step"]), columns)


def _files(measured: Measured, details: Any) -> dict[str, bytes]:
    """Tables as Parquet, arrays of tokens as .npz, matrices as .npy."""
    files = {
        "update.parquet": measured.update.to_parquet(), "update.npz": pack_arrays(details.update),
        "influence.parquet": measured.influence.to_parquet(), "changes.parquet": measured.changes.to_parquet(),
    }  # fmt: skip
    for number, (table, matrix) in enumerate(zip(measured.evaluations, measured.matrices, strict=True)):
        name = f"eval_{number:02}"
        files[f"{name}.parquet"] = table.to_parquet()
        files[f"{name}.npz"] = pack_arrays(details.evaluations[number])
        files[f"{name}_delta_matrix.npy"] = _npy(matrix)
        for change in details.changes[number]:
            eta = f"eta_{change.eta:g}"
            for part, snis in change.parts.items():
                files[f"{name}_per_sequence/{part}/{eta}.npy"] = _npy(snis.contributions_KN)
            files[f"{name}_grad_eta/{eta}.npy"] = _npy(change.grad.change)
            files[f"{name}_grad_eta/{eta}.json"] = json.dumps({
                part: {"eta": change.eta} | {
                    field: values.tolist() for field, values in snis._asdict().items() if field != "contributions_KN"
                }
                for part, snis in change.parts.items()
            }).encode()  # fmt: skip
    return files


def load_measured(store: Store, entropy_id: str) -> Measured:
    """Reads a measurement back.

    Raises:
      ArtifactError: it is not in the store, or its bytes have changed.
    """
    import pandas as pd

    address = entropy_address(entropy_id)

    def table(name: str) -> pd.DataFrame:
        return pd.read_parquet(io.BytesIO(store.read(address, f"{name}.parquet")))

    summary = json.loads(store.read(address, "summary.json"))
    manifest = store.manifest(address)
    assert manifest is not None  # it was just read
    names = [f"eval_{number:02}" for number in range(len(summary["evaluations"]))]
    matrices = [np.load(io.BytesIO(store.read(address, f"{name}_delta_matrix.npy")), allow_pickle=False) for name in names]
    return Measured(
        entropy_id, EntropySpec.from_dict(manifest.spec), summary, table("update"), [table(name) for name in names], matrices,
        table("influence"), table("changes"),
    )  # fmt: skip


def intact(store: Store, specs: Sequence[EntropySpec]) -> tuple[list[EntropySpec], list[str]]:
    """Those of these that were measured and whose files can be read; what is wrong with others."""
    fine, problems = [], []
    for spec in specs:
        address = entropy_address(spec.entropy_id)
        if (manifest := store.manifest(address)) is None:
            continue
        try:
            for file in manifest.files:
                store.read(address, file.name)
            fine.append(spec)
        except ArtifactError as error:
            problems.append(str(error))
    return fine, problems


def load_study(store: Store, name: str, entropy_ids: Sequence[str], run_ids: Sequence[str] = ()) -> EntropyStudy:
    """These measurements by policy and checkpoint, how the policies were trained, and the llc of these runs that are diagnosed.

    Raises:
      ArtifactError: one is not in the store, or is damaged.
    """
    measured = [load_measured(store, entropy_id) for entropy_id in entropy_ids]
    measured.sort(key=lambda one: (one.spec.target.target_id, one.spec.target.checkpoint, one.entropy_id))
    policies: dict[str, PolicyTraining] = {}
    for one in measured:
        target_id = one.spec.target.target_id
        if target_id not in policies:
            history = unpack_arrays(store.read(target_address(target_id), "history.npz"))
            manifest = store.manifest(target_address(target_id))
            assert manifest is not None  # it was just read
            spec = one.spec.target.model_copy(update={"checkpoint": None})
            policies[target_id] = PolicyTraining(target_id, spec, manifest.summary, history)
    return EntropyStudy(name, measured, policies, _llcs(store, run_ids))


def study_id(name: str, entropy_ids: Sequence[str], plots: Sequence[str] | None = None, run_ids: Sequence[str] = ()) -> str:
    """The id of a comparison of measurements."""
    return content_id("ens", {
        "versions": [STUDY_VERSION, DIAGNOSIS_VERSION], "name": name, "plots": plots,
        "entropy_ids": sorted(entropy_ids), "run_ids": sorted(run_ids),
    })  # fmt: skip


def publish_study(
    name: str, entropy_ids: Sequence[str], store: Store, plots: Sequence[str] | None = None, run_ids: Sequence[str] = ()
) -> Manifest:
    """Publishes the comparison of measurements, or finds it: results.csv and .parquet (every training sequence's features and
    influence), changes.csv, plots, report.html. The summary's `not_drawn` has the plots that cannot be drawn, and why.

    Raises:
      ArtifactError: a measurement is damaged. InvalidInput: a plot is not known.
    """
    address = entropy_study_address(study_id(name, entropy_ids, plots, run_ids))
    if (manifest := store.manifest(address)) is not None:
        return manifest
    import pandas as pd

    from lambda_hat.entropy.plots import draw_plots
    from lambda_hat.entropy.report import entropy_report

    study = load_study(store, name, entropy_ids, run_ids)
    drawn = draw_plots(study, plots)
    made_at = max(m.created_at for m in store.manifests(map(entropy_address, entropy_ids)))
    table = influence_table(study)
    changes = pd.concat([_named(study, one) for one in study.measured], ignore_index=True)
    files = {f"{plot}.png": png for plot, png in drawn.pngs.items()}
    files |= {"results.csv": table.to_csv(index=False).encode(), "results.parquet": table.to_parquet()}
    files["changes.csv"] = changes.to_csv(index=False).encode()
    files["report.html"] = entropy_report(address.id, name, study, drawn, made_at[:16].replace("T", " ")).encode()
    spec = {
        "name": name, "entropy_ids": sorted(entropy_ids), "run_ids": sorted(run_ids), "target_ids": sorted(study.policies)
    }  # fmt: skip
    return store.publish(address, files, spec=spec, summary={"num_measured": len(entropy_ids), "not_drawn": drawn.left_out})


def _named(study: EntropyStudy, measured: Measured) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(names_of(study, measured), index=measured.changes.index).join(measured.changes)


def _llcs(store: Store, run_ids: Sequence[str]) -> pd.DataFrame | None:
    """A row for each checkpoint that was sampled, by the first of these runs on it; none without a run."""
    import pandas as pd

    runs = {address.id: address for address in (store.addresses("run") if run_ids else [])}
    wanted = [diagnosis_address(str(runs[run_id].target_id), run_id) for run_id in run_ids if run_id in runs]
    rows: dict[tuple[Any, Any], dict[str, Any]] = {}
    for manifest in store.manifests(wanted):
        found, checkpoint = manifest.summary, manifest.spec["target"]["checkpoint"]
        row = {"target_id": manifest.target_id, "checkpoint": checkpoint}
        row |= {name: found[name] for name in ("llc", "mcse", "verdict")}
        rows.setdefault((manifest.target_id, checkpoint), row)
    return pd.DataFrame(list(rows.values())) if rows else None


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
