"""The Python interface: known answers, every kind of pytree, and what it refuses."""

from __future__ import annotations

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lambda_hat as lh
from lambda_hat.chunks import compile_clock
from lambda_hat.observables import TRAIN
from lambda_hat.samplers.hmc import HmcSpec
from lambda_hat.spec import InvalidInput
from lambda_hat.theory import quadratic_llc

pytestmark = pytest.mark.usefixtures("library_promotion")

QUIET = {"progress": False}
EUCLIDEAN = {"metric": "euclidean", "progress": False}
SHORT = {"sampler": "mala", "num_chains": 2, "num_draws": 30, "num_burnin_steps": 50, "progress": False}


# --- Known answers: linear regression, whose loss is a quadratic ------------------------------------------------------

NUM_DATA = 500
RNG = np.random.default_rng(0)
X = RNG.standard_normal((NUM_DATA, 4)) @ np.diag([1.0, 0.7, 0.4, 0.2])
Y = X @ np.array([1.0, -2.0, 0.5, 1.5]) + 0.3 * RNG.standard_normal(NUM_DATA)
STAR = np.linalg.lstsq(X, Y, rcond=None)[0]
DATA = (X, Y)


def losses(params, batch):
    x, y = batch
    return 0.5 * jnp.square(x[:, :2] @ params["a"] + x[:, 2:] @ params["b"]["c"] - y)


def mean_loss(params, batch):
    return jnp.mean(losses(params, batch))


def star(dtype="float64"):
    return {"a": STAR[:2].astype(dtype), "b": {"c": STAR[2:].astype(dtype)}}


def truth(nbeta=None, localization=1.0, columns=slice(None)):
    hessian = X[:, columns].T @ X[:, columns] / NUM_DATA
    return quadratic_llc(np.linalg.eigvalsh(hessian), nbeta or NUM_DATA / np.log(NUM_DATA), localization)


def assert_exact(estimate, exact):
    assert estimate.verdict == "ok"
    assert abs(estimate.llc - exact) < 4 * estimate.mcse
    assert estimate.mcse < 0.05 * exact


def test_linear_regression_by_sgld():
    result = lh.estimate_llc(losses, star("float32"), DATA, **EUCLIDEAN, num_burnin_steps=2000, num_draws=500)
    assert_exact(result, truth())
    assert result.draws.draws["loss_difference"].dtype == np.float32


@pytest.mark.parametrize("loss_fn", [losses, mean_loss])
def test_linear_regression_by_hmc_in_float64_whatever_jax_is_set_to(loss_fn):
    with jax.enable_x64(False):
        result = lh.estimate_llc(loss_fn, star(), DATA, "hmc", nbeta=60.0, localization=3.0, **EUCLIDEAN, num_burnin_steps=500)
        assert jnp.zeros(1).dtype == np.float32
    assert_exact(result, truth(60.0, 3.0))
    assert result.draws.draws["loss_difference"].dtype == np.float64
    assert result.diagnosis.init_loss == pytest.approx(float(mean_loss(star(), DATA)), rel=1e-12)


def test_a_mean_gives_what_the_losses_give():
    one, other = (lh.estimate_llc(loss_fn, star(), DATA, **SHORT) for loss_fn in (losses, mean_loss))
    np.testing.assert_allclose(one.draws.draws["loss_difference"], other.draws.draws["loss_difference"], rtol=1e-6, atol=1e-12)


def test_masks():
    result = lh.estimate_llc(losses, star(), DATA, HmcSpec(num_burnin_steps=500), parameters="b/*", **EUCLIDEAN)
    assert_exact(result, truth(columns=slice(2, 4)))
    assert result.diagnosis.num_params == 2


