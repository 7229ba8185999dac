"""What users bring beside the usual: each kind of loss, of data and of parameters has its right value, or is refused with the
remedy before anything is sampled."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import lambda_hat as lh
from lambda_hat.samplers.metric import relative_scales
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.full_data import compiled_losses, euclidean_centre
from lambda_hat.targets.loss_checks import loss_degree
from lambda_hat.targets.target import Dataset, Objective, mean_loss_float64
from lambda_hat.targets.theory import quadratic_llc
from lambda_hat.targets.wrap import wrap

pytestmark = pytest.mark.usefixtures("library_promotion")

EUCLIDEAN = {"metric": "euclidean", "num_draws": 1000, "num_burnin_steps": 300, "progress": False}
SHORT = {"sampler": "mala", "num_chains": 2, "num_draws": 20, "num_burnin_steps": 20, "progress": False}
RNG = np.random.default_rng(0)


def regression(num_data, slopes, intercept=None, noise=0.1, seed=0):
    """(x, y) and the fit (w, b) of y = x w + b, which is exactly the given intercept if there is one."""
    rng = np.random.default_rng(seed)
    slopes = np.asarray(slopes, np.float64)
    x = rng.standard_normal((num_data, len(slopes)))
    y = x @ slopes + noise * rng.standard_normal(num_data)
    fit = np.linalg.lstsq(np.c_[x, np.ones(num_data)], y, rcond=None)[0]
    shift = 0.0 if intercept is None else intercept - fit[-1]
    return (x, y + shift), {"w": fit[:-1], "b": np.asarray(fit[-1] + shift)}


def squares(params, batch):
    return 0.5 * jnp.square(batch[0] @ params["w"] + params["b"] - batch[1])


def llc_of_regression(x, nbeta=None, localization=1.0):
    hessian = x.T @ x / len(x)
    return quadratic_llc(np.linalg.eigvalsh(hessian), nbeta or len(x) / np.log(len(x)), localization)


# --- The shapes a loss is called with ----------------------------------------------------------------------------------

IMAGES = RNG.standard_normal((100, 4, 4))
PIXELS = {"w": np.ones(16)}
SUMS = (IMAGES, IMAGES.sum(axis=(1, 2)))
FEW = tuple(array[:40] for array in SUMS)


def flattened(x):
    return x.reshape(x.shape[0], -1)


def by_reshape(p, b):
    return 0.5 * jnp.square(flattened(b[0]) @ p["w"] - b[1])


def by_division(p, b):
    """A shape by integer division, which a batch of none does not have."""
    return 0.5 * jnp.square(b[0].reshape(b[0].size // 16, 16) @ p["w"] - b[1])


def row_by_row(p, b):
    return 0.5 * jnp.square(jnp.stack([jnp.sum(flattened(x[None]) @ p["w"]) - y for x, y in zip(b[0], b[1], strict=True)]))


def with_a_maximum(p, b):
    largest = b[0].max()
    return by_reshape(p, b) + 0 * largest


def squeezed(p, b):
    """Of a batch of one it has no axis left."""
    losses = 0.5 * jnp.square((flattened(b[0]) @ p["w"][:, None]).squeeze() - b[1])
    assert losses.ndim == 1
    return losses


def in_four_parts(p, b):
    """As one accumulates gradients: the batch is cut into four."""
    parts = zip(jnp.split(b[0], 4), jnp.split(b[1], 4), strict=True)
    return jnp.concatenate([by_reshape(p, part) for part in parts])


@pytest.mark.parametrize("loss", [by_reshape, by_division, row_by_row, with_a_maximum, squeezed, in_four_parts])
@pytest.mark.parametrize("mean", [False, True])
def test_a_loss_is_called_with_batches_it_knows(loss, mean):
    sizes = set()

    def loss_fn(params, batch):
        sizes.add(len(batch[0]))
        losses = loss(params, batch)
        return jnp.mean(losses) if mean else losses

    result = lh.estimate_llc(loss_fn, PIXELS, FEW, **SHORT)
    assert 0 not in sizes
    assert result.diagnosis.init_loss < 1e-20
    wrapped = wrap(loss_fn, {"w": PIXELS["w"] + 0.1}, FEW)
    np.testing.assert_allclose(wrapped.losses, by_reshape({"w": PIXELS["w"] + 0.1}, FEW), rtol=1e-9)


def test_flattened_images_have_the_value_of_their_regression():
    result = lh.estimate_llc(by_reshape, PIXELS, SUMS, "hmc", **EUCLIDEAN)
    assert abs(result.llc - llc_of_regression(flattened(IMAGES))) < 4 * result.mcse


def test_the_last_chunk_is_no_smaller_than_the_others():
    """4097 samples are two halves, not 4096 and one."""
    sizes = set()

    def loss_fn(params, batch):
        sizes.add(len(batch[0]))
        return squares(params, batch)

    data, params = regression(4097, [1.0])
    wrapped = wrap(loss_fn, params, data)
    mean_loss_float64(wrapped.objective, wrapped.params, wrapped.dataset)
    assert {2048, 2049} <= sizes
    assert min(sizes) == 32


# --- What a sample counts ----------------------------------------------------------------------------------------------


def ragged(num_rows=400, length=13, sort=True):
    """Rows of a Markov chain over 4 symbols, of several lengths, the first eight full; the fitted logits of the next symbol."""
    rng = np.random.default_rng(1)
    transitions = rng.dirichlet(np.ones(4), size=4).cumsum(axis=1)
    ids = rng.integers(4, size=(num_rows, length))
    for t in range(1, length):
        ids[:, t] = (rng.random(num_rows)[:, None] > transitions[ids[:, t - 1]]).sum(axis=1).clip(max=3)
    lengths = rng.integers(3, length + 1, size=num_rows)
    lengths[:8] = length
    if sort:
        order = np.argsort(-lengths, kind="stable")
        ids, lengths = ids[order], lengths[order]
    mask = (np.arange(length) < lengths[:, None]).astype(np.float64)
    counts = np.zeros((4, 4))
    np.add.at(counts, (ids[:, :-1], ids[:, 1:]), mask[:, 1:])
    return {"input_ids": ids, "attention_mask": mask}, {"logits": np.log(counts / counts.sum(axis=1, keepdims=True))}


def token_losses(params, batch):
    log_p = jax.nn.log_softmax(params["logits"], axis=1)
    mask = batch["attention_mask"][:, 1:]
    return -log_p[batch["input_ids"][:, :-1], batch["input_ids"][:, 1:]] * mask, mask


def token_mean(params, batch):
    losses, mask = token_losses(params, batch)
    return losses.sum() / mask.sum()


def row_means(params, batch):
    losses, mask = token_losses(params, batch)
    return losses.sum(axis=1) / mask.sum(axis=1)


@pytest.mark.parametrize("sort", [False, True])
def test_a_token_mean_over_ragged_rows_needs_their_lengths(sort):
    data, params = ragged(sort=sort)
    with pytest.raises(InvalidInput, match=r"mean over its batch of the samples' own losses.*give what they count as weights"):
        wrap(token_mean, params, data)
    lengths = data["attention_mask"][:, 1:].sum(axis=1)

    def by_hand(params, batch):
        return row_means(params, batch) * batch["attention_mask"][:, 1:].sum(axis=1) / lengths.mean()

    found = [wrap(token_mean, params, data, lengths), wrap(row_means, params, data, lengths), wrap(by_hand, params, data)]
    for wrapped in found:
        assert wrapped.losses.mean() == pytest.approx(float(token_mean(params, data)), rel=1e-12)
        np.testing.assert_allclose(wrapped.losses, found[2].losses, rtol=1e-9)


def test_a_weighted_run_is_that_of_the_loss_weighted_by_hand():
    data, params = ragged(sort=True)
    lengths = data["attention_mask"][:, 1:].sum(axis=1)

    def by_hand(params, batch):
        return row_means(params, batch) * batch["attention_mask"][:, 1:].sum(axis=1) / lengths.mean()

    settings = EUCLIDEAN | {"num_draws": 100, "num_burnin_steps": 100}
    weighted = lh.estimate_llc(token_mean, params, data, "hmc", weights=lengths, observables={}, **settings)
    expected = lh.estimate_llc(by_hand, params, data, "hmc", **settings)
    assert weighted.llc == pytest.approx(expected.llc, abs=3 * expected.mcse)
    # What is observed are the samples' own losses.
    own = row_means(params, {name: array[:: len(lengths) // 100] for name, array in data.items()})
    observed = weighted.draws.draws["observed"]
    assert observed.shape[2] == len(own) == 100


def class_losses(params, batch):
    logits = batch[0] @ params["w"] + params["b"]
    return jax.nn.softplus(logits) - batch[1] * logits


@pytest.mark.parametrize("rare", [3, 100, 450])
def test_class_weights(rare):
    """500 samples of class 0 before the others."""
    rng = np.random.default_rng(2)
    x = np.r_[rng.standard_normal((500, 3)) - 0.5, rng.standard_normal((rare, 3)) + 0.5]
    labels = np.r_[np.zeros(500, int), np.ones(rare, int)]
    weights, params = np.array([1.0, 500 / rare]), {"w": np.full(3, 0.7), "b": np.asarray(0.1)}

    def weighted_mean(params, batch):
        counts = jnp.asarray(weights)[batch[1]]
        return (counts * class_losses(params, batch)).sum() / counts.sum()

    def of_its_batch(params, batch):
        counts = jnp.asarray(weights)[batch[1]]
        return counts * class_losses(params, batch) * len(counts) / counts.sum()

    with pytest.raises(InvalidInput, match="A scalar loss must be the mean"):
        wrap(weighted_mean, params, (x, labels))
    with pytest.raises(InvalidInput, match="must not depend on the rest of its batch"):
        wrap(of_its_batch, params, (x, labels))
    for loss_fn in (weighted_mean, class_losses):
        losses = wrap(loss_fn, params, (x, labels), weights[labels]).losses
        assert losses.mean() == pytest.approx(float(weighted_mean(params, (x, labels))), rel=1e-12)


@pytest.mark.parametrize("weights", [np.ones(30), -np.ones(300), np.full(300, np.nan), np.zeros(300), ["a"] * 300])
def test_wrong_weights_are_refused(weights):
    data, params = regression(300, [1.0, 2.0])
    with pytest.raises(InvalidInput, match="weights must be a finite number for each of the 300 samples"):
        lh.estimate_llc(squares, params, data, weights=weights, **SHORT)


def without_bn(params, batch):
    return (batch[0] - batch[0].mean(axis=0)) @ params["w"]


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, b: jnp.sqrt(jnp.mean(squares(p, b))),
        lambda p, b: jnp.median(squares(p, b)),
        lambda p, b: jnp.sum(squares(p, b)) / 32,
        lambda p, b: jax.nn.logsumexp((b[0] @ p["w"])[:, None] * (b[0] @ p["w"])[None], axis=1),  # contrastive
        lambda p, b: squares(p, (b[0] / jnp.abs(b[0]).max(), b[1])),
        lambda p, b: squares(p, b) * jax.random.bernoulli(jax.random.key(0), 0.5, b[1].shape),  # dropout
        lambda p, b: jnp.square(without_bn(p, b) - b[1]),
    ],
)
def test_a_loss_of_the_whole_batch_is_refused(loss_fn):
    data, params = regression(300, [1.0, 2.0])
    with pytest.raises(InvalidInput, match=r"own loss"):
        wrap(loss_fn, params, data)


def test_a_network_in_16_bits_is_no_loss_of_the_whole_batch():
    data, params = regression(300, RNG.standard_normal(64))

    def loss_fn(p, b):
        return jnp.square((b[0].astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(b[1].dtype) - b[1])

    wrap(loss_fn, {"w": params["w"].astype(np.float32)}, data)


# --- The relative metric ------------------------------------------------------------------------------------------------


def relative_llc(data, params):
    """Exact: that of the quadratic in the metric's units."""
    wrapped = wrap(squares, params, data)
    scales = relative_scales(wrapped.objective, euclidean_centre(wrapped.objective, wrapped.params, wrapped.dataset))
    by_name = dict(zip(sorted(params), scales, strict=True))
    design = np.c_[data[0] * by_name["w"], np.ones(len(data[0])) * by_name["b"]]
    return llc_of_regression(design)


