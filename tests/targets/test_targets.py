"""One table over all target families, then what is particular to each."""

from __future__ import annotations

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from lambda_hat.llc import artifacts
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.store import Store
from lambda_hat.targets import data
from lambda_hat.targets.analytic import DeepLinearData, DeepLinearSpec, QuadraticSpec, ReducedRankSpec
from lambda_hat.targets.classification import (
    DigitsCnnSpec,
    DigitsData,
    DigitsSpec,
    FashionMnistCnnSpec,
    FashionMnistData,
    FashionMnistSpec,
)
from lambda_hat.targets.custom import CustomSpec
from lambda_hat.targets.families import AnyTargetSpec
from lambda_hat.targets.modular_addition import ModularAdditionSpec, ModularData, TransformerSpec, transformer
from lambda_hat.targets.networks import CnnSpec
from lambda_hat.targets.policies.decoder import DecoderSpec
from lambda_hat.targets.policies.lora import LoraSpec
from lambda_hat.targets.policies.spec import PolicySpec, RlSpec, WarmStartSpec
from lambda_hat.targets.policies.tasks import ModularTask
from lambda_hat.targets.singular import NormalCrossingData, NormalCrossingSpec, TanhData, TanhSpec
from lambda_hat.targets.superposition import SparseData, SuperpositionSpec
from lambda_hat.targets.supervised import MlpSpec, TeacherData
from lambda_hat.targets.target import OBSERVABLE_SIZE, DataSpec, mean_loss_float64, metrics_at
from lambda_hat.targets.training import TrainingSpec
from lambda_hat.targets.trials.spec import TrialSpec
from lambda_hat.targets.trials.task import ImagesTask

pytestmark = pytest.mark.usefixtures("library_promotion")

SHORT = TrainingSpec(num_steps=50, num_checkpoints=3)
IMAGES = FashionMnistData(n_data=40, n_test=30)


def linear_regression(num_samples=60, scale=1.0, seed=0):
    """A custom target's function."""
    x = np.random.default_rng(seed).standard_normal((num_samples, 3))
    w = np.arange(3.0)

    def loss_fn(params, batch):
        return jnp.square(batch["x"] @ params["w"] - batch["y"])

    return loss_fn, {"w": scale * w}, {"x": x, "y": x @ w}


CASES = {
    "mlp": lambda **k: MlpSpec(data=TeacherData(n_data=300), training=SHORT, **k),
    "digits": lambda **k: DigitsSpec(data=DigitsData(n_data=500, n_test=150), training=SHORT, **k),
    "digits_cnn": lambda **k: DigitsCnnSpec(
        model=CnnSpec(channels=(3, 4)), data=DigitsData(n_data=80, n_test=10), training=SHORT, **k
    ),
    "fashion_mnist": lambda **k: FashionMnistSpec(data=IMAGES, training=SHORT, **k),
    "fashion_mnist_cnn": lambda **k: FashionMnistCnnSpec(model=CnnSpec(channels=(2,)), data=IMAGES, training=SHORT, **k),
    "modular_addition": lambda **k: ModularAdditionSpec(
        model=TransformerSpec(width=8, num_heads=2, mlp_width=8), data=ModularData(modulus=7, n_data=30), training=SHORT, **k
    ),
    "superposition": lambda **k: SuperpositionSpec(data=SparseData(n_data=200, num_features=3), training=SHORT, **k),
    "custom": lambda **k: CustomSpec(path="test_targets:linear_regression", data=DataSpec(n_data=60), **k),
    "trial": lambda **k: TrialSpec(task=ImagesTask(n_data=100, n_test=20), width=6, batch_size=20, num_steps=40, **k),
    "policy": lambda **k: PolicySpec(
        task=ModularTask(modulus=3),
        model=DecoderSpec(width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=8),
        warm_start=WarmStartSpec(batch_size=16, max_steps=20),
        rl=RlSpec(num_steps=6, num_prompts=4, num_completions=2, num_checkpoints=2),
        **k,
    ),
    "quadratic": lambda **k: QuadraticSpec(**k),
    "normal_crossing": lambda **k: NormalCrossingSpec(data=NormalCrossingData(noise_scale=1.0), exponents=(1, 1, 0), **k),
    "dln": lambda **k: DeepLinearSpec(data=DeepLinearData(n_data=2000), rank=2, **k),
    "reduced_rank": lambda **k: ReducedRankSpec(data=DeepLinearData(n_data=2000), **k),
    "tanh": lambda **k: TanhSpec(data=TanhData(n_data=500), **k),
}
family = pytest.mark.parametrize("family", CASES)
TRAINED = [name for name, case in CASES.items() if case().checkpoint_steps]


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    """In place of Fashion-MNIST's files, which need not be installed."""

    def images(part):
        rng = np.random.default_rng(part == "train")
        return rng.random((100, 784), np.float32), rng.integers(0, 10, 100, np.int32)

    monkeypatch.setattr(data, "fashion_mnist", images)


