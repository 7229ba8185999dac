"""Trials trained together, their curvatures, and studies of them: what the store holds, and how the commands show it."""

import io
import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
from test_estimates import iid, trace_of

from lambda_hat.batch_size import artifacts
from lambda_hat.batch_size.artifacts import (
    batches,
    find_target,
    intact,
    load_study,
    measure_curvature,
    publish_study,
    succeeded,
    train_batch,
    trained,
    trials_id,
    unexamined,
)
from lambda_hat.batch_size.ends import find_ends
from lambda_hat.batch_size.plots import PLOTS
from lambda_hat.batch_size.study import settings
from lambda_hat.batch_size.summary import summary, text
from lambda_hat.cli import main
from lambda_hat.llc import artifacts as steps
from lambda_hat.llc.run import RunSpec
from lambda_hat.store.arrays import pack_arrays, unflatten, unpack_arrays
from lambda_hat.store.manifest import (
    ArtifactError,
    curvature_address,
    run_address,
    study_address,
    target_address,
    trials_address,
)
from lambda_hat.store.store import Store
from lambda_hat.targets.target import mean_loss_float64
from lambda_hat.targets.trials.spec import TrialSpec


def trial(**fields):
    task = {"kind": "images", "n_data": 200, "n_test": 100}
    return TrialSpec.from_dict({"task": task, "width": 8, "num_steps": 30, "batch_size": 16, "eta": 1.0} | fields)


#: Of which the first step overflows float32.
FATAL = 1e30
SMALL, FAST, LOST = trial(), trial(eta=16.0), trial(eta=FATAL)
LARGE = trial(batch_size=64, num_steps=None, num_epochs=7)
TRIALS = [SMALL, FAST, LOST, LARGE]
IDS = [spec.target_id for spec in TRIALS]
RUN = RunSpec.from_dict({
    "target": SMALL.model_dump(mode="json"),
    "sampler": {"kind": "hmc", "num_chains": 2, "num_draws": 30, "num_burnin_steps": 20, "num_integration_steps": 4},
})  # fmt: skip


def sampled(store):
    """Publishes draws of the run, as sampling does."""
    draws = trace_of(iid(shape=(2, 50))).draws
    summary = {"seconds": {"compile": 0.0, "sampling": 1.0}, "observables": {}}
    address = run_address(RUN.target_id, RUN.run_id)
    store.publish(address, {"trace.npz": pack_arrays(draws)}, spec=RUN.model_dump(mode="json"), summary=summary)
    return RUN


@pytest.fixture(scope="module")
def trained_store(tmp_path_factory):
    """The trials of three settings and one with its own batch size, all kept; one measured, one sampled; two studies."""
    store = Store(str(tmp_path_factory.mktemp("studies") / "store"))
    for batch in batches(TRIALS):
        train_batch(batch, store, keep=True)
    with jax.numpy_dtype_promotion("standard"):
        steps.diagnose_run(sampled(store), store)
    publish_study("plain", IDS, store, ["heatmap_batch"])
    measure_curvature(FAST.target_id, store)
    publish_study("measured", IDS, store, runs=[RUN])
    return store


@pytest.fixture
def store(trained_store, tmp_path):
    """A copy of it."""
    shutil.copytree(trained_store.uri, tmp_path / "copy")
    return Store(str(tmp_path / "copy"))


@pytest.fixture
def empty(tmp_path):
    return Store(str(tmp_path / "empty"))


def results(store, specs):
    """What does not depend on the clock."""
    address = trials_address(trials_id(specs))
    rows = json.loads(store.read(address, "results.json"))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def flip(store, address, name):
    path = Path(store.url(address, name))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- Trials ------------------------------------------------------------------------------------------------------------


def test_batches_are_what_one_program_trains(monkeypatch):
    specs = [trial(eta=eta, seed=seed, batch_size=size) for eta in (1.0, 2.0) for seed in (0, 1) for size in (8, 16)]
    found = batches([*specs, trial(richness=0.1)])
    assert [{spec.batch_size for spec in batch} for batch in found] == [{8}, {16}]
    assert [len(batch) for batch in found] == [4, 5]
    assert sorted((spec for batch in found for spec in batch), key=str) == sorted([*specs, trial(richness=0.1)], key=str)
    monkeypatch.setattr(artifacts, "MAX_TOGETHER", 2)
    assert [len(batch) for batch in batches([*specs, trial(richness=0.1)])] == [2, 2, 2, 2, 1]


def test_the_id_of_a_batch_is_that_of_its_trials():
    assert trials_id([SMALL, FAST]) == trials_id([FAST, SMALL]) != trials_id([SMALL])