def test_observables():
    small = (X[:50], Y[:50])
    result = lh.estimate_llc(losses, star(), DATA, observables={"small": small}, **SHORT)
    assert list(result.diagnosis.llc_by_dataset) == [TRAIN, "small"]
    assert result.diagnosis.llc_by_dataset["small"].susceptibility is not None
    assert result.diagnosis.singular_fluctuation > 0
    assert result.draws.draws["observed"].shape[2] == 150
    assert result.plot("llc_by_dataset").axes
    alone = lh.estimate_llc(losses, star(), DATA, observables={}, **SHORT)
    assert list(alone.diagnosis.llc_by_dataset) == [TRAIN]


def test_another_call_compiles_nothing():
    lh.estimate_llc(losses, star(), DATA, **SHORT)
    before = compile_clock.seconds
    moved = {"a": star()["a"] + 0.01, "b": star()["b"]}
    again = lh.estimate_llc(losses, moved, DATA, **SHORT | {"seed": 1, "localization": 2.0, "num_draws": 47})
    assert compile_clock.seconds == before
    assert again.diagnosis.compile_seconds == 0


def test_several_settings_are_one_program():
    settings = [{"sampler": "hmc", "nbeta": nbeta, "metric": "euclidean"} for nbeta in (20.0, 40.0, 80.0)]
    results = lh.estimate_llcs(losses, star(), DATA, [*settings, SHORT_MALA], **QUIET)
    for result, setting in zip(results[:3], settings, strict=True):
        assert_exact(result, truth(setting["nbeta"]))
    assert len({result.diagnosis.seconds for result in results[:3]}) < 3 or results[3].spec.sampler.kind == "mala"
    assert lh.plot_estimates(results[:3], "temperature").axes
    with pytest.raises(InvalidInput, match="nothing for 'calibration'"):
        lh.plot_estimates(results, "calibration")


SHORT_MALA = {key: value for key, value in SHORT.items() if key != "progress"}


# --- What an estimate shows ------------------------------------------------------------------------------------------


def test_an_estimate_shows_itself(capsys):
    result = lh.estimate_llc(losses, star(), DATA, **SHORT | {"progress": True})
    assert "draws" in capsys.readouterr().err
    assert set(result.summary()) == {"sampler", "nbeta", "llc", "mcse", "ess", "rhat", "seconds", "verdict", "remedy"}
    assert repr(result).startswith("LLCEstimate(llc ")
    assert "by mala, ESS" in repr(result)
    assert result.verdict in repr(result)
    assert result.remedy in repr(result)
    assert result.trace.posterior["llc"].shape == (2, 30)
    assert result.plot("running_llc")._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(InvalidInput, match="got 'tracce'. Did you mean 'trace'"):
        result.plot("tracce")
    with pytest.raises(InvalidInput, match="nothing for 'influence'"):
        result.plot("influence")


def test_remedies_name_arguments():
    away = {"a": STAR[:2] + 0.5, "b": {"c": STAR[2:]}}
    result = lh.estimate_llc(losses, away, DATA, **EUCLIDEAN, **{**SHORT_MALA, "num_draws": 200})
    assert result.verdict in ("negative llc", "loss below w*")
    assert result.remedy == "w* is not a minimum of the loss: train it longer, or raise localization to stay near it"


def test_without_an_estimate_it_is_nan():
    def cliff(params, batch):
        return jnp.where(jnp.any(params["a"] != STAR[:2]), jnp.nan, 0.0) + losses(params, batch)

    result = lh.estimate_llc(cliff, star(), DATA, **EUCLIDEAN, sampler="sgld", step_size=0.1, num_draws=20, num_burnin_steps=20)
    assert np.isnan(result.llc)
    assert np.isnan(result.mcse)
    assert result.verdict == "diverged"
    assert "sampler." not in result.remedy


def test_names_are_lazy_and_known():
    assert set(lh.__all__) == {"LLCEstimate", "estimate_llc", "estimate_llcs", "plot_estimates"}
    with pytest.raises(AttributeError, match="estimate_lcc"):
        _ = lh.estimate_lcc


# --- Pytrees ---------------------------------------------------------------------------------------------------------