@pytest.mark.parametrize("intercept", [1e6, 1e3, 1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("slopes", [[1.0, -2.0], [0.3], [0.01, 0.02], [1.0, 0.0, 0.0, 0.0, 100.0], [1e-6, 1e-6]])
def test_the_default_metric_agrees_with_the_euclidean_one_on_regular_models(intercept, slopes):
    data, params = regression(500, slopes, intercept)
    euclidean = llc_of_regression(np.c_[data[0], np.ones(500)])
    assert relative_llc(data, params) == pytest.approx(euclidean, rel=0.05)


def test_an_intercept_near_zero_by_default_settings():
    data, params = regression(500, np.ones(4), -0.0038)
    single = jax.tree.map(np.float32, params)
    result = lh.estimate_llc(squares, single, data, num_burnin_steps=2000, num_draws=500, progress=False)
    assert result.verdict == "ok"
    assert abs(result.llc - relative_llc(data, params)) < 4 * result.mcse
    assert result.llc == pytest.approx(2.5, rel=0.05)


def test_one_tensor_near_zero_does_not_hold_the_others():
    """A network's output bias, of any size down to nothing: the other tensors keep their units but for its share of c."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((200, 3))
    params = {"w": rng.standard_normal((3, 5)), "v": rng.standard_normal(5), "b": np.asarray(0.3)}
    objective = Objective(lambda p, d: jnp.square(jnp.tanh(d.samples["x"] @ p["w"]) @ p["v"] + p["b"] - d.samples["y"]))
    scales = []
    for bias in (0.3, 1e-3, 1e-12, 0.0):
        moved = params | {"b": np.asarray(bias)}
        y = jnp.tanh(x @ params["w"]) @ params["v"] + bias + 0.1 * np.random.default_rng(4).standard_normal(200)
        dataset = Dataset({"x": x, "y": np.asarray(y)}, {})
        scales.append(np.array(relative_scales(objective, euclidean_centre(objective, moved, dataset))))
    np.testing.assert_allclose(scales, np.broadcast_to(scales[0], (4, 3)), rtol=0.05)


@pytest.mark.parametrize(("localization", "share"), [(0.5, 0.0), (12.0, 0.13), (40.0, 0.33)])
def test_the_verdict_says_what_the_prior_holds(localization, share):
    data, params = regression(500, np.ones(5))
    result = lh.estimate_llc(squares, params, data, "hmc", localization=localization, **EUCLIDEAN)
    exact = 1 - llc_of_regression(np.c_[data[0], np.ones(500)], localization=localization) / 3
    assert result.diagnosis.prior_share == pytest.approx(exact, abs=0.06)
    assert exact == pytest.approx(share, abs=0.01)
    assert result.verdict == "ok"
    assert any("the prior holds" in note for note in result.notes) == (share > 0.1)
    assert ("the prior holds" in repr(result)) == (share > 0.1)


# --- What a function closes over ----------------------------------------------------------------------------------------

FACTOR = 1.0
DATA, STAR = regression(500, np.ones(3))


def of_a_global(params, batch):
    return FACTOR * squares(params, batch)


class Model:
    def __init__(self):
        self.factor, self.inner = 1.0, types.SimpleNamespace(shift=np.zeros(1))

    def loss(self, params, batch):
        return self.factor * squares(params, batch) + self.inner.shift[0]


def test_what_a_global_was_is_not_what_it_is(monkeypatch):
    exact = [llc_of_regression(np.c_[DATA[0], np.ones(500)] * factor**0.5) for factor in (1.0, 0.005)]
    for factor, value, verdict in zip((1.0, 0.005), exact, ("ok", "over-localised"), strict=True):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        result = lh.estimate_llc(of_a_global, STAR, DATA, "hmc", **EUCLIDEAN)
        assert result.verdict == verdict
        assert abs(result.llc - value) < 4 * result.mcse


def test_closures_and_attributes_that_change(monkeypatch):
    factor, table, model = 1.0, np.ones(1), Model()

    def of_a_cell(params, batch):
        return factor * squares(params, batch)

    def of_an_array(params, batch):
        return table[0] * squares(params, batch)

    jitted = jax.jit(of_an_array)
    partial = functools.partial(lambda model, params, batch: model.loss(params, batch), model)
    functions = [of_a_cell, of_an_array, jitted, model.loss, partial]
    before = [wrap(function, STAR, DATA) for function in functions]
    again = [wrap(function, STAR, DATA) for function in functions]
    assert [one.objective is other.objective for one, other in zip(before, again, strict=True)] == [True] * 5
    factor, model.factor, table[0] = 3.0, 3.0, 3.0
    after = [wrap(function, STAR, DATA) for function in functions]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new.losses, 3 * old.losses, rtol=1e-12)
    model.inner.shift = np.ones(1)
    np.testing.assert_allclose(wrap(model.loss, STAR, DATA).losses, after[0].losses + 1, rtol=1e-12)
    factor = 1.0
    assert wrap(of_a_cell, STAR, DATA).objective is before[0].objective, "compiled already"


# --- What cannot be sampled, and what should be known ---------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["sgld", "hmc", "smc"])
def test_a_gradient_that_is_not_finite_is_refused(sampler):
    x = RNG.standard_normal((100, 4)).astype(np.float32)
    params = {"W": np.eye(4, dtype=np.float32)[:, :3], "b": np.zeros(3, np.float32)}
    for loss in (
        lambda p, b: jnp.linalg.norm(b[0] @ p["W"] - b[1], axis=1),
        lambda p, b: jnp.mean(jnp.sqrt(jnp.sum(jnp.square(b[0] @ p["W"] - b[1]), axis=1))),
    ):
        with pytest.raises(InvalidInput, match=r"gradient of the loss at params must be finite; got NaN or infinity in W\."):
            lh.estimate_llc(loss, params, (x, x[:, :3]), sampler, progress=False)


def test_python_floats_move():
    (x, y), fit = regression(500, np.ones(3))
    log_sigma = float(np.log(np.std(y - x @ fit["w"] - fit["b"])))

    def likelihood(params, batch):
        return squares(params, batch) * jnp.exp(-2 * params["log_sigma"]) + params["log_sigma"]

    result = lh.estimate_llc(likelihood, fit | {"log_sigma": log_sigma}, (x, y), "hmc", **EUCLIDEAN)
    assert result.diagnosis.num_params == 5
    assert abs(result.llc - 2.5) < 4 * result.mcse


def test_python_floats_of_equinox_modules_are_refused_where_they_matter():
    import equinox as eqx

    class Scaled(eqx.Module):
        linear: eqx.nn.Linear
        dropout: eqx.nn.Dropout
        scale: float

        def __call__(self, x, scaled):
            return self.dropout(self.linear(x)) * (self.scale if scaled else 1.0)

    network = eqx.nn.inference_mode(Scaled(eqx.nn.Linear(3, 1, key=jax.random.key(0)), eqx.nn.Dropout(0.5), 2.0))

    def loss_fn(scaled, network, batch):
        return jnp.square(jax.vmap(lambda x: network(x, scaled))(batch[0])[:, 0] - batch[1])

    assert sum(array.size for array in wrap(functools.partial(loss_fn, False), network, DATA).params.values()) == 4
    with pytest.raises(InvalidInput, match=r"Python floats of Equinox modules .* dropout/p = 0.5, scale = 2.0"):
        wrap(functools.partial(loss_fn, True), network, DATA)


def linen_batch_norm(x):
    import flax.linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x)))

    variables = Network().init(jax.random.key(0), x)
    return lambda p, b: jnp.square(Network().apply(p, b[0])[:, 0] - b[1]), variables


def nnx_batch_norm(x):
    from flax import nnx

    network = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(1)),
        nnx.Linear(4, 1, rngs=nnx.Rngs(2)),
    )
    graph, state = nnx.split(network)
    return lambda p, b: jnp.square(nnx.merge(graph, p)(b[0])[:, 0] - b[1]), state


def haiku_batch_norm(x):
    import haiku as hk

    network = hk.without_apply_rng(
        hk.transform_with_state(
            lambda x, training: hk.Linear(1)(hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training=training))
        )
    )
    return lambda p, b: jnp.square(network.apply(*p, b[0], False)[0][:, 0] - b[1]), network.init(jax.random.key(0), x, True)


def equinox_batch_norm(x):
    import equinox as eqx

    class Network(eqx.Module):
        layers: list

        def __init__(self):
            keys = jax.random.split(jax.random.key(0))
            norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
            self.layers = [eqx.nn.Linear(3, 4, key=keys[0]), norm, eqx.nn.Linear(4, 1, key=keys[1])]

        def __call__(self, x, state):
            hidden, _ = self.layers[1](self.layers[0](x), state)
            return self.layers[2](hidden)

    network, state = eqx.nn.make_with_state(Network)()

    def loss_fn(params, batch):
        run = jax.vmap(params[0], in_axes=(0, None), axis_name="batch")
        return jnp.square(run(batch[0], params[1])[:, 0] - batch[1])

    return loss_fn, (eqx.nn.inference_mode(network), state)


def torch_names(x):
    params = {
        "0.weight": np.ones(3, np.float32),
        "1.running_mean": np.zeros(3, np.float32),
        "1.running_var": np.ones(3, np.float32),
    }
    params |= {"1.num_batches_tracked": np.asarray(7), "2.weight": np.ones(4, np.float32), "2.bias": np.zeros(22, np.float32)}

    def loss_fn(p, b):
        return jnp.square(((b[0] - p["1.running_mean"]) / p["1.running_var"]) @ p["0.weight"] - b[1]) + p["2.bias"].sum() ** 2

    return loss_fn, params


@pytest.mark.parametrize("make", [linen_batch_norm, nnx_batch_norm, haiku_batch_norm, equinox_batch_norm, torch_names])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Flax's own
def test_running_statistics_of_batch_normalisation_stay(make):
    """3 x 4 weights and 4 biases, 4 scales and 4 offsets, 4 weights and a bias."""
    with jax.enable_x64(False):
        data = (DATA[0].astype(np.float32), DATA[1].astype(np.float32))
        loss_fn, params = make(data[0])
        wrapped = wrap(loss_fn, params, data)
        assert sum(array.size for array in wrapped.params.values()) == 29
        np.testing.assert_allclose(wrapped.losses, loss_fn(params, data), rtol=1e-5, atol=1e-6)


def test_an_array_in_two_places_is_named():
    tied = {"embed": STAR["w"], "b": STAR["b"], "unembed": STAR["w"]}
    with pytest.warns(UserWarning, match="embed, unembed of params are one array"):
        wrap(lambda p, b: squares({"w": (p["embed"] + p["unembed"]) / 2, "b": p["b"]}, b), tied, DATA)


def test_flat_directions_are_not_the_prior_s():
    """Of two arrays whose sum alone matters half the directions are the prior's, and none of the llc."""
    apart = {"v": STAR["w"].copy(), "w": STAR["w"], "b": STAR["b"]}
    loss = lambda p, b: squares({"w": (p["v"] + p["w"]) / 2, "b": p["b"]}, b)  # noqa: E731
    result = lh.estimate_llc(loss, apart, DATA, "mala", metric="euclidean", progress=False)
    assert result.verdict == "ok"
    assert abs(result.diagnosis.prior_share) < 0.1


@pytest.mark.parametrize("nbeta", [1 / np.log(500), 1.0, 1e6])
def test_an_unusual_temperature_is_named(nbeta):
    with pytest.warns(
        UserWarning, match="nbeta is n times the inverse temperature beta, n / log n = 80.46 where it is left out"
    ):
        result = lh.estimate_llc(squares, STAR, DATA, nbeta=nbeta, **SHORT)
    assert any("nbeta is n times the inverse temperature" in note for note in result.notes)


@pytest.mark.parametrize("nbeta", [None, 20.0, 80.0, 500.0])
def test_a_usual_temperature_is_not(nbeta):
    assert not any("inverse temperature" in note for note in lh.estimate_llc(squares, STAR, DATA, nbeta=nbeta, **SHORT).notes)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("localisation", "'localization'"), ("gamma", "'localization'"), ("elasticity", "'localization'"),
        ("temperature", "'nbeta', n times the inverse temperature"), ("beta", "'nbeta', n times"), ("n_beta", "'nbeta'"),
        ("lr", "'step_size'"), ("epsilon", "'step_size'"), ("chains", "'num_chains'"), ("draws", "'num_draws'"),
        ("warmup", "'num_burnin_steps'"), ("sample_weight", "'weights'"), ("metrc", "'metric'"), ("sede", "'seed'"),
    ],
)  # fmt: skip
def test_other_names_lead_to_ours(name, remedy):
    with pytest.raises(InvalidInput, match=f"{name} is no argument .* Did you mean {remedy}"):
        lh.estimate_llc(squares, STAR, DATA, **{name: 1.0}, progress=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"nbeta": np.arange(1e5)}, {"sampler": np.arange(1e5)}, {"num_draws": list(range(10_000))}, {"metric": "a" * 10_000},
        {"parameters": [f"layer_{index}/w" for index in range(10_000)]}, {"localization": {"a": list(range(10_000))}},
    ],
)  # fmt: skip
def test_long_values_are_shortened(arguments):
    with pytest.raises(InvalidInput) as raised:
        lh.estimate_llc(squares, STAR, DATA, progress=False, **arguments)
    assert len(str(raised.value)) < 500