def leaves(tree):
    return jax.tree.leaves(tree)


def losses_and_gradient(objective):
    """One program: (params, dataset) -> the samples' losses and the gradient of their mean."""

    def mean_loss(params, dataset):
        losses = objective.per_sample_loss(params, dataset)
        return jnp.mean(losses), losses

    @jax.jit
    def both(params, dataset):
        gradient, losses = jax.grad(mean_loss, has_aux=True)(params, dataset)
        return losses, gradient

    return both


@functools.cache
def built(family, precision="float32"):
    return CASES[family](precision=precision).build()


def test_every_family_has_a_case():
    families = {spec.model_fields["family"].default for spec in typing.get_args(typing.get_args(AnyTargetSpec)[0])}
    assert families == set(CASES)


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        pytest.param(name, precision, marks=pytest.mark.slow if (name, precision) == ("policy", "float64") else ())
        for name in CASES
        for precision in ("float32", "float64")
    ],
)
def test_conformance(family, precision):
    target = built(family, precision)
    spec, objective, dataset = target.spec, target.spec.objective(), target.dataset
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == precision for leaf in leaves(target.params_star))
    assert target.metrics["num_params"] == sum(leaf.size for leaf in leaves(target.params_star))
    n = target.metrics["num_data"]
    assert n == spec.num_data
    assert all(array.shape[0] == n for array in dataset.samples.values())
    assert all(array.dtype in (precision, np.int32, bool) for array in leaves(dataset))

    with jax.enable_x64(precision == "float64"), jax.numpy_dtype_promotion("strict"):
        losses, gradient = losses_and_gradient(objective)(target.params_star, dataset)
        losses = np.asarray(losses)
    assert losses.shape == (n,)
    assert losses.dtype == precision
    assert all(np.isfinite(leaf).all() for leaf in leaves(gradient))
    tolerance = 1e-4 if precision == "float32" else 1e-10
    assert target.metrics["init_loss"] == pytest.approx(losses.mean(dtype=np.float64), rel=tolerance, abs=1e-12)

    if objective.loss is not None:  # the closed form is the mean, less a constant
        rng = np.random.default_rng(1)
        away = jax.tree.map(lambda x: x + rng.normal(0, 0.5, x.shape).astype(x.dtype), target.params_star)
        with jax.enable_x64(precision == "float64"):
            closed = float(objective.loss(away, dataset) - objective.loss(target.params_star, dataset))
            mean = float(np.mean(np.asarray(objective.per_sample_loss(away, dataset)) - losses, dtype=np.float64))
        assert closed == pytest.approx(mean, rel=1e-4 if precision == "float32" else 1e-9)

    for name, observable in target.observables.items():
        assert 1 <= observable.num_data <= OBSERVABLE_SIZE, name
        assert {key: array.shape[1:] for key, array in observable.samples.items()} == {
            key: array.shape[1:] for key, array in dataset.samples.items()
        }
        assert leaves(observable.constants) == leaves(dataset.constants) or observable.constants is dataset.constants