def test_results_of_a_batch(trained_store):
    batch = [SMALL, FAST, LOST]
    manifest = trained_store.manifest(trials_address(trials_id(batch)))
    assert (manifest.summary["num_trials"], manifest.summary["num_failed"]) == (3, 1)
    in_order = sorted(batch, key=lambda spec: spec.course_id)
    assert manifest.spec == {
        "trial_ids": [spec.target_id for spec in in_order],
        "course_ids": [spec.course_id for spec in in_order],
    }
    rows = {row["trial_id"]: row for row in json.loads(trained_store.read(manifest.address, "results.json"))}
    assert list(rows) == manifest.spec["trial_ids"]
    assert [TrialSpec.from_dict(rows[spec.target_id]["spec"]) for spec in batch] == batch
    small, lost = rows[SMALL.target_id], rows[LOST.target_id]
    assert (small["diverged_at_step"], lost["diverged_at_step"] in (1, 2)) == (None, True)
    assert (small["failure"], lost["failure"]) == (None, "diverged")
    assert 0 < small["metrics"]["final_loss"] < 0.1  # predicting 0 of ten classes gives 1/10
    assert lost["metrics"]["final_loss"] is lost["metrics"]["test_loss"] is None
    assert manifest.summary["seconds"] == pytest.approx(sum(row["seconds"] for row in rows.values()))
    curves = unpack_arrays(trained_store.read(manifest.address, "curves.npz"))
    assert curves["losses"].shape == (3, len(curves["steps"]))
    assert curves["steps"][-1] == 30
    losses = dict(zip(rows, curves["losses"], strict=True))
    assert np.isfinite([losses[SMALL.target_id], losses[FAST.target_id]]).all()
    assert np.isnan(losses[LOST.target_id][-1])


def test_trained_trials_are_found_without_training(trained_store, monkeypatch):
    monkeypatch.setattr("lambda_hat.targets.trials.engine.train_trials", None)
    for batch in batches(TRIALS):
        manifest = train_batch(batch, trained_store)
        assert manifest == trained_store.manifest(trials_address(trials_id(batch)))
    assert trained(trained_store).keys() == set(IDS)


def test_studies_that_overlap_train_what_is_missing(trained_store, store):
    more = trial(eta=2.0)
    missing = [spec for spec in (SMALL, more, LOST) if spec.target_id not in trained(store)]
    assert missing == [more]  # one that has diverged is not tried again
    train_batch(missing, store)
    study = load_study(store, [SMALL.target_id, more.target_id, LARGE.target_id])
    assert study.table["eta"].tolist() == [1.0, 2.0, 1.0]
    assert results(store, [SMALL, FAST, LOST]) == results(trained_store, [SMALL, FAST, LOST])


class _Stop(Exception):
    pass


def test_a_training_that_was_killed_goes_on_bit_for_bit(empty, tmp_path):
    specs = [trial(eta=eta, seed=seed, num_steps=400) for eta in (1.0, 4.0) for seed in (0, 1)]
    address = trials_address(trials_id(specs))
    undisturbed = Store(str(tmp_path / "undisturbed"))
    train_batch(specs, undisturbed)

    def stop(done, total, *rest):
        if done > total / 3:
            raise _Stop

    with pytest.raises(_Stop):
        train_batch(specs, empty, progress=stop)
    assert not empty.exists(address)
    saved = steps.load_training(empty, address)
    assert 0 < saved.step < 400
    reports = []
    # In another order, as `eta=4,1` gives them: it is the same artifact, whose trials keep their places in the checkpoint.
    train_batch(specs[::-1], empty, progress=lambda done, *rest: reports.append(done))
    assert reports[0] > saved.step
    assert empty.load_checkpoint(address) is None
    assert results(empty, specs) == results(undisturbed, specs)
    for name in ("steps", "losses"):
        resumed, whole = (unpack_arrays(place.read(address, "curves.npz"))[name] for place in (empty, undisturbed))
        np.testing.assert_array_equal(resumed, whole, strict=True)


def of_length(specs, num_steps):
    return [spec.model_copy(update={"num_steps": num_steps, "num_epochs": None}) for spec in specs]


@pytest.mark.usefixtures("library_promotion")
@pytest.mark.parametrize("fields", [{"batch_size": 5}, {"optimizer": "adam", "eta": 0.01}, {"momentum": 0.9}])
def test_longer_trials_go_on_from_the_ends_of_shorter_ones(empty, tmp_path, fields):
    """To the bits of training from the start: results, curves and ends, in whatever order the trials are asked for."""
    eta = fields.get("eta", 1.0)
    specs = [trial(**fields | {"eta": of, "seed": seed}) for of in (eta, 2 * eta) for seed in (0, 1)]
    longer, undisturbed = of_length(specs, 75), Store(str(tmp_path / "undisturbed"))
    train_batch(longer, undisturbed)
    assert find_ends(empty, longer) == {}
    train_batch(specs[::-1], empty)
    places = find_ends(empty, longer)
    (step,) = {place.step for place in places.values()}
    assert places.keys() == {spec.target_id for spec in longer}
    assert 30 - 12 < step <= 30
    assert batches(longer, places) == [longer]
    # What is shorter than what is there begins anew, and so does another course.
    assert find_ends(empty, [*of_length(specs, step - 1), trial(**fields | {"seed": 5})]) == {}
    done = []
    train_batch(longer, empty, progress=lambda steps, *_: done.append(steps))
    assert min(done) > step
    address = trials_address(trials_id(longer))
    assert results(empty, longer) == results(undisturbed, longer)
    for name in ("curves.npz", "ends.npz"):
        assert empty.read(address, name) == undisturbed.read(address, name)
    # And on, from the longest: 15 epochs of 200 samples.
    again = [spec.model_copy(update={"num_steps": None, "num_epochs": 15}) for spec in specs]
    assert {place.step for place in find_ends(empty, again).values()} == {empty.manifest(address).summary["end_step"]} != {step}


