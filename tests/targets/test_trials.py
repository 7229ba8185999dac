"""Trials train as the equations say, alone or with others, in one go or in several, and are targets like any other."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from lambda_hat.compute import chunks
from lambda_hat.llc import artifacts
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.store import Store
from lambda_hat.targets.families import AnyTargetSpec
from lambda_hat.targets.trials import ImagesTask, PolynomialTask, TeacherTask, TrialSpec, to_target, train_trials
from lambda_hat.targets.trials.engine import _failure, batch_indices, point_steps
from lambda_hat.targets.trials.network import activations, forward, init_params
from lambda_hat.targets.trials.program import ADAM_EPS, fresh_inputs

SMALL = ImagesTask(n_data=48, n_test=20)
DRAW_FRESH = jax.jit(fresh_inputs, static_argnums=(3, 4, 5))
CUBIC = PolynomialTask(input_dim=6, degree=3, n_data=40, n_test=20)


def trial(**fields):
    """A short trial of a small network, in float64."""
    default = {
        "task": SMALL,
        "precision": "float64",
        "width": 10,
        "batch_size": 16,
        "num_steps": 7,
        "seed": 3,
        "points_per_doubling": 500,
    }
    return TrialSpec(**(default | fields))


def layers(weights, x):
    """Outputs of the layers by NumPy, each (B, units), of weights (in, out)."""
    outputs = [x]
    for weight in weights[:-1]:
        outputs.append(np.maximum(outputs[-1] @ weight / np.sqrt(outputs[-1].dtype.type(weight.shape[0])), 0))
    return [*outputs, outputs[-1] @ weights[-1]]


def batches(spec):
    data = spec.task.load("float64")
    if not spec.task.fresh:
        for indices in batch_indices(spec, spec.seed, 0, spec.total_steps):
            yield data.x[indices], data.y[indices]
    else:
        with jax.enable_x64(True):
            for step in range(spec.total_steps):
                size = (spec.batch_size, spec.task.input_dim, np.dtype(np.float64))
                x = np.asarray(DRAW_FRESH(spec.task.seed, spec.seed, np.asarray([step]), *size))
                yield x, np.asarray(spec.task.label(spec.task.teacher(), x))


def train_by_hand(spec, dtype=np.float64):
    """The weights, (in, out), and the loss of every step, by NumPy."""
    weights = [layer["w"].astype(dtype) for layer in init_params((spec.seed, 0), spec.widths, "float64").values()]
    initial = [weight.copy() for weight in weights]
    first, second = ([np.zeros_like(weight) for weight in weights] for _ in range(2))
    scale, losses = dtype(spec.scale), []
    for step, (x, y) in enumerate(batches(spec)):
        x, y = x.astype(dtype), y.astype(dtype)
        outputs = layers(weights, x)
        prediction = scale * (outputs[-1] - layers(initial, x)[-1])
        if spec.loss == "mse":
            losses.append(np.mean((prediction - y) ** 2))
            delta = 2 * (prediction - y) / y.size
        else:
            log_sum = np.log(np.sum(np.exp(prediction), axis=1, keepdims=True))
            losses.append(np.mean(np.sum(y * (log_sum - prediction), axis=1)))
            delta = (np.exp(prediction - log_sum) - y) / len(y)
        delta = delta * scale
        gradients = []
        for layer in reversed(range(spec.depth)):
            own = dtype(1) if layer == spec.depth - 1 else 1 / np.sqrt(dtype(weights[layer].shape[0]))
            gradients.insert(0, own * outputs[layer].T @ delta)
            delta = own * (delta @ weights[layer].T) * (outputs[layer] > 0)
        for layer, gradient in enumerate(gradients):
            if spec.optimizer == "sgd":
                update = first[layer] = spec.momentum * first[layer] + gradient
            else:
                first[layer] = spec.beta1 * first[layer] + (1 - spec.beta1) * gradient
                second[layer] = spec.beta2 * second[layer] + (1 - spec.beta2) * gradient**2
                unbiased = second[layer] / (1 - spec.beta2 ** (step + 1))
                update = first[layer] / (1 - spec.beta1 ** (step + 1)) / (np.sqrt(unbiased) + ADAM_EPS)
            weights[layer] = weights[layer] - dtype(spec.rates[layer]) * update
    return weights, np.asarray(losses)


def weights_of(result):
    return [layer["w"] for layer in result.params.values()]


def assert_same(result, other):
    """Bit for bit."""
    for a, b in zip(weights_of(result), weights_of(other), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(result.losses, other.losses)
    assert result.metrics == other.metrics
    assert result.failure == other.failure
    assert result.diverged_at_step == other.diverged_at_step


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 5, "num_steps": 40, "depth": 3},  # 12 steps in a block; the remainder of an epoch is 3 samples
        {"parameterization": "sp", "richness": 0.1, "batch_size": 1, "num_steps": 70, "eta": 3.0},
        {"loss": "cross_entropy", "richness": 2.0, "momentum": 0.9, "eta": 0.2},
        {"optimizer": "adam", "eta": 0.1, "depth": 4, "batch_size": 7},
        {"task": CUBIC, "batch_size": 40, "eta": 0.01},
        {"task": CUBIC.model_copy(update={"fresh": True}), "batch_size": 50, "num_steps": 5, "eta": 0.1},
        {"task": TeacherTask(input_dim=5, width=7, depth=3, fresh=True, seed=2), "batch_size": 3, "num_steps": 30},
    ],
)  # fmt: skip
@pytest.mark.usefixtures("library_promotion")
def test_training_is_what_the_equations_say(fields):
    spec = trial(**fields)
    (result,) = train_trials([spec])
    weights, losses = train_by_hand(spec)
    # Adam divides tiny gradients by their size, and so enlarges their rounding.
    tolerance = 1e-10 if spec.optimizer == "adam" else 1e-12
    np.testing.assert_allclose(result.losses, losses, rtol=tolerance)
    np.testing.assert_array_equal(result.steps, np.arange(spec.total_steps) + 1)
    for own, by_hand in zip(weights_of(result), weights, strict=True):
        np.testing.assert_allclose(own, by_hand, rtol=tolerance, atol=tolerance)

    data = spec.task.load("float64")
    initial = [layer["w"] for layer in init_params((spec.seed, 0), spec.widths, "float64").values()]
    change = [now - before for now, before in zip(layers(weights, data.x), layers(initial, data.x), strict=True)][1:]
    change[-1] *= spec.scale
    expected = [np.sqrt(np.mean(layer**2)) for layer in change]
    np.testing.assert_allclose(result.metrics["activation_change"], expected, rtol=1e-9)
    if spec.task.kind == "images":
        accuracy = np.mean(np.argmax(change[-1], 1) == np.argmax(data.y, 1))
        assert result.metrics["train_accuracy"] == pytest.approx(accuracy)
    # The loss of the target, which is sampled, is that of the training.
    assert to_target(result).metrics["init_loss"] == pytest.approx(result.metrics["final_loss"], rel=1e-9)
    if spec.loss == "mse":
        assert result.metrics["final_loss"] == pytest.approx(np.mean((change[-1] - data.y) ** 2), rel=1e-9)


def test_mup_is_sp_of_another_richness():
    """muP at gamma is SP at gamma sqrt(N): the same predictions, and at one rate the same training."""
    mup = trial(richness=0.3, eta=0.5, rate_rule="raw")
    sp = trial(richness=0.3 * math.sqrt(10), eta=0.5 * 10, rate_rule="raw", parameterization="sp")
    assert mup.scale == pytest.approx(sp.scale, rel=1e-15)
    (a,), (b,) = train_trials([mup]), train_trials([sp])
    for one, other in zip(weights_of(a), weights_of(b), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


def test_the_network_is_what_its_equations_say():
    params = init_params((0, 0), (5, 7, 7, 2), "float64")
    x = np.random.default_rng(1).standard_normal((4, 5))
    weights = [layer["w"] for layer in params.values()]
    for output, by_hand in zip(activations(params, x), layers(weights, x)[1:], strict=True):
        np.testing.assert_allclose(output, by_hand, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(forward(params, x), activations(params, x)[-1])
    single = init_params((0, 0), (5, 7, 7, 2), "float32")
    np.testing.assert_array_equal(single["layer_1"]["w"], params["layer_1"]["w"].astype(np.float32))
    assert np.std(init_params((0, 0), (300, 300), "float64")["layer_0"]["w"]) == pytest.approx(1, abs=5 / math.sqrt(2 * 90_000))


@pytest.mark.parametrize(
    ("fields", "rates"),  # with eta = 2, L = 3 and N = 16
    [
        ({"richness": 0.5}, [8, 8, 8]),
        ({"richness": 8.0}, [2 * 4 * 16] * 3),
        ({"richness": 8.0, "parameterization": "sp"}, [8, 8, 8]),
        ({"richness": 8.0, "rate_rule": "raw"}, [32, 32, 32]),
        ({"richness": 0.5, "optimizer": "adam"}, [1, 0.25, 1]),
        ({"richness": 8.0, "optimizer": "adam"}, [4, 1, 4]),
        ({"richness": 8.0, "optimizer": "adam", "rate_rule": "original"}, [16, 16, 16]),
        ({"richness": 8.0, "optimizer": "adam", "rate_rule": "raw"}, [2, 0.5, 2]),
        ({"richness": 8.0, "optimizer": "adam", "parameterization": "sp"}, [4, 4, 4]),
    ],
)  # fmt: skip
def test_rates(fields, rates):
    assert trial(eta=2.0, depth=3, width=16, **fields).rates == pytest.approx(rates)


MIXED = [
    {"eta": eta, "richness": richness, "seed": seed} for seed in (0, 1) for eta in (0.5, 2.0) for richness in (0.1, 3.0)
] + [{"eta": 1.0, "seed": 5}]  # fmt: skip


def test_a_trial_is_the_same_alone_and_with_others():
    specs = [trial(**fields, batch_size=4, num_steps=20) for fields in MIXED]
    together = train_trials(specs)
    assert [result.spec for result in together] == specs
    for index in (0, 3, 8):
        (alone,) = train_trials([specs[index]])
        np.testing.assert_allclose(alone.losses, together[index].losses, rtol=1e-12)
        for a, b in zip(weights_of(alone), weights_of(together[index]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
    backwards = train_trials(specs[::-1])[::-1]
    np.testing.assert_allclose([r.losses for r in backwards], [r.losses for r in together], rtol=1e-12)


@pytest.mark.usefixtures("library_promotion")
@pytest.mark.parametrize(
    "fields", [{"batch_size": 5}, {"optimizer": "adam"}, {"task": CUBIC.model_copy(update={"fresh": True})}]
)
def test_a_resumed_training_gives_the_numbers_of_an_uninterrupted_one(monkeypatch, fields):
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 1e-9)  # many calls of a few steps
    specs = [trial(eta=eta, seed=seed, precision="float32", num_steps=50, **fields) for eta in (1e-3, 3e-3) for seed in (0, 1)]
    saves, notes = [], []
    whole = train_trials(specs, lambda *note: notes.append(note), save=saves.append)
    assert saves
    assert all(0 < save.step < 50 for save in saves)
    assert notes[-1] == (50, 50, "steps", "0 of 4 diverged")
    for save in (saves[0], saves[-1]):
        for a, b in zip(train_trials(specs, resume=save), whole, strict=True):
            assert_same(a, b)
    of_others = saves[0]._replace(leaves=saves[0].leaves[:-1])
    for a, b in zip(train_trials(specs, resume=of_others), whole, strict=True):  # ignored
        assert_same(a, b)


def test_a_trial_that_diverges_is_a_result():
    specs = [trial(task=CUBIC, eta=eta, num_steps=40, precision="float32") for eta in (0.001, 0.5, 1e3)]
    fine, slow, fast = train_trials(specs)
    (alone,) = train_trials(specs[:1])
    np.testing.assert_allclose(fine.losses, alone.losses, rtol=1e-5)
    assert fine.diverged_at_step is fine.failure is None
    assert slow.failure == fast.failure == "diverged"
    assert np.isfinite(fine.losses).all()
    assert 1 < fast.diverged_at_step <= slow.diverged_at_step
    for result in (slow, fast):
        finite = np.isfinite(result.losses)
        assert finite[: result.diverged_at_step - 1].all()
        assert not finite[result.diverged_at_step - 1 :].any()
        assert all(np.isnan(weight).all() for weight in weights_of(result))
        assert np.isnan(result.metrics["final_loss"])
        assert np.isnan(result.metrics["activation_change"]).tolist() == [True, True]
        with pytest.raises(FloatingPointError, match=rf"it diverged at step {result.diverged_at_step} with eta=.*Lower eta"):
            to_target(result)
    (all_of_them,) = train_trials(specs[2:])  # which stops early
    assert all_of_them.diverged_at_step == fast.diverged_at_step


def test_only_the_last_update_diverges():
    """All its losses are finite, and it has diverged nevertheless."""
    (result,) = train_trials([trial(eta=1e300, num_steps=1)])
    assert result.diverged_at_step == 1
    assert np.isnan(result.losses).all()


@pytest.mark.usefixtures("library_promotion")
@pytest.mark.parametrize("fields", [{}, {"momentum": 0.9}, {"loss": "cross_entropy"}, {"optimizer": "adam"}, {"depth": 3}])
def test_a_dead_network_has_failed(fields):
    """All its units are off: no gradient is left, f is 0, and its loss is that of predicting -f(theta_0) - here and there below
    the loss at the start."""
    spec = trial(eta=1e3, **fields)
    (result,) = train_trials([spec])
    assert result.failure == "dead"
    assert np.isfinite(result.losses).all()
    target = to_target(result)
    x, y, f0 = (target.dataset.samples[name] for name in ("x", "y", "f0"))
    assert all((layers(weights_of(result), x)[-2] <= 0).ravel())
    per_sample_loss = spec.objective().per_sample_loss
    gradient = jax.grad(lambda params: jax.numpy.mean(per_sample_loss(params, target.dataset)))(target.params_star)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    if spec.loss == "mse":
        assert result.metrics["final_loss"] == pytest.approx(np.mean((f0 + y) ** 2), rel=1e-12)
        assert result.metrics["start_loss"] == pytest.approx(np.mean(y**2), rel=1e-12)
    else:
        assert result.metrics["final_loss"] < result.metrics["start_loss"] == pytest.approx(math.log(10), rel=1e-12)


@pytest.mark.usefixtures("library_promotion")
@pytest.mark.parametrize("fields", [{"eta": 32.0}, {"eta": 32.0, "loss": "cross_entropy"}, {"eta": 1.0, "optimizer": "adam"}])
def test_a_loss_above_its_start_is_a_failure(fields):
    spec = trial(**fields)
    (result,) = train_trials([spec])
    assert result.failure == "above start"
    data = spec.task.load("float64")
    weights = [layer["w"] for layer in init_params((spec.seed, 0), spec.widths, "float64").values()]
    prediction = spec.scale * (layers(weights_of(result), data.x)[-1] - layers(weights, data.x)[-1])
    losses = [
        np.mean((f - data.y) ** 2)
        if spec.loss == "mse"
        else np.mean(np.log(np.sum(np.exp(f), axis=1)) - np.sum(f * data.y, axis=1))
        for f in (prediction, 0 * prediction)
    ]
    assert (result.metrics["final_loss"], result.metrics["start_loss"]) == pytest.approx(losses, rel=1e-10)
    assert losses[0] > losses[1]


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_who_learns_little_has_not_failed(precision):
    """However small the steps: of the smallest, rounding alone moves the mean loss, or nothing does."""
    grid = [
        trial(eta=10.0**power, richness=richness, precision=precision)
        for power in (-40, -12, -6, -3)
        for richness in (0.005, 1, 1e3)
    ]
    assert [result.failure for result in train_trials(grid)] == [None] * len(grid)


def test_what_failed_in_which_way():
    """The first that holds: a dead network's loss may be above its start."""
    spec = trial()
    cases = {
        (True, 0.0, 1.0, math.nan): "diverged", (False, 0.0, 1.0, 2.0): "dead", (False, 0.0, 1.0, 0.9): "dead",
        (False, 0.05, 1.0, 0.9): "dead", (False, 0.051, 1.0, 0.9): None, (False, 0.051, 1.0, 1.1): "above start",
        (False, 1.0, 1.0, 1.0): None, (False, 1.0, 1.0, 1 + 1e-12): "above start", (False, 0.0, 0.0, 0.0): None,
    }  # fmt: skip
    assert {case: _failure(spec, *case) for case in cases} == cases
    single = trial(precision="float32")
    assert [_failure(single, False, 1.0, 1.0, loss) for loss in (1 + 1e-6, 1 + 1e-5)] == [None, "above start"]