@family
def test_building_twice_gives_the_same_arrays(family):
    first, again, other = built(family), CASES[family]().build(), CASES[family](seed=1).build()
    arrays = [leaves((target.params_star, target.dataset, target.observables)) for target in (first, again, other)]
    for a, b in zip(arrays[0], arrays[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(arrays[0], arrays[2], strict=True))


@family
def test_the_store_gives_back_what_was_built(family, tmp_path):
    target, store = built(family), Store(str(tmp_path))
    spec = target.spec
    artifacts.build_target(spec, store)
    loaded = artifacts.load_target(store, spec.target_id)
    assert loaded.spec == spec
    for name in ("params_star", "dataset", "observables", "history"):
        jax.tree.map(np.testing.assert_array_equal, getattr(loaded, name), getattr(target, name))
    assert loaded.metrics["init_loss"] == target.metrics["init_loss"]
    for step in spec.checkpoint_steps:
        at_step = artifacts.load_target(store, spec.target_id, step)
        jax.tree.map(np.testing.assert_array_equal, at_step.params_star, target.checkpoints[step])
        assert at_step.spec.checkpoint == step


@pytest.mark.parametrize("family", TRAINED)
def test_checkpoints_are_measured(family):
    """Each is a target of its own; the last log-spaced one is w*."""
    target = built(family)
    steps = [0, 6] if family == "policy" else [1, 7, 50]
    assert list(target.checkpoints) == [values["step"] for values in target.metrics["checkpoints"]] == steps
    for step in steps:
        metrics = metrics_at(target.metrics, step)
        objective = target.spec.objective()
        assert metrics["init_loss"] == mean_loss_float64(objective, target.checkpoints[step], target.dataset)
        assert metrics["num_params"] == target.metrics["num_params"]
    assert {**target.metrics, "step": steps[-1]} == metrics_at(target.metrics, steps[-1])
    assert metrics_at(target.metrics, None) == target.metrics
    if family != "policy":  # which minimises another loss
        assert metrics_at(target.metrics, 1)["init_loss"] > metrics_at(target.metrics, 50)["init_loss"]
    jax.tree.map(np.testing.assert_array_equal, target.checkpoints[steps[-1]], target.params_star)


def test_a_checkpoint_is_no_other_target():
    spec = CASES["mlp"]()
    assert CASES["mlp"](checkpoint=7).target_id == spec.target_id
    assert CASES["mlp"](checkpoint=7) != spec


def test_a_checkpoint_that_is_not_saved(tmp_path):
    with pytest.raises(ValidationError, match=r"got 8, the nearest saved: 7, 1, 50; save others with training"):
        CASES["mlp"](checkpoint=8)
    with pytest.raises(ValidationError, match="got 8, the nearest saved: none"):
        QuadraticSpec(checkpoint=8)
    spec, store = CASES["superposition"](), Store(str(tmp_path))
    artifacts.build_target(spec, store)
    with pytest.raises(InvalidInput, match="got 8, the nearest saved: 7, 1, 50"):
        artifacts.load_target(store, spec.target_id, 8)


@family
def test_equal_programs_share_their_objective(family):
    assert CASES[family]().objective() is CASES[family]().objective()
    if family != "custom":
        assert CASES[family](seed=1).objective() is CASES[family](seed=2).objective()


def test_mean_loss_is_float64_and_chunked():
    target = built("mlp")
    objective = target.spec.objective()
    x, y = (target.dataset.samples[name].astype(np.float64) for name in ("x", "y"))
    h = x
    for layer in ("hidden_0", "hidden_1"):
        h = np.maximum(h @ target.params_star[layer]["w"].astype(np.float64) + target.params_star[layer]["b"], 0)
    residual = h @ target.params_star["output"]["w"].astype(np.float64) + target.params_star["output"]["b"] - y
    expected = 0.5 * np.mean(np.sum(residual**2, axis=1))
    for chunk_size in (7, 100, 4096):
        assert mean_loss_float64(objective, target.params_star, target.dataset, chunk_size) == pytest.approx(
            expected, rel=1e-13
        )


# --- Families with an exact llc ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("spec", "llc", "multiplicity"),
    [
        (NormalCrossingSpec(exponents=(1, 1)), "1/2", 2),
        (NormalCrossingSpec(exponents=(1, 3, 0)), "1/6", 1),
        (TanhSpec(hidden=4), "1", 2),
        (ReducedRankSpec(input_dim=5, hidden_dim=3, output_dim=5, rank=0, data=DeepLinearData(n_data=100)), "13/2", 2),
        (DeepLinearSpec(widths=(5, 5, 5, 5), rank=0, data=DeepLinearData(n_data=100)), "17/2", 3),
    ],
)
def test_exact_llc_is_among_the_metrics(spec, llc, multiplicity):
    metrics = spec.build().metrics
    assert (metrics["true_llc"], metrics["multiplicity"]) == (llc, multiplicity)
    assert metrics["init_loss"] < 1e-12