def test_what_goes_on_from_different_steps_is_trained_apart(empty):
    """Of a study that asks for more of all: trials of one length, and one that is new."""
    first, second, new = (trial(eta=eta) for eta in (1.0, 2.0, 3.0))
    train_batch([first], empty)
    train_batch(of_length([second], 50), empty)
    longer = of_length([first, second, new], 80)
    places = find_ends(empty, longer)
    assert [sorted(spec.eta for spec in batch) for batch in batches(longer, places)] == [[1.0], [2.0], [3.0]]
    assert len(batches(longer)) == 1  # by what is asked for alone
    assert [places[spec.target_id].step for spec in longer[:2]] == [28, 48]  # in blocks of 4 steps of 16
    done = []
    train_batch(longer, empty, progress=lambda steps, *_: done.append(steps))  # all together they begin at the start
    assert min(done) < 28


def test_ends_that_are_too_large_are_not_kept(empty, monkeypatch):
    monkeypatch.setattr("lambda_hat.batch_size.ends.MAX_BYTES", 1000)
    manifest = train_batch([SMALL], empty)
    assert {file.name for file in manifest.files} == {"results.json", "curves.npz"}
    (longer,) = of_length([SMALL], 60)
    assert find_ends(empty, [longer]) == {}
    done = []
    train_batch([longer], empty, progress=lambda steps, *_: done.append(steps))
    assert min(done) < 30


def test_a_damaged_end_is_said(store):
    address = trials_address(trials_id([LARGE]))
    flip(store, address, "ends.npz")
    with pytest.raises(ArtifactError, match=r"with SHA-256"):
        train_batch(of_length([LARGE], 50), store)


def test_a_checkpoint_of_finished_training_is_cleared(store):
    address = trials_address(trials_id([LARGE]))
    store.save_checkpoint(address, b"left by a process that was killed after it published")
    train_batch([LARGE], store)
    assert store.load_checkpoint(address) is None


# --- Trials as targets -------------------------------------------------------------------------------------------------


def test_kept_networks_are_the_targets_that_are_built_alone(trained_store, empty):
    steps.build_target(FAST, empty)
    kept, alone = (steps.load_target(place, FAST.target_id) for place in (trained_store, empty))
    assert kept.spec == alone.spec == FAST
    assert kept.params_star.keys() == alone.params_star.keys() == {"layer_0", "layer_1"}
    for layer, weights in alone.params_star.items():
        # 30 steps in float32: each rounds to 6e-8, and what was rounded differently is amplified little.
        np.testing.assert_allclose(kept.params_star[layer]["w"], weights["w"], rtol=1e-3, atol=1e-4)
    for name, array in alone.dataset.samples.items():
        np.testing.assert_array_equal(kept.dataset.samples[name], array)
    assert kept.metrics["final_loss"] == pytest.approx(alone.metrics["final_loss"], rel=1e-3)
    loss = mean_loss_float64(FAST.objective(), kept.params_star, kept.dataset)
    assert kept.metrics["init_loss"] == pytest.approx(loss, rel=1e-6)
    assert kept.metrics["init_loss"] == pytest.approx(kept.metrics["final_loss"], rel=1e-3)
    assert (kept.metrics["num_params"], kept.metrics["num_data"]) == (64 * 8 + 8 * 10, 200)


def test_a_diverged_trial_is_not_kept(trained_store, empty):
    assert not trained_store.exists(target_address(LOST.target_id))
    assert succeeded(trained_store, IDS) == {SMALL.target_id, FAST.target_id, LARGE.target_id}
    with pytest.raises(FloatingPointError, match=r"it diverged at step .* with eta=1e\+30"):
        steps.build_target(LOST, empty)
    assert not empty.exists(target_address(LOST.target_id))


def test_without_keep_no_network_is_kept(empty):
    train_batch([SMALL], empty)
    assert {address.kind for address in empty.addresses()} == {"trials"}
    assert unexamined(empty, [SMALL], curvature=False) == [SMALL]
    assert find_target(empty, SMALL.target_id) == SMALL


# --- Curvatures --------------------------------------------------------------------------------------------------------


def test_curvature(trained_store):
    manifest = trained_store.manifest(curvature_address(FAST.target_id))
    found = manifest.summary
    assert measure_curvature(FAST.target_id, trained_store) == manifest
    assert manifest.spec == {"target_id": FAST.target_id}
    assert found["sharpness"] == max(found["eigenvalues"]) > 0
    assert found["gradient_noise_scale"] > 0
    arrays = unpack_arrays(trained_store.read(manifest.address, "density.npz"))
    assert arrays.keys() == {"grid", "density"}
    # A density, of which broadening leaves a little outside the grid.
    assert np.trapezoid(arrays["density"], arrays["grid"]) == pytest.approx(1, abs=0.02)
    assert unexamined(trained_store, [SMALL, FAST], curvature=True) == [SMALL]
    assert unexamined(trained_store, [SMALL, FAST], curvature=False) == []