def test_centring_at_a_small_richness():
    """f_0 is 1/gamma times as large as what training changes: float64 has digits enough, float32 has not."""
    spec = trial(parameterization="sp", richness=1e-5, eta=3.0, num_steps=10)
    exact = train_by_hand(spec, np.longdouble)[1].astype(np.float64)
    assert exact[-1] < 0.9 * exact[0]  # it learns
    error = {
        precision: np.max(np.abs(train_trials([spec.model_copy(update={"precision": precision})])[0].losses / exact - 1))
        for precision in ("float32", "float64")
    }
    assert error["float64"] < 1e-8
    assert error["float32"] > 1e-3


def test_epochs_visit_every_sample_once():
    spec = trial(task=ImagesTask(n_data=47, n_test=1), batch_size=5)  # 9 steps an epoch, 2 samples left out
    indices = batch_indices(spec, 0, 0, 27).reshape(3, 45)
    for epoch in indices:
        assert len(set(epoch)) == 45
    assert indices.min() == 0
    assert indices.max() == 46
    assert not np.array_equal(indices[0], indices[1])
    assert not np.array_equal(indices[0], batch_indices(spec, 1, 0, 9).ravel())
    np.testing.assert_array_equal(batch_indices(spec, 0, 7, 5), batch_indices(spec, 0, 0, 20)[7:12])  # however it is cut
    assert trial(num_steps=None, num_epochs=3, batch_size=5).total_steps == 27