def test_long_lists_of_tensors_are_shortened():
    many = {f"layer_{index}": np.ones(1) for index in range(3000)}
    with pytest.raises(InvalidInput, match=r"There are: layer_0, .* \(3000 in all\)") as raised:
        lh.estimate_llc(lambda p, b: jnp.square(p["layer_0"] - b[1]), many, DATA, parameters="leyer_1", **SHORT)
    assert len(str(raised.value)) < 500


# --- The degree of a loss -------------------------------------------------------------------------------------------------

X9 = RNG.standard_normal((500, 9)).astype(np.float32)
EXACT = (X9, X9 @ np.ones(9, np.float32))


@pytest.mark.parametrize(
    ("function", "degree"),
    [(jnp.abs, 1.0), (jnp.square, 2.0), (lambda r: jnp.abs(r) ** 1.5, 1.5), (lambda r: r**4, 2.0), (jnp.zeros_like, 2.0)],
)
def test_loss_degree(function, degree):
    objective = Objective(lambda p, d: function(d.samples["x"] @ (p["w"] - 1)))
    star, dataset = {"w": np.ones(9, np.float32)}, Dataset({"x": X9}, {})
    found = loss_degree(objective, star, dataset, np.asarray(compiled_losses(objective, star, dataset)))
    assert found == pytest.approx(degree, abs=0.05)


