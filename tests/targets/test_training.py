"""The training loop: against Optax and closed forms, cut anywhere, stopped, resumed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import ValidationError

from lambda_hat.compute import chunks
from lambda_hat.compute.chunks import no_progress
from lambda_hat.llc import artifacts
from lambda_hat.store.manifest import target_address
from lambda_hat.store.store import Store
from lambda_hat.targets.networks import ModelSpec, mlp
from lambda_hat.targets.supervised import MlpSpec, TeacherData
from lambda_hat.targets.target import Dataset, Objective
from lambda_hat.targets.training import TrainingSpec, train

pytestmark = pytest.mark.usefixtures("library_promotion")

SPEC = TrainingSpec(num_steps=60, batch_size=8, checkpoint_steps=(0, 13, 40), learning_rate=0.1)


def squared_error(params, dataset):
    return 0.5 * jnp.square(dataset.samples["x"] @ params["w"] - dataset.samples["y"])


OBJECTIVE = Objective(squared_error)


def problem():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 4))
    return {"w": jnp.zeros(4)}, Dataset({"x": x, "y": x @ np.arange(4.0) + rng.standard_normal(30)}, {})


def run(spec, **options):
    return train(spec, OBJECTIVE, *problem(), jax.random.key(0), no_progress, **options)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def one_step_a_chunk(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 1e-9)


def test_a_linear_student_reaches_least_squares():
    spec = MlpSpec(
        model=ModelSpec(depth=0), data=TeacherData(n_data=200, noise_scale=0.5), precision="float64",
        training=TrainingSpec(learning_rate=0.05, num_steps=3000),
    )  # fmt: skip
    target = spec.build()
    x, y = (target.dataset.samples[name] for name in ("x", "y"))
    design = np.column_stack([x, np.ones(len(x))])
    solution, *_ = np.linalg.lstsq(design, y)
    np.testing.assert_allclose(target.params_star["output"]["w"], solution[:-1], atol=1e-8)
    np.testing.assert_allclose(target.params_star["output"]["b"], solution[-1], atol=1e-8)
    assert target.metrics["init_loss"] == pytest.approx(0.5 * np.mean(np.sum((design @ solution - y) ** 2, axis=1)))


def test_one_sgd_step_by_hand():
    """One full-batch step on a linear model, with the gradient written out."""
    spec = MlpSpec(
        model=ModelSpec(depth=0, bias=False), data=TeacherData(n_data=50), precision="float64",
        training=TrainingSpec(optimizer="sgd", learning_rate=0.1, schedule="constant", num_steps=1),
    )  # fmt: skip
    target = spec.build()
    x, y = (target.dataset.samples[name] for name in ("x", "y"))
    initial = mlp(spec.model, 1).init(jax.random.split(jax.random.key(0), 3)[1], x[:1])["output"]["w"]
    expected = initial - 0.1 * x.T @ (x @ initial - y) / len(x)
    np.testing.assert_allclose(target.params_star["output"]["w"], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("fields", "optimizer"),
    [
        ({"optimizer": "sgd", "momentum": 0.9}, optax.sgd(0.02, momentum=0.9)),
        ({"optimizer": "adam", "beta1": 0.8, "beta2": 0.98}, optax.adam(0.02, 0.8, 0.98)),
        ({"optimizer": "adamw", "weight_decay": 0.3}, optax.adamw(0.02, weight_decay=0.3)),
        ({"optimizer": "sgd", "warmup_steps": 4}, optax.sgd(lambda step: 0.02 * jnp.minimum(1.0, (step + 1) / 4))),
        ({"optimizer": "sgd", "schedule": "cosine"}, optax.sgd(optax.cosine_decay_schedule(0.02, 7))),
    ],
)
def test_against_optax(fields, optimizer):
    spec = TrainingSpec(**{"learning_rate": 0.02, "num_steps": 7, "schedule": "constant", **fields})
    params, dataset = problem()
    state = optimizer.init(params)
    for _ in range(7):
        gradient = jax.grad(lambda params: jnp.mean(squared_error(params, dataset)))(params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(run(spec)[0]["w"], params["w"], rtol=1e-7)  # Optax computes its schedules in float32


def test_it_does_not_depend_on_its_chunks(one_step_a_chunk, monkeypatch):
    cut = run(SPEC)
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 10.0)
    whole = run(SPEC)
    assert_equal(cut, whole)
    _, history, checkpoints = whole
    assert history["step"][-1] == 60
    assert history["loss"][-1] < history["loss"][0]
    assert list(checkpoints) == [0, 13, 40]
    assert_equal(checkpoints[0], problem()[0])


def test_a_checkpoint_is_what_training_so_far_gave():
    constant = SPEC.model_copy(update={"schedule": "constant"})
    shorter = constant.model_copy(update={"num_steps": 40})
    assert_equal(run(constant)[2][40], run(shorter)[0])


def test_resuming_gives_the_same_bits(one_step_a_chunk):
    saved = []
    whole = run(SPEC, save=saved.append)
    assert len(saved) > 3
    for unfinished in (saved[0], saved[-1]):
        assert 0 < unfinished.step < 60
        assert_equal(run(SPEC, resume=unfinished), whole)


def test_progress_says_the_latest_loss(one_step_a_chunk, recwarn):
    notes = []
    spec = SPEC.model_copy(update={"learning_rate": 1e200, "optimizer": "sgd"})
    with pytest.raises(FloatingPointError, match="diverged"):
        train(spec, OBJECTIVE, *problem(), jax.random.key(0), lambda *report: notes.append(report[3]))
    assert len(set(notes)) < len(notes)  # the last finite one stays
    assert all("nan" not in note and "inf" not in note for note in notes)
    data = problem()[1]._replace(samples={name: np.full_like(x, np.nan) for name, x in problem()[1].samples.items()})
    with pytest.raises(FloatingPointError):
        train(SPEC, OBJECTIVE, problem()[0], data, jax.random.key(0), lambda *report: notes.append(report[3]))
    assert notes[-1] == "no finite loss"
    assert not recwarn.list


def test_a_state_of_another_program_is_ignored(one_step_a_chunk):
    saved = []
    run(SPEC, save=saved.append)
    other = SPEC.model_copy(update={"optimizer": "sgd"})
    assert_equal(run(other, resume=saved[-1]), run(other))


def test_interrupted_targets_go_on_in_the_store(one_step_a_chunk, tmp_path, monkeypatch):
    spec = MlpSpec(data=TeacherData(n_data=50), training=TrainingSpec(num_steps=40, num_checkpoints=4))
    whole, cut = Store(str(tmp_path / "whole")), Store(str(tmp_path / "cut"))
    artifacts.build_target(spec, whole)

    def stop(done, total, unit, note):
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts.build_target(spec, cut, stop)
    address = target_address(spec.target_id)
    assert cut.load_checkpoint(address) is not None
    steps = []
    artifacts.build_target(spec, cut, lambda done, *_: steps.append(done))
    assert steps[0] > 1
    assert cut.load_checkpoint(address) is None
    for file in whole.manifest(address).files:
        assert cut.read(address, file.name) == whole.read(address, file.name), file.name


def test_early_stop(one_step_a_chunk, monkeypatch):
    spec = SPEC.model_copy(update={"batch_size": None, "checkpoint_steps": (5, 50), "schedule": "constant", "num_steps": 300})
    _, history, _ = run(spec)
    at = int(np.argmax(history["loss"] < history["loss"][0] / 2))  # below 200 steps, every one is recorded
    assert 5 < at < 50
    threshold = float(history["loss"][at]) + 1e-12
    stopping = spec.model_copy(update={"stop_loss": threshold, "num_steps": 200})
    params, history, checkpoints = run(stopping)
    assert len(history["loss"]) == history["step"][-1] < 200
    assert history["loss"][-1] < threshold
    assert (history["loss"][:-1] >= threshold).all()
    assert_equal(checkpoints[50], params)
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 10.0)
    assert_equal(run(stopping), (params, history, checkpoints))


def test_training_that_diverges_says_so():
    spec = MlpSpec(data=TeacherData(n_data=50), training=TrainingSpec(optimizer="sgd", learning_rate=1e6, num_steps=50))
    with pytest.raises(FloatingPointError, match=r"learning_rate=1000000.*Lower training.learning_rate"):
        spec.build()


def test_saved_steps():
    assert TrainingSpec(num_steps=1000, num_checkpoints=4).saved_steps == (1, 10, 100, 1000)
    assert TrainingSpec(num_steps=1000, num_checkpoints=1).saved_steps == (1000,)
    assert TrainingSpec(num_steps=3, num_checkpoints=10).saved_steps == (1, 2, 3)
    assert TrainingSpec(num_steps=9, checkpoint_steps=(0, 9)).saved_steps == (0, 9)
    assert TrainingSpec().saved_steps == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint_steps": (3, 2)}, r"must ascend, from 0 at least to num_steps, 5000, at most; got \[3, 2\]"),
        ({"checkpoint_steps": (5001,)}, "at most; got"),
        ({"checkpoint_steps": (1,), "num_checkpoints": 2}, "give one"),
        ({"momentum": 0.9}, "momentum is a field of sgd; got 0.9 with optimizer=adam"),
        ({"optimizer": "sgd", "beta1": 0.5}, "beta1 is a field of adam and adamw"),
        ({"weight_decay": 0.1}, "weight_decay is a field of adamw"),
    ],
)
def test_specs_that_cannot_be(fields, message):
    with pytest.raises(ValidationError, match=message):
        TrainingSpec(**fields)
