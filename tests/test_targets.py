"""One table over all target families, then what is particular to each."""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lambda_hat import chunks
from lambda_hat.networks import ModelSpec, mlp
from lambda_hat.target import mean_loss_float64
from lambda_hat.targets import AnyTargetSpec
from lambda_hat.targets.analytic import DeepLinearData, DeepLinearSpec, QuadraticSpec
from lambda_hat.targets.classification import DigitsData, DigitsSpec
from lambda_hat.targets.supervised import MlpSpec, TeacherData
from lambda_hat.training import TrainingSpec

pytestmark = pytest.mark.usefixtures("library_promotion")

SHORT = TrainingSpec(num_steps=200)
CASES = {
    "mlp": lambda **k: MlpSpec(data=TeacherData(n_data=300), training=SHORT, **k),
    "digits": lambda **k: DigitsSpec(data=DigitsData(n_data=500), training=SHORT, **k),
    "quadratic": lambda **k: QuadraticSpec(**k),
    "dln": lambda **k: DeepLinearSpec(data=DeepLinearData(n_data=2000), rank=2, **k),
}
family = pytest.mark.parametrize("family", CASES)


def test_every_family_has_a_case():
    families = {spec.model_fields["family"].default for spec in typing.get_args(typing.get_args(AnyTargetSpec)[0])}
    assert families == set(CASES)


@family
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_conformance(family, precision):
    spec = CASES[family](precision=precision)
    target = spec.build()
    objective, dataset = spec.objective(), target.dataset
    leaves = jax.tree.leaves(target.params_star)
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == precision for leaf in leaves)
    assert target.metrics["num_params"] == sum(leaf.size for leaf in leaves)
    n = target.metrics["num_data"]
    assert all(array.shape[0] == n for array in dataset.samples.values())

    with jax.enable_x64(precision == "float64"), jax.numpy_dtype_promotion("strict"):
        losses = np.asarray(jax.jit(objective.per_sample_loss)(target.params_star, dataset))
    assert losses.shape == (n,)
    assert losses.dtype == precision
    tolerance = 1e-4 if precision == "float32" else 1e-10
    assert target.metrics["init_loss"] == pytest.approx(losses.mean(dtype=np.float64), rel=tolerance, abs=1e-12)

    if objective.loss is not None:  # the closed form is the mean, less a constant
        rng = np.random.default_rng(0)
        away = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype), target.params_star)
        with jax.enable_x64(precision == "float64"):
            closed = float(objective.loss(away, dataset) - objective.loss(target.params_star, dataset))
            mean = float(np.mean(np.asarray(objective.per_sample_loss(away, dataset)) - losses, dtype=np.float64))
        assert closed == pytest.approx(mean, rel=1e-4 if precision == "float32" else 1e-9)


@family
def test_building_twice_gives_the_same_arrays(family):
    first, again, other = CASES[family]().build(), CASES[family]().build(), CASES[family](seed=1).build()
    for a, b in zip(
        jax.tree.leaves((first.params_star, first.dataset)), jax.tree.leaves((again.params_star, again.dataset)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(first.params_star), jax.tree.leaves(other.params_star), strict=True)
    )


def test_equal_programs_share_their_objective():
    assert MlpSpec(seed=1).objective() is MlpSpec(seed=2).objective()
    assert MlpSpec().objective() is not MlpSpec(model=ModelSpec(width=3)).objective()


@pytest.mark.parametrize(("widths", "rank"), [((5, 3, 5), 0), ((5, 3, 5), 1), ((10, 10, 10), 5), ((4, 6, 5, 3), 3)])
def test_deep_linear_layers_have_exactly_the_rank(widths, rank):
    """The condition under which the exact llc is the local one (trap A)."""
    target = DeepLinearSpec(widths=widths, rank=rank, data=DeepLinearData(n_data=100), precision="float64").build()
    layers = [target.params_star[f"layer_{s}"] for s in range(len(widths) - 1)]
    assert [layer.shape for layer in layers] == list(zip(widths[1:], widths[:-1], strict=True))
    for matrix in (*layers, np.asarray(target.dataset.constants["teacher"])):
        assert np.linalg.matrix_rank(matrix) == rank
    assert target.metrics["init_loss"] < 1e-25
    if rank == 0:
        assert all((layer == 0).all() for layer in layers)


def test_quadratic_star_is_the_minimum():
    target = QuadraticSpec(precision="float64").build()
    objective = target.spec.objective()
    gradient = jax.grad(lambda p: jnp.mean(objective.per_sample_loss(p, target.dataset)))(target.params_star)
    assert np.abs(gradient["w"]).max() < 1e-12


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


def test_training_does_not_depend_on_its_chunks(monkeypatch):
    spec = MlpSpec(data=TeacherData(n_data=100), training=TrainingSpec(num_steps=300, batch_size=32))
    whole = spec.build()
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 1e-9)  # one step a chunk
    cut = spec.build()
    for a, b in zip(jax.tree.leaves(whole.params_star), jax.tree.leaves(cut.params_star), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole.history["loss"], cut.history["loss"])
    assert whole.history["step"][-1] == 300
    assert whole.history["loss"][-1] < whole.history["loss"][0]


def test_training_that_diverges_says_so():
    spec = MlpSpec(data=TeacherData(n_data=50), training=TrainingSpec(optimizer="sgd", learning_rate=1e6, num_steps=50))
    with pytest.raises(FloatingPointError, match=r"learning_rate=1000000.*Lower training.learning_rate"):
        spec.build()


def test_digits_are_learned():
    metrics = DigitsSpec(training=TrainingSpec(num_steps=500)).build().metrics
    assert metrics["train_accuracy"] > 0.99
    assert metrics["test_accuracy"] > 0.9


def test_mean_loss_is_float64_and_chunked():
    target = CASES["mlp"]().build()
    objective = target.spec.objective()
    x, y = (target.dataset.samples[name].astype(np.float64) for name in ("x", "y"))
    h = x
    for layer in ("hidden_0", "hidden_1"):
        h = np.maximum(h @ target.params_star[layer]["w"].astype(np.float64) + target.params_star[layer]["b"], 0)
    residual = h @ target.params_star["output"]["w"].astype(np.float64) + target.params_star["output"]["b"] - y
    expected = 0.5 * np.mean(np.sum(residual**2, axis=1))
    for chunk_size in (7, 100, 65_536):
        assert mean_loss_float64(objective, target.params_star, target.dataset, chunk_size) == pytest.approx(
            expected, rel=1e-13
        )