@pytest.mark.parametrize("sampler", ["smc", "vi", "hmc"])
def test_absolute_errors_at_an_exact_fit(sampler):
    """Degree one: the llc is d, and no verdict says that there is no such minimum."""
    loss = lambda p, b: jnp.abs(b[0] @ p["w"] - b[1])  # noqa: E731
    result = lh.estimate_llc(loss, {"w": np.ones(9, np.float32)}, EXACT, sampler, metric="euclidean", progress=False)
    assert [finding.verdict for finding in result.diagnosis.findings] == []
    assert result.llc == pytest.approx(9, rel=0.03)


def test_absolute_errors_at_a_fit_that_is_not_exact():
    """Over the posterior's width the errors' kinks make a smooth bowl: d/2."""
    rng = np.random.default_rng(5)
    y = X9 @ np.ones(9) + rng.standard_normal(500)
    objective = Objective(lambda p, d: jnp.abs(d.samples["x"] @ p["w"] - d.samples["y"]))
    star, dataset = {"w": np.ones(9, np.float32)}, Dataset({"x": X9, "y": y.astype(np.float32)}, {})
    losses = np.asarray(compiled_losses(objective, star, dataset))
    assert loss_degree(objective, star, dataset, losses) > 1.75


# --- More of each kind ------------------------------------------------------------------------------------------------------