X2 = RNG.standard_normal((60, 3)).astype(np.float32)
BATCH = {"x": X2, "y": np.sin(X2.sum(axis=1, keepdims=True))}


def squared(output, batch):
    return jnp.sum(jnp.square(output - batch["y"]), axis=1)


def plain():
    params = [(0.5 * np.ones((3, 4), np.float32), np.zeros(4, np.float32)), (0.5 * np.ones((4, 1), np.float32),)]
    return (lambda p, b: squared(jnp.tanh(b["x"] @ p[0][0] + p[0][1][None, :]) @ p[1][0], b)), params, "0/*"


def haiku():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 1], activation=jnp.tanh)(x)))
    return (lambda p, b: squared(network.apply(p, b["x"]), b)), network.init(jax.random.key(0), X2), "mlp/~/linear_0/*"


def linen():
    import flax.linen as nn

    network = nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(1)])
    return (lambda p, b: squared(network.apply(p, b["x"]), b)), network.init(jax.random.key(0), X2), "params/layers_0/*"


def nnx_network():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.dropout, self.last = (
                nnx.Linear(3, 4, rngs=rngs),
                nnx.Dropout(0.5, rngs=rngs),
                nnx.Linear(4, 1, rngs=rngs),
            )

        def __call__(self, x):
            return self.last(self.dropout(jnp.tanh(self.first(x))))

    network = Network(nnx.Rngs(0))
    network.eval()
    return network


def nnx_split():
    from flax import nnx

    graph, params, rest = nnx.split(nnx_network(), nnx.Param, ...)
    return (lambda p, b: squared(nnx.merge(graph, p, rest)(b["x"]), b)), params, "first/*"


def nnx_module():
    """With its random keys and counts, which stay."""
    return (lambda network, b: squared(network(b["x"]), b)), nnx_network(), "first/*"


