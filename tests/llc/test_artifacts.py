"""What a run's diagnosis is made of, and what a sweep publishes."""

from __future__ import annotations

import importlib
import json
import sys

import jax
import numpy as np
import pytest
from test_estimates import iid, trace_of

from lambda_hat.llc import artifacts, sampling
from lambda_hat.llc.run import RunSpec
from lambda_hat.samplers.sgld import SgldSpec
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store import manifest
from lambda_hat.store.arrays import pack_arrays
from lambda_hat.store.manifest import diagnosis_address, run_address, sweep_address, target_address
from lambda_hat.store.store import Store
from lambda_hat.targets import custom
from lambda_hat.targets.analytic import QuadraticSpec

CHAINS, DRAWS = 2, 300


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def spec_of(target=None, posterior=None, **sampler):
    fields = {"kind": "hmc", "num_chains": CHAINS, "num_draws": DRAWS, "num_burnin_steps": 20, **sampler}
    return RunSpec.from_dict(
        {"target": target or {"family": "quadratic", "dim": 4}, "posterior": posterior or {}, "sampler": fields}
    )


def sampled(store, spec, **fields):
    """Publishes draws for the run, as sampling does."""
    with jax.numpy_dtype_promotion("standard"):
        artifacts.build_target(spec.target, store)
    draws = trace_of(iid(shape=(CHAINS, 20 + DRAWS)), **fields).draws
    counts = dict(zip(spec.sampler.observables, (3, 2, 4), strict=False))
    store.publish(
        run_address(spec.target_id, spec.run_id), {"trace.npz": pack_arrays(draws)}, spec=spec.model_dump(mode="json"),
        summary={"seconds": {"compile": 0.0, "sampling": 1.0}, "observables": counts},
    )  # fmt: skip
    return spec


def test_observables_keep_the_order_of_the_run(store):
    """A manifest sorts its keys; the samples of `observed` lie in the order the run names their datasets in."""
    spec = spec_of({"family": "digits"}, observables=["train", "test", "class_1"])
    steps = np.repeat([1.0, 20.0, 300.0], (3, 2, 4)) * np.ones((CHAINS, 20 + DRAWS, 1))
    sampled(store, spec, observed=steps)
    trace = artifacts.load_trace(store, spec)
    assert list(trace.observables.items()) == [("train", 3), ("test", 2), ("class_1", 4)]
    found = artifacts.diagnose_run(spec, store).summary["llc_by_dataset"]
    found = {name: of["llc"] / spec.nbeta for name, of in found.items()}
    assert found == pytest.approx({"train": 1, "test": 20, "class_1": 300})


def test_a_masked_run_has_the_parameters_that_move(store):
    """Their number bounds the llc, and the exact value of all parameters is not theirs."""
    net = {"family": "dln", "widths": [3, 2, 3], "rank": 1, "data": {"n_data": 300}}
    of_all = artifacts.diagnose_run(sampled(store, spec_of(net)), store).summary
    masked = artifacts.diagnose_run(sampled(store, spec_of(net, {"parameters": ["layer_0"]})), store).summary
    assert (of_all["num_params"], masked["num_params"]) == (12, 6)
    assert of_all["true_llc"] is not None
    assert masked["true_llc"] is masked["relative_error"] is None


def test_a_checkpoint_is_diagnosed_with_its_own_metrics(store):
    net = {
        "family": "mlp", "model": {"depth": 1, "width": 2}, "data": {"n_data": 50, "input_dim": 2},
        "training": {"num_steps": 50, "checkpoint_steps": [0, 50]},
    }  # fmt: skip
    first, last = (sampled(store, spec_of(net | {"checkpoint": step})) for step in (0, None))
    assert first.target_id == last.target_id
    losses = [artifacts.diagnose_run(spec, store).summary["init_loss"] for spec in (first, last)]
    assert losses[0] > losses[1] == store.manifest(target_address(last.target_id)).summary["init_loss"]
    files = [file.name for file in artifacts.publish_sweep([first, last], store).files]
    assert f"llc_over_training-{last.target_id}.png" in files


def test_a_sweep_publishes_its_report(store):
    specs = [sampled(store, spec_of({"family": "quadratic", "dim": dim})) for dim in (4, 8)]
    for spec in specs:
        artifacts.diagnose_run(spec, store)
    published = artifacts.publish_sweep(specs, store)
    names = {f"llc_convergence-{spec.target_id}.png" for spec in specs} | {"llc_vs_true.png", "results.json", "report.html"}
    assert {file.name for file in published.files} == names
    page = store.read(published.address, "report.html").decode()
    assert all(f'id="{spec.run_id}"' in page for spec in specs)
    assert artifacts.publish_sweep(specs, store) == published