(X3, Y3), FIT3 = regression(120, [1.0, -1.0, 0.5], noise=0.3)


def test_an_exact_fit_with_one_small_tensor():
    """Residuals of exactly 0 say nothing of the tensors' scales; those of parameters nearby do."""
    x = RNG.integers(-4, 5, (400, 3)).astype(np.float32)
    params = {"w": np.array([1, 2], np.float32), "s": np.asarray(1e-3, np.float32)}

    def prediction(p, x):
        return x[:, :2] @ p["w"] + x[:, 2] * p["s"]

    def loss_fn(p, b):
        return 0.5 * jnp.square(prediction(p, b[0]) - b[1])

    y = np.asarray(jax.jit(prediction)(params, x))
    assert not np.asarray(wrap(loss_fn, params, (x, y)).losses).any()
    found = lh.estimate_llc(loss_fn, params, (x, y), "hmc", num_draws=500, num_burnin_steps=200, progress=False)
    assert found.verdict == "ok"
    assert found.llc == pytest.approx(1.5, rel=0.06)


def batch_centred(p, b):
    return squares(p, (b[0] - b[0].mean(0), b[1]))


@pytest.mark.parametrize(
    ("loss_fn", "data", "arguments", "message"),
    [
        (lambda p, b: batch_centred(p, b) + 1e4, (X3, Y3), {}, "must not depend on the rest of its batch"),
        (batch_centred, (X3[:3], Y3[:3]), {}, "must not depend on the rest of its batch"),
        (lambda p, b: 1.0 + 0 * b[1], (X3, Y3), {}, "gradient is 0 in all of them"),
        (lambda p, b: jnp.var(b[0] @ p["w"] - b[1], ddof=1), (X3, Y3), {}, "taken of each sample alone"),
        (squares, (np.ma.masked_greater(X3, 1.5), Y3), {}, "MaskedArray"),
        (squares, (X3, Y3, np.zeros(120, "m8[s]")), {}, "timedelta64"),
        (lambda p, b: np.log(np.asarray(squares(p, b))), (X3, Y3), {}, "jax.numpy in place of numpy"),
        (lambda p, b: squares(p, b) if squares(p, b).sum() > 0 else 0.0, (X3, Y3), {}, "jnp.where in place of if"),
        (lambda p, b: squares(p, (b[0].reshape(60, 2, 3).reshape(120, 3), b[1])), (X3, Y3), {}, "no batch size of its own"),
        (lambda p, x, y: 0.0, (X3, Y3), {}, "missing 1 required positional argument"),
        ("mse", (X3, Y3), {}, "must be a function"),
        (squares, (X3, Y3), {"observables": "train"}, "must be a mapping"),
        (squares, (X3, Y3), {"weights": [[1], [1, 2]]}, r"got shape \(2,\) of object"),
        (squares, (X3, Y3), {"rng": 3}, "Did you mean 'seed'"),
        (squares, (X3, Y3), {"num_chains": 10**8}, "must fit into memory.*Lower num_chains"),
    ],
)
def test_more_that_is_refused(loss_fn, data, arguments, message):
    with pytest.raises(InvalidInput, match=message):
        lh.estimate_llc(loss_fn, FIT3, data, **SHORT | arguments)