def test_curvature_where_the_gradient_is_zero(store):
    """Units that no sample excites any more: the noise scale is infinite, which JSON has no number for."""
    dead = trial(eta=1e4)
    train_batch([dead], store, keep=True)
    assert succeeded(store, [dead.target_id]) == set()  # it has failed, so its network is not kept
    assert not store.exists(target_address(dead.target_id))
    steps.build_target(dead, store)  # of whoever asks for it by name
    manifest = measure_curvature(dead.target_id, store)
    found = manifest.summary
    assert found["sharpness"] == found["hessian_trace"] == 0
    assert found["gradient_noise_scale"] is found["gradient_noise_scale_error"] is None
    content = Path(store.uri, manifest.address.folder, "manifest.json").read_text()
    assert not re.search(r"NaN|Infinity", content)
    table = load_study(store, [dead.target_id]).table
    assert (table["sharpness"].tolist(), table["gradient_noise_scale"].isna().tolist()) == ([0.0], [True])


def test_measuring_what_is_not_there(empty):
    with pytest.raises(ArtifactError, match="must be built"):
        measure_curvature(SMALL.target_id, empty)


# --- Studies -----------------------------------------------------------------------------------------------------------


def test_the_table_of_a_study(trained_store):
    table = load_study(trained_store, IDS).table
    assert table["trial_id"].tolist() == IDS
    names = list(table)
    fields = settings(table)
    assert fields[:4] == ["seed", "precision", "task.n_data", "task.n_test"]
    assert {"task.kind", "task.dataset", "loss", "depth", "width", "richness", "eta", "batch_size", "num_steps"} <= set(fields)
    assert not {"num_epochs", "family", "checkpoint"} & set(names)
    after = names[names.index("temperature") :]
    assert after == [
        "temperature", "samples", "start_loss", "final_loss", "test_loss", "train_accuracy", "test_accuracy",
        "diverged_at_step", "failure", "activation_change_1", "activation_change_2", "seconds", "sharpness", "hessian_trace",
        "gradient_noise_scale",
    ]  # fmt: skip
    np.testing.assert_allclose(table["temperature"], [1 / 16, 1, FATAL / 16, 1 / 64])
    # Seven epochs of 200 samples in minibatches of 64 are three steps each.
    assert table["num_steps"].tolist() == [30, 30, 30, 21]
    assert table["samples"].tolist() == [480, 480, 480, 21 * 64]
    measured = table[["final_loss", "test_loss", "train_accuracy", "test_accuracy", "activation_change_1"]]
    assert measured.notna().all(axis=1).tolist() == [True, True, False, True]
    assert measured.isna().all(axis=1).tolist() == [False, False, True, False]
    assert table["diverged_at_step"].isna().tolist() == [True, True, False, True]
    assert table["failure"].tolist()[2] == "diverged"
    assert table["failure"].isna().tolist() == [True, True, False, True]
    np.testing.assert_allclose(table["start_loss"], 0.1)  # of predicting 0 where one of ten labels is 1
    assert all(table[name].dtype == np.float64 for name in after if name not in ("samples", "failure"))
    assert ((table["test_accuracy"].dropna() > 0) & (table["test_accuracy"].dropna() <= 1)).all()
    for spec, loss in zip((SMALL, FAST, LARGE), table["final_loss"].dropna(), strict=True):
        target = trained_store.manifest(target_address(spec.target_id))
        assert loss == pytest.approx(target.summary["init_loss"], rel=1e-3)


def test_the_curves_of_a_study(trained_store):
    curves = load_study(trained_store, [LARGE.target_id, FAST.target_id]).curves
    assert list(curves) == [LARGE.target_id, FAST.target_id]
    for spec, (x, losses) in zip((LARGE, FAST), curves.values(), strict=True):
        assert x[-1] == spec.total_steps
        assert x.shape == losses.shape
        assert losses[0] == pytest.approx(0.1, rel=1e-5)  # the prediction is 0 at first, of one in ten labels 1


def test_measured_columns(trained_store):
    table = load_study(trained_store, IDS, [RUN]).table.set_index("trial_id")
    diagnosis = trained_store.catalogue("diagnosis").iloc[0]
    assert table["llc"].notna().tolist() == [True, False, False, False]
    assert (table.loc[SMALL.target_id, "llc"], table.loc[SMALL.target_id, "llc_mcse"]) == (diagnosis["llc"], diagnosis["mcse"])
    assert table["verdict"].tolist() == [diagnosis["verdict"], "", "", ""]
    found = trained_store.manifest(curvature_address(FAST.target_id)).summary
    for name in ("sharpness", "hessian_trace", "gradient_noise_scale"):
        assert table[name].notna().tolist() == [False, True, False, False]
        assert table.loc[FAST.target_id, name] == found[name]
    assert "llc" not in load_study(trained_store, IDS).table


def test_a_measure_that_is_no_number_is_a_missing_one(store):
    for spec in (SMALL, LARGE):
        store.publish(
            curvature_address(spec.target_id), {}, spec={},
            summary={"sharpness": 2.0, "hessian_trace": -1.0, "gradient_noise_scale": math.inf},
        )  # fmt: skip
    table = load_study(store, [SMALL.target_id, LARGE.target_id]).table
    assert table["sharpness"].tolist() == [2.0, 2.0]
    assert table["gradient_noise_scale"].dtype == np.float64
    assert table["gradient_noise_scale"].isna().all()