def test_a_new_version_diagnoses_anew_and_keeps_the_old(store, monkeypatch):
    spec = sampled(store, spec_of())
    old = artifacts.diagnose_run(spec, store)
    old_sweep = artifacts.publish_sweep([spec], store).id
    assert artifacts.diagnose_run(spec, store) == old
    assert "/diagnosis-v" in store.url(old.address, "result.json")
    folder = f"targets/{{target_id}}/runs/{{id}}/diagnosis-v{manifest.DIAGNOSIS_VERSION + 1}"
    monkeypatch.setitem(manifest.KINDS, "diagnosis", ("run", folder))
    monkeypatch.setattr(artifacts, "DIAGNOSIS_VERSION", manifest.DIAGNOSIS_VERSION + 1)
    assert not store.exists(diagnosis_address(spec.target_id, spec.run_id))
    assert len(store.catalogue("diagnosis")) == 0
    new = artifacts.diagnose_run(spec, store)
    assert (new.attempt != old.attempt, new.summary) == (True, old.summary)
    assert artifacts.publish_sweep([spec], store).id != old_sweep
    assert store.exists(sweep_address(old_sweep))


def test_results_of_a_sweep_are_the_diagnoses(store):
    spec = sampled(store, spec_of())
    found = artifacts.diagnose_run(spec, store).summary
    published = artifacts.publish_sweep([spec], store)
    (row,) = json.loads(store.read(published.address, "results.json"))
    assert row == {"target_id": spec.target_id, "run_id": spec.run_id} | found


def test_runs_interrupted_apart_are_not_mixed_when_they_go_on_together(tmp_path):
    """Both were in lane 0 of their own programs, and saved at the same draw."""
    store = Store(str(tmp_path / "store"))
    target = QuadraticSpec(dim=3)
    sampler = SgldSpec(step_size=1e-3, num_draws=30, num_burnin_steps=20, num_steps_bw_draws=2)
    specs = [RunSpec(target=target, sampler=sampler.model_copy(update={"seed": seed})) for seed in (1, 2)]
    artifacts.build_target(target, store)

    class Stop(Exception):
        pass

    def stop(*report):
        raise Stop

    for spec in specs:
        with pytest.raises(Stop):
            artifacts.sample_batch([spec], store, stop)
    artifacts.sample_batch(specs, store)
    apart = Store(str(tmp_path / "apart"))
    artifacts.build_target(target, apart)
    for spec in specs:
        artifacts.sample_batch([spec], apart)
        resumed, whole = (artifacts.load_trace(where, spec) for where in (store, apart))
        np.testing.assert_array_equal(resumed.draws["loss_difference"], whole.draws["loss_difference"])


def test_a_batch_too_wide_is_sampled_in_groups_that_each_go_on(tmp_path, monkeypatch):
    """Five runs, two at once: stopped in the second group, the first is finished, and no number depends on the stop."""
    monkeypatch.setattr(sampling, "CACHE_BYTES", 2 * 4 * 3 * 4)  # two runs of four chains of three float32
    target = QuadraticSpec(dim=3)
    sampler = SgldSpec(step_size=1e-3, num_draws=30, num_burnin_steps=20, num_steps_bw_draws=2)
    specs = [RunSpec(target=target, sampler=sampler.model_copy(update={"seed": seed})) for seed in range(5)]
    store, undisturbed = (Store(str(tmp_path / name)) for name in ("store", "undisturbed"))
    for where in (store, undisturbed):
        artifacts.build_target(target, where)
    artifacts.sample_batch(specs, undisturbed)

    def stop(done, total, *rest):
        if done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts.sample_batch(specs, store, stop)
    assert [store.exists(run_address(spec.target_id, spec.run_id)) for spec in specs] == [True, True, False, False, False]
    artifacts.sample_batch(specs, store)
    for spec in specs:
        resumed, whole = (artifacts.load_trace(where, spec) for where in (store, undisturbed))
        np.testing.assert_array_equal(resumed.draws["loss_difference"], whole.draws["loss_difference"])


def test_a_custom_function_that_has_changed_is_refused(store, tmp_path, monkeypatch):
    content = """
import numpy as np

def target():
    return lambda params, batch: SCALE * (batch["x"] @ params["w"]), {"w": np.ones(2)}, {"x": np.ones((5, 2))}
"""
    monkeypatch.syspath_prepend(tmp_path)
    spec = spec_of({"family": "custom", "path": "changing_target:target", "data": {"n_data": 5}})
    for scale in (1, 30):  # of another length: compiled modules are told apart by their seconds and sizes
        (tmp_path / "changing_target.py").write_text(content.replace("SCALE", str(scale)))
        monkeypatch.delitem(sys.modules, "changing_target", raising=False)
        importlib.invalidate_caches()
        custom._call.cache_clear()  # as in another process
        if scale == 1:
            artifacts.build_target(spec.target, store)
    with pytest.raises(InvalidInput, match=r"gave when the target was built, 2; changing_target:target now gives 60"):
        artifacts.sample_batch([spec], store)