@pytest.mark.parametrize("params", [{}, {"w": np.ones(3, int)}])
def test_nothing_that_moves(params):
    with pytest.raises(InvalidInput, match=r"must hold arrays of floating numbers; got (nothing|only int64)"):
        lh.estimate_llc(squares, params, (X3, Y3))


def test_large_integers_under_float32():
    params = {"w": np.ones(3, np.float32), "b": np.zeros((), np.float32)}
    with pytest.raises(InvalidInput, match="must fit 32 bits"):
        wrap(lambda p, b: squares(p, (b[0] / 1e12, b[1])), params, ((X3 * 1e12).astype(np.int64), Y3))


class Unhashable:
    """A loss as a method, jitted or not, of an object that has no hash."""

    def __init__(self):
        self.held = jnp.ones(2)

    def __eq__(self, other):
        return self is other

    __hash__ = None

    def __call__(self, p, b):
        return squares(p, b)

    def method(self, p, b):
        return squares(p, b)


class Jitted:
    @functools.partial(jax.jit, static_argnums=0)
    def method(self, p, b):
        return squares(p, b)


def of_its_dtype(p, b):
    assert b[0].dtype == jnp.float32
    return squares(p, b)


@pytest.mark.parametrize("loss_fn", [Unhashable(), Unhashable().method, Jitted().method, of_its_dtype])
def test_other_forms_of_a_function(loss_fn):
    params, data = jax.tree.map(lambda x: np.asarray(x, np.float32), (FIT3, (X3, Y3)))
    expected = wrap(squares, params, data).losses
    np.testing.assert_allclose(wrap(loss_fn, params, data).losses, expected, rtol=1e-6)
    assert lh.estimate_llc(loss_fn, params, data, **SHORT).diagnosis.init_loss == pytest.approx(expected.mean(), rel=1e-5)