def test_fresh_inputs_never_repeat():
    size = (50, 3, np.dtype(np.float32))
    x = np.asarray(DRAW_FRESH(0, 1, np.arange(200), *size))
    assert x.shape == (10_000, 3)
    assert len(np.unique(x, axis=0)) == len(x)
    np.testing.assert_array_equal(x[100:150], DRAW_FRESH(0, 1, np.asarray([2]), *size))
    others = [np.asarray(DRAW_FRESH(a, b, np.arange(200), *size)) for a, b in ((0, 2), (1, 1), (0, 1))]
    seen = set(map(tuple, x.tolist()))
    assert [len(seen & set(map(tuple, other.tolist()))) for other in others] == [0, 0, 10_000]
    np.testing.assert_allclose(np.mean(x, 0), 0, atol=5 / math.sqrt(len(x)))
    np.testing.assert_allclose(np.cov(x.T), np.eye(3), atol=5 * math.sqrt(2 / len(x)))


def test_polynomials_have_their_moments():
    """x . w is a standard normal u: E u^2 = 1, E u^4 = 3, E u^6 = 15, of variances 2, 96 and 10170."""
    for degree, moment, variance in ((1, 1, 2), (2, 3, 96), (3, 15, 10_170)):
        data = PolynomialTask(input_dim=4, degree=degree, n_data=40_000).load("float64")
        assert np.mean(data.y**2) == pytest.approx(moment, abs=4 * math.sqrt(variance / 40_000))
        assert (data.x.shape, data.y.shape, data.x_test.shape) == ((40_000, 4), (40_000, 1), (512, 4))
    w = PolynomialTask(input_dim=4).teacher()
    assert np.linalg.norm(w) == pytest.approx(1)
    np.testing.assert_allclose(PolynomialTask(input_dim=4, n_data=9).load("float64").y, (np.array(
        PolynomialTask(input_dim=4, n_data=9).load("float64").x) @ w) ** 3)  # fmt: skip