def test_normal_crossing_samples_average_to_the_monomial():
    target = NormalCrossingSpec(
        data=NormalCrossingData(n_data=50, noise_scale=2.0), exponents=(1, 2), precision="float64"
    ).build()
    losses = np.asarray(target.spec.objective().per_sample_loss({"w": np.array([0.5, -0.8])}, target.dataset))
    assert losses.std() > 0.1
    assert losses.mean() == pytest.approx(0.5**2 * 0.8**4, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormalCrossingSpec(exponents=(0, 0)), "one exponent at least must be above 0"),
        (lambda: TanhSpec(hidden=3, data=TanhData(n_data=29)), "at least ten times the hidden units, 30"),
        (lambda: ReducedRankSpec(rank=5), "rank must be at most the smallest width, 4; got rank=5"),
        (lambda: DigitsSpec(data=DigitsData(n_data=1700)), "at most 1797 together; got 1700 and 297"),
        (lambda: ModularAdditionSpec(data=ModularData(modulus=5, n_data=25)), r"below modulus\^2, 25"),
        (lambda: TransformerSpec(width=6, num_heads=4), "multiple of num_heads, 4; got 6"),
        (lambda: CustomSpec(path="module.function"), "pattern"),
    ],
)
def test_specs_that_cannot_be(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


# --- Trained families --------------------------------------------------------------------------------------------------


def test_without_a_teacher_labels_are_noise():
    target = MlpSpec(data=TeacherData(n_data=2000, teacher=None, noise_scale=0.3), training=SHORT).build()
    y = target.dataset.samples["y"]
    assert y.std() == pytest.approx(0.3, rel=0.1)
    assert target.metrics["noise_loss"] == pytest.approx(0.5 * np.mean(y**2, dtype=np.float64), rel=1e-6)


def test_digits_are_learned():
    metrics = DigitsSpec(training=TrainingSpec(num_steps=500)).build().metrics
    assert metrics["train_accuracy"] > 0.99
    assert metrics["test_accuracy"] > 0.9


def test_observables_of_classes_hold_their_class():
    target = built("digits")
    assert target.observables["test"].num_data == OBSERVABLE_SIZE
    for label in range(10):
        samples = target.observables[f"class_{label}"].samples
        assert (samples["y"] == label).all()
        assert all((target.dataset.samples["x"] == image).all(axis=1).any() for image in samples["x"][:3])


def test_transformer_is_the_attention_it_stands_for():
    """Against attention written out over all three positions."""
    p = 5
    params = TransformerSpec(width=8, num_heads=2, mlp_width=6).init((0, 0), p)
    a, b = np.array([0, 1, 4]), np.array([3, 3, 2])
    embedding = params["embedding"]
    x = embedding["token"][np.stack([a, b, np.full(3, p)], axis=1)] + embedding["position"]
    stream = x.copy()
    for h in range(2):
        head = params[f"head_{h}"]
        scores = (x @ head["query"]) @ (x @ head["key"]).transpose(0, 2, 1) / np.sqrt(4)
        scores[:, np.triu_indices(3, 1)[0], np.triu_indices(3, 1)[1]] = -np.inf
        weights = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)
        stream = stream + weights @ (x @ head["value"]) @ head["output"]
    mlp = params["mlp"]
    stream = stream + np.maximum(stream @ mlp["in_w"] + mlp["in_b"], 0) @ mlp["out_w"] + mlp["out_b"]
    expected = (stream @ params["unembedding"]["w"])[:, -1]
    np.testing.assert_allclose(transformer(params, a, b), expected, rtol=1e-12)


def test_modular_addition_splits_all_pairs():
    target = built("modular_addition")
    samples = target.dataset.samples
    test = target.observables["test"].samples
    pairs = {
        *zip(*(samples[name].tolist() for name in "ab"), strict=True),
        *zip(*(test[name].tolist() for name in "ab"), strict=True),
    }
    assert len(pairs) == 49
    np.testing.assert_array_equal(samples["y"], (samples["a"] + samples["b"]) % 7)