def test_samples_of_weight_zero_are_left_out():
    """Rows that are all padding have no mean."""
    mask = (RNG.random((120, 5)) > 0.3).astype(np.float64)
    mask[:11] = 0

    def token_mean(p, b):
        return jnp.sum(squares(p, b)[:, None] * b[2], axis=1) / jnp.sum(b[2], axis=1)

    found = wrap(token_mean, FIT3, (X3, Y3, mask), mask.sum(axis=1))
    others = wrap(squares, FIT3, (X3[11:], Y3[11:]), mask.sum(axis=1)[11:])
    np.testing.assert_allclose(found.losses, others.losses)


def test_an_empty_tensor_stays():
    assert list(wrap(squares, FIT3 | {"e": np.zeros((0, 3))}, (X3, Y3)).params) == ["b", "w"]


def test_what_jax_keeps_of_inner_functions(monkeypatch):
    scale = types.SimpleNamespace(value=1.0)

    def of_row(p, row):
        return p, scale.value * 0.5 * jnp.square(row[0] @ p["w"] + p["b"] - row[1])

    inner = jax.jit(lambda residual: scale.value * 0.5 * jnp.square(residual))
    losses = {
        "partial": functools.partial(jax.jit(lambda factor, p, b: factor * scale.value * squares(p, b)), 1.0),
        "inner": lambda p, b: inner(b[0] @ p["w"] + p["b"] - b[1]),
        "scan": lambda p, b: jax.lax.scan(of_row, p, b)[1],
    }
    before = {name: wrap(loss_fn, FIT3, (X3, Y3)).losses for name, loss_fn in losses.items()}
    monkeypatch.setattr(scale, "value", 3.0)
    for name, loss_fn in losses.items():
        np.testing.assert_allclose(wrap(loss_fn, FIT3, (X3, Y3)).losses, 3 * before[name], rtol=1e-6, err_msg=name)


def test_quantiles_at_their_minimum_are_above_half_of_d():
    """Six parameters of a median regression whose noise is of the posterior's width: kinks make the llc 3.52 (an independent
    Metropolis sampler of the same density), above d/2 = 3, and no verdict says that it cannot be."""
    rng = np.random.default_rng(0)
    x = np.c_[rng.standard_normal((500, 5)), np.ones(500)]
    y = x @ np.arange(6) + 0.3 * rng.standard_normal(500)
    n, d = x.shape
    program = scipy.optimize.linprog(
        np.r_[np.zeros(d), np.full(2 * n, 0.5)], A_eq=np.c_[x, np.eye(n), -np.eye(n)], b_eq=y,
        bounds=[(None, None)] * d + [(0, None)] * (2 * n),
    )  # fmt: skip
    found = lh.estimate_llc(lambda p, b: 0.5 * jnp.abs(b[0] @ p["w"] - b[1]), {"w": program.x[:d]}, (x, y), "hmc", **EUCLIDEAN)
    assert found.verdict == "ok"
    assert found.llc == pytest.approx(3.5, rel=0.06)