def test_tasks_of_several_kinds(empty):
    cubic = trial(task={"kind": "polynomial", "n_data": 50, "n_test": 20, "input_dim": 4}, width=4, num_steps=3)
    for batch in batches([LARGE, cubic]):
        train_batch(batch, empty)
    table = load_study(empty, [LARGE.target_id, cubic.target_id]).table
    assert table["task.degree"].isna().tolist() == [True, False]
    assert table["test_accuracy"].isna().tolist() == [False, True]
    manifest = publish_study("two", [LARGE.target_id, cubic.target_id], empty, ["losscurve_grid"])
    again = pd.read_parquet(io.BytesIO(empty.read(manifest.address, "results.parquet")))
    assert again["task.kind"].tolist() == ["images", "polynomial"]


def test_a_study_is_published_once(trained_store, monkeypatch):
    plain = publish_study("plain", IDS, trained_store, ["heatmap_batch"])
    names = {file.name for file in plain.files}
    # Its trials have since been measured, so this is another study than the first one.
    assert len(trained_store.catalogue("study")) == 3
    assert names == {"results.csv", "results.parquet", "curves.npz", "report.html", "heatmap_batch.png"}
    assert (plain.summary["num_trials"], plain.summary["num_failed"]) == (4, 1)
    assert trained_store.read(plain.address, "heatmap_batch.png").startswith(b"\x89PNG")
    page = trained_store.read(plain.address, "report.html").decode()
    assert all(word in page for word in (plain.id, *IDS, "plain"))
    study = load_study(trained_store, IDS)
    parquet = pd.read_parquet(io.BytesIO(trained_store.read(plain.address, "results.parquet")))
    pd.testing.assert_frame_equal(parquet, study.table)
    csv = pd.read_csv(io.BytesIO(trained_store.read(plain.address, "results.csv")))
    assert csv["trial_id"].tolist() == IDS
    np.testing.assert_allclose(csv["final_loss"], study.table["final_loss"], rtol=1e-14)
    curves = unflatten(unpack_arrays(trained_store.read(plain.address, "curves.npz")))
    assert curves.keys() == set(IDS)
    for name, (x, losses) in study.curves.items():
        np.testing.assert_array_equal(curves[name]["steps"], x)
        np.testing.assert_array_equal(curves[name]["losses"], losses)
    monkeypatch.setattr(artifacts, "load_study", None)
    assert publish_study("plain", IDS[::-1], trained_store, ["heatmap_batch"]) == plain


def test_the_id_of_a_study(store):
    """Of its trials, runs, plots, name and what was measured."""
    first = publish_study("plain", IDS, store, ["heatmap_batch"]).id
    others = [
        publish_study("plain", IDS, store, ["heatmap_temp"]).id,
        publish_study("plain", IDS, store, ["heatmap_batch"], [RUN]).id,
        publish_study("other", IDS, store, ["heatmap_batch"]).id,
        publish_study("plain", IDS[:2], store, ["heatmap_batch"]).id,
    ]
    assert len({first, *others}) == 5
    store.publish(curvature_address(SMALL.target_id), {}, spec={}, summary={"sharpness": 2.0})
    assert publish_study("plain", IDS, store, ["heatmap_batch"]).id not in {first, *others}


def test_a_study_without_names_has_all_plots_that_apply(trained_store):
    manifest = publish_study("measured", IDS, trained_store, runs=[RUN])
    drawn = {file.name.removesuffix(".png") for file in manifest.files if file.name.endswith(".png")}
    assert drawn <= PLOTS.keys()
    assert {"heatmap_batch", "losscurve_grid"} <= drawn
    assert "width_transfer" not in drawn  # there is one width
    assert manifest.summary["not_drawn"].keys() == PLOTS.keys() - drawn
    assert "found 1 and 3 in all of them" in manifest.summary["not_drawn"]["width_transfer"]


def test_a_study_of_no_plots_has_none(store):
    manifest = publish_study("plain", IDS, store, [])
    assert not [file.name for file in manifest.files if file.name.endswith(".png")]
    assert manifest.summary["not_drawn"] == {}
    assert manifest.id != publish_study("plain", IDS, store).id
    page = store.read(manifest.address, "report.html").decode()
    assert "<img" not in page
    assert "could not be drawn" not in page


def test_what_a_study_is_made_of(trained_store, empty):
    address = publish_study("measured", IDS, trained_store, runs=[RUN]).address
    parts = {part.address for part in trained_store.manifests(trained_store.related(address))}
    assert {part.kind for part in parts} == {"study", "trials", "target", "run", "diagnosis", "curvature"}
    assert len(parts) == 1 + 2 + 3 + 1 + 1 + 1
    assert main(["pull", address.id, "--store", trained_store.uri, "--to", empty.uri]) == 0
    assert {found for found, _ in empty.verify()} == parts
    assert load_study(empty, IDS, [RUN]).table.equals(load_study(trained_store, IDS, [RUN]).table)