def test_teachers_have_their_moments():
    """With one hidden layer E f^2 = 1 / (2 gamma^2) in SP, 1 / (2 N gamma^2) in muP, over inputs and teachers."""
    mean = {}
    for parameterization in ("sp", "mup"):
        tasks = [
            TeacherTask(input_dim=8, width=50, richness=0.5, parameterization=parameterization, n_data=500, seed=seed)
            for seed in range(60)
        ]
        squares = [np.mean(task.load("float64").y ** 2) for task in tasks]
        error = np.std(squares) / math.sqrt(len(squares))
        expected = 2 / (50 if parameterization == "mup" else 1)
        assert np.mean(squares) == pytest.approx(expected, abs=4 * error)
        mean[parameterization] = np.mean(squares)
    assert mean["sp"] == pytest.approx(50 * mean["mup"])
    task = tasks[0]
    data, weights = task.load("float64"), [w["w"] for w in init_params((0, 2), (8, 50, 1), "float64").values()]
    np.testing.assert_allclose(data.y, layers(weights, data.x)[-1] / (0.5 * 50), rtol=1e-10, atol=1e-12)


def test_points_of_the_curve():
    np.testing.assert_array_equal(point_steps(5, 10), [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(point_steps(40, 4), [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40])
    np.testing.assert_array_equal(point_steps(1000, 1), [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000])
    for total in (1, 7, 63, 64, 65, 1000, 2**16, 2**16 + 1, 2**30):
        steps = point_steps(total, 32)
        assert steps[-1] == total
        assert (np.diff(steps, prepend=0) > 0).all()
        assert len(steps) <= min(total, 64 + 32 * math.ceil(max(0.0, math.log2(total / 64))))
        # Those of a longer training, as far as they go.
        assert set(steps[:-1]) < set(point_steps(3 * total, 32)) | {0}
        assert point_steps(total, 1000).max() < 2**31
    # Each point is the mean of the steps since the one before, wherever the last one ends.
    for num_steps in (97, 100, 112):
        spec = trial(batch_size=2, num_steps=num_steps, points_per_doubling=4)
        every = train_by_hand(spec)[1]
        (result,) = train_trials([spec])
        starts = [0, *result.steps[:-1]]
        expected = [np.mean(every[a:b]) for a, b in zip(starts, result.steps, strict=True)]
        np.testing.assert_allclose(result.losses, expected, rtol=1e-12)
        np.testing.assert_array_equal(result.steps, point_steps(num_steps, 4))


EXTENDED = [
    {"batch_size": 5},  # in blocks of 12 steps
    {"batch_size": 5, "depth": 3, "richness": 0.3},
    {"momentum": 0.9},
    {"optimizer": "adam", "eta": 0.01},
    {"optimizer": "adam", "eta": 0.01, "depth": 3, "loss": "cross_entropy"},
    {"task": CUBIC.model_copy(update={"fresh": True}), "batch_size": 3, "eta": 1e-3},  # in blocks of 21
]


@pytest.mark.usefixtures("library_promotion")
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("fields", EXTENDED)
def test_training_goes_on_from_a_shorter_one_s_end_to_the_same_bits(fields, precision, monkeypatch):
    """Wherever the shorter ones ended: within an epoch, a block of steps, a point of the curve; some trials fail at once."""
    eta, fatal = fields.get("eta", 1.0), {"float32": 1e35, "float64": 1e300}[precision]
    common = {**fields, "precision": precision, "points_per_doubling": 4, "num_steps": 130}
    specs = [trial(**common | {"eta": of, "seed": seed}) for of in (eta, 2 * eta, fatal) for seed in (0, 1)]
    whole = train_trials(specs)
    assert [result.failure == "diverged" for result in whole[:4]] == [False] * 4
    assert whole[4].failure in ("diverged", "dead")
    steps = []

    def shorter(num_steps, ends=None):
        cut = [spec.model_copy(update={"num_steps": num_steps}) for spec in specs]
        assert [a.course_id for a in cut] == [b.course_id for b in specs]
        return train_trials(cut, lambda done, *_: steps.append(done), ends=ends)

    ends = [result.end for result in shorter(50)]
    first = ends[0].step
    assert 50 - 21 < first <= 50
    assert {end.step for end in ends} == {first}
    # Twice: of ends of trainings that went on themselves.
    between = shorter(77, ends)
    for a, b in zip(between, train_trials([result.spec for result in between]), strict=True):
        assert_same(a, b)
    steps.clear()
    for a, b in zip(
        train_trials(specs, lambda done, *_: steps.append(done), ends=[of.end for of in between]), whole, strict=True
    ):
        assert_same(a, b)
        np.testing.assert_array_equal(a.end.curve, b.end.curve)
        for leaf, same in zip(a.end.leaves, b.end.leaves, strict=True):
            np.testing.assert_array_equal(leaf, same)
    assert min(steps) > between[0].end.step > first
    # As long as the shorter one, of which only what is no whole block is trained again.
    for a, b in zip(shorter(50, ends), shorter(50), strict=True):
        assert_same(a, b)
    # One that was stopped further on goes on from there.
    saves = []
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 1e-9)
    train_trials(specs, save=saves.append)
    steps.clear()
    again = train_trials(specs, lambda done, *_: steps.append(done), resume=saves[-1], ends=ends)
    assert min(steps) > saves[-1].step > first
    for a, b in zip(again, whole, strict=True):
        assert_same(a, b)


@pytest.mark.usefixtures("library_promotion")
def test_ends_that_do_not_fit_are_ignored():
    specs = [trial(optimizer="adam", eta=0.01, num_steps=30, seed=seed) for seed in (0, 1)]
    whole = train_trials(specs)
    ends = [result.end for result in train_trials([spec.model_copy(update={"num_steps": 20}) for spec in specs])]
    wider = train_trials([trial(optimizer="adam", eta=0.01, num_steps=20, width=12, seed=seed) for seed in (0, 1)])
    longer = train_trials([spec.model_copy(update={"num_steps": 40}) for spec in specs])
    for unfit in ([of.end for of in wider], [of.end for of in longer], [ends[0], ends[1]._replace(step=19)]):
        for a, b in zip(train_trials(specs, ends=unfit), whole, strict=True):
            assert_same(a, b)


def test_trials_trained_with_others_go_on_alone():
    """But for rounding, as in all trainings beside others."""
    specs = [trial(**fields, batch_size=4, num_steps=20) for fields in MIXED]
    ends = [result.end for result in train_trials(specs)]
    longer = [spec.model_copy(update={"num_steps": 50}) for spec in specs]
    for index in (0, 3, 8):
        (alone,), (on,) = train_trials([longer[index]]), train_trials([longer[index]], ends=[ends[index]])
        np.testing.assert_allclose(on.losses, alone.losses, rtol=1e-11)


def test_trainings_of_few_steps_are_one_program():
    """Whatever their lengths."""
    from lambda_hat.targets.trials.program import make_program, program_key

    lengths = (3, 70, 1000)
    programs = {program_key(trial(num_steps=steps, width=11)) for steps in lengths}
    assert len(programs) == 1
    for steps in lengths:
        train_trials([trial(num_steps=steps, width=11)])
    assert len(make_program(programs.pop()).advance.programs) == 1


def test_the_target_of_a_trial(tmp_path):
    """Built alone or made of one of many, through the store or not: it is the same."""
    specs = [trial(eta=eta, batch_size=48, num_steps=8, precision="float32") for eta in (0.3, 1.0)]
    results = train_trials(specs)
    target, built = to_target(results[1]), specs[1].build()
    for a, b in zip(jax.tree.leaves(target.params_star), jax.tree.leaves(built.params_star), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert built.metrics["init_loss"] == pytest.approx(results[1].metrics["final_loss"], rel=1e-5)
    # A batch of all the data: the loss of step 9 is that of w* after 8.
    longer = train_trials([specs[1].model_copy(update={"num_steps": 9})])[0]
    assert built.metrics["init_loss"] == pytest.approx(longer.losses[-1], rel=1e-5)

    store = Store(str(tmp_path))
    artifacts.build_target(specs[1], store)
    loaded = artifacts.load_target(store, specs[1].target_id)
    assert loaded.spec == specs[1]
    assert loaded.metrics["init_loss"] == built.metrics["init_loss"]
    jax.tree.map(np.testing.assert_array_equal, loaded.params_star, built.params_star)
    assert loaded.spec.objective() is specs[0].objective()
    assert loaded.observables["test"].num_data == 20


def test_a_spec_comes_back_from_its_json():
    for task in (SMALL, CUBIC, TeacherTask(fresh=True)):
        spec = trial(task=task)
        assert TypeAdapter(AnyTargetSpec).validate_json(json.dumps(spec.model_dump(mode="json")), strict=True) == spec
    ids = {trial(**fields).target_id for fields in ({}, {"num_steps": 8}, {"richness": 2.0}, {"seed": 1}, {"task": CUBIC})}
    assert len(ids) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 49}, "batch_size must be at most task.n_data, 48; got 49"),
        ({"num_epochs": 3}, "either num_steps or num_epochs; got num_steps=7 and num_epochs=3"),
        ({"num_steps": None}, "got num_steps=None and num_epochs=None"),
        ({"task": CUBIC, "loss": "cross_entropy"}, "loss=cross_entropy is of classes; got it with task.kind=polynomial"),
        ({"momentum": 0.9, "optimizer": "adam"}, "momentum is a field of sgd; got 0.9 with optimizer=adam"),
        ({"task": {"kind": "images", "n_data": 1500, "n_test": 400}}, "must be at most 1797 together with dataset=digits"),
        ({"task": {"kind": "images", "dataset": "fashion-mnist", "n_data": 70_000}}, "n_data must be at most 60000"),
        ({"depth": 1}, "greater than or equal to 2"),
        ({"num_steps": 2**30 + 1}, "less than or equal to 1073741824"),
        ({"num_steps": None, "num_epochs": 2**29}, "at most 1073741824 steps; num_epochs=536870912 are 1610612736"),
    ],
)  # fmt: skip
def test_trials_that_cannot_be(fields, message):
    with pytest.raises(ValidationError, match=message):
        trial(**fields)


def test_trials_of_different_programs():
    with pytest.raises(InvalidInput, match=r"may differ in eta, richness and seed only; these differ in width, batch_size"):
        train_trials([trial(), trial(width=5, batch_size=4, eta=3.0)])
    assert train_trials([]) == []