def equinox():
    """With functions as leaves, which stay."""
    import equinox as eqx

    network = eqx.nn.MLP(3, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    return (lambda network, b: squared(jax.vmap(network)(b["x"]), b)), network, "layers/0/*"


@pytest.mark.parametrize("make", [plain, haiku, linen, nnx_split, nnx_module, equinox])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_networks_of_every_library(make):
    with jax.enable_x64(False):
        loss_fn, params, first_layer = make()
        result = lh.estimate_llc(loss_fn, params, BATCH, **SHORT, parameters=first_layer)
        assert result.diagnosis.num_params == 16
        assert result.draws.draws["loss_difference"].dtype == np.float32
        assert np.isfinite(result.llc)
        assert result.diagnosis.init_loss == pytest.approx(float(jnp.mean(loss_fn(params, BATCH))), rel=1e-5)


class Network(NamedTuple):
    w: np.ndarray
    steps: np.ndarray
    mask: np.ndarray
    key: jax.Array
    activation: object
    none: None
    rate: float


def test_what_is_no_floating_array_stays():
    params = Network(
        STAR, np.array([3, 4]), np.array([True, False, True, True]), jax.random.key(7), jnp.tanh, None, 0.5
    )  # fmt: skip
    seen = []

    def loss_fn(p, batch):
        seen.append(p)
        scale = p.steps[0] + jax.random.key_data(p.key).sum() + p.rate
        return scale * jnp.square(p.activation(batch[0]) @ (p.w * p.mask))

    result = lh.estimate_llc(loss_fn, params, DATA, **SHORT)
    assert result.diagnosis.num_params == 4
    assert result.diagnosis.init_loss == pytest.approx(float(jnp.mean(loss_fn(params, DATA))))
    assert all(p.activation is jnp.tanh and p.none is None and p.rate == 0.5 for p in seen)


def test_data_are_taken_in_the_dtype_of_params():
    seen = set()

    def loss_fn(params, batch):
        seen.add((batch[0].dtype.name, batch[1].dtype.name))
        return 0.5 * jnp.square(batch[0] @ params - batch[1])

    with jax.enable_x64(False):
        lh.estimate_llc(loss_fn, STAR.astype(np.float32), (X, np.arange(NUM_DATA)), **SHORT, nbeta=0.01)
    assert seen == {("float32", "int32")}


# --- Errors ----------------------------------------------------------------------------------------------------------


def bad_loss(output):
    return lambda params, batch: output(losses(params, batch))


def nan_at_17(params, batch):
    return jnp.where(batch[1] == Y[17], jnp.nan, losses(params, batch))


def batch_normalised(params, batch):
    return losses(params, (batch[0] - jnp.mean(batch[0], axis=0, keepdims=True), batch[1]))


def changed(**leaves):
    return star() | leaves


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": bad_loss(lambda loss: loss[:, None])}, r"of 8 samples it returned shape \(8, 1\) of float64"),
        ({"loss_fn": bad_loss(lambda loss: (jnp.mean(loss), loss))}, "of 8 samples it returned tuple"),
        ({"loss_fn": bad_loss(lambda loss: (loss > 0).astype(int))}, r"as floating numbers; of 8 samples .* int64"),
        ({"loss_fn": nan_at_17}, "loss_fn must be finite at params; got nan for 1 of 500 samples, first for sample 17"),
        ({"loss_fn": batch_normalised}, "must not depend on the rest of its batch"),
        ({"loss_fn": bad_loss(jnp.sum)}, "a scalar loss must be the mean"),
        ({"params": changed(a=STAR[:2].astype(np.float32))}, "all float32 or all float64; got float32 and float64"),
        ({"params": jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), star())}, "got bfloat16. Convert"),
        ({"params": {"n": np.arange(3)}}, "got none"),
        ({"params": changed(a=np.array([np.nan, 1.0]))}, "params must be finite; got NaN or infinity in a"),
        ({"params": star() | {"b/c": STAR[2:]}}, "a path of its own; got two named 'b/c'"),
        ({"params": changed(z={1, 2})}, "must be hashable; got .*set"),
        ({"data": (X, Y[:-1])}, "must have one first axis, of 2 or more samples; got 499 and 500"),
        ({"data": (X[:1], Y[:1])}, "of 2 or more samples; got 1"),
        ({"data": (X, 3.0)}, "first axis is the sample; got float"),
        ({"data": ()}, "first axis is the sample; got none"),
        ({"observables": {"test": (X[:3, :2], Y[:3])}}, r"whose arrays have shapes .* got \[\(3, 2\), \(3,\)\] as 'test'"),
        ({"observables": {"test": [X[:3], Y[:3]]}}, "An observable must be a pytree like data"),
        ({"observables": {"test": (X[:3], Y[:2])}}, "The arrays of the observable 'test' must have one first axis"),
        ({"sampler": "sgdl"}, "sampler must have kind one of .*sgld.*; got 'sgdl'"),
        ({"num_chain": 4}, "num_chain is no field that exists. Did you mean 'num_chains'"),
        ({"num_draws": 0}, "num_draws must be greater than or equal to 4; got 0. Correct the argument"),
        ({"batch_size": 501}, "batch_size must be at most the number of samples, 500; got 501"),
        ({"sampler": "smc", "localization": 0}, "localization must be above 0 for smc"),
        ({"nbeta": -1.0}, "nbeta must be greater than 0; got -1"),
        ({"metric": "cosine"}, "metric must be .*; got 'cosine'"),
        ({"parameters": "c/*"}, r"Every pattern of parameters must name a parameter; got 'c/\*'. There are: a, b/c"),
    ],
)
def test_wrong_input_is_refused_before_sampling(arguments, message, monkeypatch):
    monkeypatch.setattr("lambda_hat.api.sample_runs", None)
    arguments = {"loss_fn": losses, "params": star(), "data": DATA} | QUIET | arguments
    with pytest.raises(InvalidInput, match=message) as raised:
        lh.estimate_llc(**arguments)
    for word in ("posterior.", "sampler.", "--list"):
        assert word not in str(raised.value)