def test_verify_and_gc(store):
    assert [problem for _, problem in store.verify() if problem] == []
    assert list(store.clean(0.0)) == []
    address = trials_address(trials_id(TRIALS[:3]))
    store.save_checkpoint(address, b"of finished work")
    unfinished = trials_address(trials_id([trial(eta=3.0)]))
    store.save_checkpoint(unfinished, b"of unfinished work")
    attempt = Path(store.uri, study_address("sty_0123456789abcdef").folder, "files", "0" * 32)
    attempt.mkdir(parents=True)
    (attempt / "results.csv").write_bytes(b"of a process that was killed")
    removed = {Path(path).relative_to(store.uri).as_posix() for path, _ in store.clean(0.0)}
    assert removed == {f"{address.folder}/checkpoint", f"studies/sty_0123456789abcdef/files/{'0' * 32}"}
    assert store.load_checkpoint(unfinished) == b"of unfinished work"
    assert [problem for _, problem in store.verify() if problem] == []


@pytest.mark.parametrize("name", ["results.json", "curves.npz"])
def test_damaged_results(store, name):
    address = trials_address(trials_id(TRIALS[:3]))
    assert intact(store, IDS) == (IDS, [])
    flip(store, address, name)
    with pytest.raises(ArtifactError, match="with SHA-256") as error:
        load_study(store, IDS)
    assert intact(store, IDS) == ([LARGE.target_id], [str(error.value)])
    assert load_study(store, [LARGE.target_id]).table["trial_id"].tolist() == [LARGE.target_id]
    # What the message asks for.
    Path(store.uri, address.folder, "manifest.json").unlink()
    train_batch(TRIALS[:3], store)
    assert intact(store, IDS) == (IDS, [])


def test_trials_that_were_not_trained(trained_store):
    strange = trial(eta=0.1).target_id
    with pytest.raises(ArtifactError, match=r"1 of 2 are not in .*Run the study again"):
        load_study(trained_store, [IDS[0], strange])
    assert intact(trained_store, [strange, IDS[0]]) == ([IDS[0]], [])


def test_summary(trained_store):
    found = summary(load_study(trained_store, IDS, [RUN]))
    assert found["failures"] == {"diverged": 1}
    assert [row["trial_id"] for row in found["best"]] == [IDS[1], IDS[3], IDS[0], IDS[2]] or found["best"][-1][
        "trial_id"
    ] == IDS[2]
    assert all(type(cell) is str for row in found["best"] for cell in row.values())
    assert (found["best"][-1]["final_loss"], found["best"][-1]["failure"]) == ("-", "diverged")
    json.dumps(found, allow_nan=False)
    result = {"name": "x", "num_trials": 6, "num_untrained": 2, "runs_failed": 1, "errors": ["train it: why"], **found}
    shown = text(result)
    assert "2 of 6 trainings and 1 measurements of trained networks failed; the others are finished" in shown
    assert "  train it: why" in shown
    assert shown.endswith("x: 4 trials, 1 failed: 1 diverged; the best of them above")


# --- Commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _settings(monkeypatch, tmp_path):
    """No command finds the checkout's settings or store."""
    for name in list(os.environ):
        if name.startswith("LAMBDA_HAT_"):
            monkeypatch.delenv(name)
    (tmp_path / "settings.toml").write_text(f'[store]\nuri = "{tmp_path / "default store"}"\n')
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys, trained_store):
    """Runs a command on the store: its status, stdout and stderr."""

    def run(*arguments, store_uri=trained_store.uri):
        try:
            status = main([*arguments, *([] if store_uri is None else ["--store", store_uri])])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return run


def test_ls(run, trained_store):
    result = run("ls", "studies", "trials")
    assert (result.status, result.err) == (0, "")
    heads = [line for line in result.out.splitlines() if " in " in line]
    assert [head.split()[0] for head in heads] == ["studies", "trials"]
    assert all(name in result.out for name in ("plain", "measured", trials_id(TRIALS[:3]), trials_id([LARGE])))
    listed = json.loads(run("ls", "studies", "trials", "--json").out)
    assert {row["id"]: (row["num_trials"], row["num_failed"]) for row in listed["trials"]} == {
        trials_id(TRIALS[:3]): (3, 1), trials_id([LARGE]): (1, 0),
    }  # fmt: skip
    assert {row["spec.name"] for row in listed["studies"]} == {"plain", "measured"}


def test_show(run):
    shown = json.loads(run("show", trials_id([LARGE]), "--json").out)
    assert shown["trials"]["spec"]["trial_ids"] == [LARGE.target_id]


def test_study_is_the_latest_one_as_a_table(run):
    result = run("study")
    assert (result.status, result.err) == (0, "")
    header, *lines = result.out.splitlines()
    assert header.split()[:4] == ["trial_id", "eta", "batch_size", "temperature"]
    assert [line.split()[0] for line in lines] == IDS
    assert run("study", "latest").out == result.out