@pytest.mark.slow
def test_modular_addition_groks():
    """The default: memorised by step 300, generalised by step 1600."""
    training = ModularAdditionSpec().training.model_copy(update={"checkpoint_steps": (300, 1600)})
    target = ModularAdditionSpec(training=training).build()
    early, late = (metrics_at(target.metrics, step) for step in (300, 1600))
    assert early["train_accuracy"] > 0.99
    assert early["test_accuracy"] < 0.6
    assert late["test_accuracy"] > 0.95


def test_superposition_loss_by_hand():
    target = SuperpositionSpec(data=SparseData(n_data=20, num_features=3), training=SHORT, precision="float64").build()
    w, b = (target.params_star[name] for name in "wb")
    x = target.dataset.samples["x"]
    recovered = np.maximum(x @ w.T @ w + b, 0)
    expected = 0.5 * np.mean(np.sum(np.array([1, 0.9, 0.81]) * (recovered - x) ** 2, axis=1))
    assert target.metrics["init_loss"] == pytest.approx(expected, rel=1e-12)
    alone = target.observables["feature_1"].samples["x"]
    assert (alone[:, [0, 2]] == 0).all()
    assert (alone[:, 1] > 0).all()


# --- Custom ------------------------------------------------------------------------------------------------------------


def nested_mean_loss():
    """Parameters and data as tuples and lists, a mean loss, and an integer that stays."""
    x = np.ones((4, 2))

    def loss_fn(params, batch):
        [(w, inner), power], (x, y) = params, batch
        return jnp.mean((x @ w + inner["b"] - y) ** power)

    return loss_fn, [(np.ones(2), {"b": np.array(1.0)}), 2], (x, np.zeros(4))


def test_custom_pytrees_are_seen_as_they_were_given(tmp_path):
    spec = CustomSpec(path="test_targets:nested_mean_loss", data=DataSpec(n_data=4))
    artifacts.build_target(spec, Store(str(tmp_path)))
    target = artifacts.load_target(Store(str(tmp_path)), spec.target_id)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in target.params_star.items()} == {
        "0/0": ((2,), np.float32), "0/1/b": ((), np.float32),
    }  # fmt: skip
    losses = spec.objective().per_sample_loss(target.params_star, target.dataset)
    np.testing.assert_array_equal(losses, np.full(4, 9.0, np.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "no_such_module:f"}, "a function Python can import.*No module named.*PYTHONPATH"),
        ({"path": "test_targets:no_such_function"}, "has no attribute"),
        ({"arguments": {"number": 3}}, "unexpected keyword argument 'number'"),
        ({"arguments": {"num_samples": 50}}, r"returns, 50; got 60. Set data.n_data=50"),
        (
            {"path": "test_targets:leaves", "arguments": {"tree": 3}},
            "must return .loss_fn, params, data., or with weights as a fourth; got list",
        ),
    ],
)
def test_custom_that_does_not_work(fields, message):
    with pytest.raises(InvalidInput, match=message):
        CustomSpec(**{"path": "test_targets:linear_regression", "data": DataSpec(n_data=60), **fields}).build()


def test_custom_ids_follow_path_arguments_and_version():
    base = CASES["custom"]()
    others = [{"path": "other:f"}, {"arguments": {"scale": 2.0}}, {"version": "2"}]
    ids = {base.target_id, *(base.model_copy(update=other).target_id for other in others)}
    assert len(ids) == 4


@family
def test_observables_are_named_without_building(family):
    spec = CASES[family]()
    assert set(spec.build().observables) == set(spec.observable_names)


@family
def test_what_a_target_is_made_of_is_known_without_building_it(family):
    spec = CASES[family]()
    built, known = spec.build(), spec.param_shapes()
    assert jax.tree.structure(known) == jax.tree.structure(built.params_star)
    for shape, leaf in zip(leaves(known), leaves(built.params_star), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
    if family not in ("custom", "policy"):
        assert spec.sample_size <= sum(np.size(array[0]) for array in built.dataset.samples.values())
        assert spec.sample_size > 0


def test_shapes_of_adapters():
    spec = CASES["policy"](lora=LoraSpec(rank=2), precision="float64")
    built = spec.build()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), spec.param_shapes()) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), built.params_star
    )