@pytest.mark.parametrize("name", ["csv", "json", "parquet"])
def test_study_formats_hold_every_column(run, trained_store, tmp_path, name):
    path = tmp_path / f"trials.{name}"
    result = run("study", "measured", "--format", name, "--output", str(path))
    assert (result.status, result.out, result.err) == (0, "", "")
    readers = {
        "csv": pd.read_csv,
        "json": lambda file: pd.DataFrame(json.loads(file.read_text())),
        "parquet": pd.read_parquet,
    }
    found, table = readers[name](path), load_study(trained_store, IDS, [RUN]).table
    assert list(found) == list(table)
    for column in ("final_loss", "eta", "temperature", "llc", "sharpness"):
        np.testing.assert_allclose(found[column].to_numpy(np.float64), table[column], rtol=1e-14)
    if name != "parquet":
        shown = run("study", "measured", "--format", name)
        assert shown.out == path.read_text()


def chosen(run, *conditions, study="latest"):
    result = run("study", study, "--where", *conditions, "--format", "json")
    assert result.err == ""
    return [row["trial_id"] for row in json.loads(result.out)]


@pytest.mark.parametrize(
    ("conditions", "places"),
    [
        (["batch_size=16"], [0, 1, 2]),
        (["batch_size=16", "eta<=16"], [0, 1]),
        (["eta=1,1e30"], [0, 2, 3]),
        (["temperature<0.5"], [0, 3]),
        (["diverged_at_step=none"], [0, 1, 3]),
        (["diverged_at_step>=1"], [2]),
        (["failure=none"], [0, 1, 3]),
        (["failure=diverged"], [2]),
        (["task.kind=images", "eta>1"], [1, 2]),
        ([f"trial_id={IDS[1]}"], [1]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_where(run, conditions, places):
    assert chosen(run, *conditions) == [IDS[place] for place in places]


def test_studies_are_joined(run, store):
    """Each trial once, with all that any of the studies has measured of it."""
    more = trial(eta=4.0)
    train_batch([more], store)
    publish_study("more", [more.target_id, SMALL.target_id], store, ["losscurve_grid"])
    where = {"store_uri": store.uri}
    rows = json.loads(run("study", "measured", "more", "--format", "json", **where).out)
    assert [row["trial_id"] for row in rows] == [*IDS, more.target_id]
    by_id = {row["trial_id"]: row for row in rows}
    assert by_id[SMALL.target_id]["llc"] is not None
    assert by_id[FAST.target_id]["sharpness"] is not None
    assert by_id[more.target_id]["llc"] is by_id[more.target_id]["sharpness"] is None
    assert {row["trial_id"] for row in json.loads(run("study", "all", "--format", "json", **where).out)} == by_id.keys()
    latest = json.loads(run("study", "--format", "json", **where).out)
    assert {row["trial_id"] for row in latest} == {more.target_id, SMALL.target_id}
    [identity] = store.catalogue("study").query("`spec.name` == 'more'")["id"]
    assert json.loads(run("study", identity[:12], "--format", "json", **where).out) == latest


def test_a_study_of_another_version_is_not_shown(run, store, monkeypatch):
    """Its table has other columns, and its trials were trained otherwise."""
    monkeypatch.setattr("lambda_hat.store.store.ALGORITHM_VERSION", 1)
    publish_study("old", IDS, store, ["heatmap_batch"])
    result = run("study", "old", store_uri=store.uri)
    assert (result.status, result.out) == (2, "")
    assert "was made by version 1. Run it again, or name other studies." in result.err


def test_the_target_loss_of_studies(run, store, tmp_path):
    """That of a study, set or found, holds for selections; of joined ones the one they share, else that of all their trials."""
    more = [trial(batch_size=size, eta=eta) for size in (32, 100, 200) for eta in (1.0, 8.0)]
    for batch in batches(more):
        train_batch(batch, store)
    ids = [spec.target_id for spec in more]
    found = publish_study("found", ids, store, ["heatmap_batch"])
    chosen = publish_study("set", ids, store, ["heatmap_batch"], target_loss=0.09)
    assert found.id != chosen.id
    assert (found.summary["target_loss"], chosen.summary["target_loss"]) == (load_study(store, ids).target_loss, 0.09)

    def shown(*arguments):
        """The loss of the critical batch sizes in a report."""
        result = run("study", *arguments, "--report", "report.html", "--plot", "heatmap_batch", store_uri=store.uri)
        assert (result.status, result.err) == (0, "")
        return re.search(r"of training to a loss of ([0-9.]+),", (tmp_path / "report.html").read_text())[1]

    of_all = load_study(store, [*ids, *IDS]).target_loss
    assert shown("found") == f"{found.summary['target_loss']:.5g}" != shown("set") == "0.09"
    assert shown("set", "--where", "batch_size=100,200,32", "eta=8") == "0.09"
    assert shown("set", "--target-loss", "0.095") == "0.095"
    assert shown("found", "plain") == f"{of_all:.5g}"
    result = run("study", "--target-loss", "-1", store_uri=store.uri)
    assert (result.status, result.out) == (2, "")
    assert "a loss is a positive number; got '-1'" in result.err


def test_plots_of_a_study(run, tmp_path):
    folder = tmp_path / "new" / "figures"
    result = run("study", "--plot", "heatmap_batch", "width_transfer", "--to", str(folder))
    assert result.status == 0
    assert result.out.split() == [str(folder / "heatmap_batch.png")]
    assert (folder / "heatmap_batch.png").read_bytes().startswith(b"\x89PNG")
    why = "it takes 2 values of width and of eta in one setting; found 1 and 3 in all of them"
    assert result.err == f"width_transfer is not drawn: {why}\n"
    result = run("study", "--plot", "width_transfer", "llc", "--to", "figures")
    assert (result.status, result.out) == (2, "")
    assert "takes one that can be drawn; width_transfer is not drawn: it takes 2 values of width" in result.err
    assert not Path("figures").exists()


def test_report_of_a_study(run, tmp_path):
    result = run("study", "--where", "batch_size=16", "--report", "report.html", "--plot", "heatmap_batch")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("report.html: 3 trials of sty_")
    page = (tmp_path / "report.html").read_text()
    assert all((identity in page) == (identity != LARGE.target_id) for identity in IDS)
    assert ": 3 of 4 trials</h1>" in page.replace("\n", "")
    assert "<strong>batch_size=16</strong>" in page
    # By --plot alone none is drawn.
    result = run("study", "--report", "report.html", "--plot")
    assert (result.status, "<img" in (tmp_path / "report.html").read_text()) == (0, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["latset"], ["named by its experiment or its id, sty_...; got 'latset'. Did you mean 'latest'?"]),
        (["sty_0000"], ["'sty_0000' fits none"]),
        (["--where", "etta=1"], ["got 'etta=1'. Did you mean 'eta'?"]),
        (["--where", "eta"], ["A condition is COLUMN=VALUE"]),
        (["--where", "eta="], ["A condition is COLUMN=VALUE"]),
        (["--where", "eta>a"], ["compares a column of numbers with one number"]),
        (["--where", "task.kind>3"], ["compares a column of numbers with one number"]),
        (["--where", "eta=12345"], ["There must be a trial; none fits eta=12345."]),
        (["--format", "parquet"], ["Parquet is binary and needs --output FILE"]),
        (["--plot", "heatmap", "--to", "figures"], ["A plot must be known by name; got 'heatmap'"]),
        (["--plot", "heatmap_batch"], ["--plot chooses plots of a folder or a report; got neither. Add --to DIR"]),
        (["--target-loss", "0.1"], ["--target-loss is of plots and reports; got neither. Add --to DIR"]),
        (["--format", "csv", "--to", "figures"], ["--format is of the table; got csv with --to or --report."]),
        (["--output", "no/such/folder/file.csv"], ["Files must be written where there is permission and room"]),
        (["--report", "no/such/folder/file.html", "--plot", "heatmap_batch"], ["Files must be written"]),
        (["--to", "settings.toml", "--plot", "heatmap_batch"], ["Files must be written"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith(("-", "sty", "lat")) else "",
)  # fmt: skip
def test_malformed_study_commands(run, arguments, words):
    result = run("study", *arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert all(word in result.err for word in words), result.err


def test_a_study_goes_to_one_place(run):
    result = run("study", "--to", "figures", "--report", "report.html")
    assert (result.status, result.out) == (2, "")
    assert "--report: not allowed with argument --to" in result.err


def test_a_store_without_studies(run, tmp_path):
    result = run("study", store_uri=str(tmp_path / "nothing"))
    assert result.status == 2
    assert "There must be a study" in result.err
    assert "flows/batch_size.py" in result.err


def test_a_damaged_study(run, store):
    address = store.manifest(study_address(store.catalogue("study")["id"].iloc[-1])).address
    flip(store, address, "results.parquet")
    result = run("study", store_uri=store.uri)
    assert result.status == 2
    assert result.err.startswith("error: A file must be as its manifest says")


def test_help(run):
    shown = run("study", "--help", store_uri=None)
    assert shown.status == 0
    assert shown.out.count("\n  lambda-hat study") == 4
    assert all(option in shown.out for option in ("--where", "--format", "--plot", "--to", "--report", "--output"))
    assert "process-mnist1m" in run("data", "--help", store_uri=None).out
    shown = run("data", "process-mnist1m", "--help", store_uri=None)
    assert "\n  lambda-hat data process-mnist1m " in shown.out
    assert all(word in shown.out for word in ("ZIP", "labels", "(n, 28, 28)", "MNIST1M_FOLDER", "--output"))


def test_process_mnist1m(run, tmp_path):
    x, y = np.arange(12 * 784).reshape(12, 784).astype(np.uint8), np.arange(12, dtype=np.uint8) % 10
    for part in range(2):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
            for name, array in (("images", x), ("labels", y)):
                with archive.open(f"{name}.npy", "w") as file:
                    np.save(file, array[6 * part : 6 * part + 6])
    result = run("data", "process-mnist1m", "0.zip", "1.zip", store_uri=None)
    assert (result.status, result.out) == (0, "mnist1m.npz\n")
    assert result.err == "1 of 2 zips, 6 images\n2 of 2 zips, 12 images\n"
    with np.load("mnist1m.npz") as found:
        assert sorted(map(bytes, found["x"])) == sorted(map(bytes, x))
        assert sorted(found["y"].tolist()) == sorted(y.tolist())
    for arguments, words in (
        (["none.zip"], "none.zip cannot be read"),
        (["0.zip", "--output", "no/such/folder/it.npz"], "--output must be a file that can be written"),
    ):
        result = run("data", "process-mnist1m", *arguments, store_uri=None)
        assert (result.status, result.out) == (2, "")
        assert words in result.err
