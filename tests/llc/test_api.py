"""The Python interface: known answers, what an estimate shows, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lambda_hat as lh
from lambda_hat.samplers.hmc import HmcSpec
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.target import TRAIN
from lambda_hat.targets.theory import quadratic_llc

pytestmark = pytest.mark.usefixtures("library_promotion")

QUIET = {"progress": False}
EUCLIDEAN = {"metric": "euclidean", "progress": False}
MALA = {"sampler": "mala", "num_chains": 2, "num_draws": 30, "num_burnin_steps": 50}
SHORT = MALA | QUIET


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


def test_linear_regression_by_hmc_in_float64_whatever_jax_is_set_to():
    with jax.enable_x64(False):
        result = lh.estimate_llc(
            mean_loss, star(), DATA, "hmc", nbeta=60.0, localization=3.0, **EUCLIDEAN, num_burnin_steps=500
        )
        assert jnp.zeros(1).dtype == np.float32
    assert_exact(result, truth(60.0, 3.0))
    assert result.draws.draws["loss_difference"].dtype == np.float64
    assert result.diagnosis.init_loss == pytest.approx(float(mean_loss(star(), DATA)), rel=1e-12)


def test_the_loss_at_star_is_of_float64():
    """Its rounding in float32 would be of the size of the posterior's losses; a loss of float32 alone is taken as it is."""

    def far(params, batch):
        return 1e4 + losses(params, batch)

    def in_float32(params, batch):
        return far(params, batch) + jax.lax.scan(lambda c, x: (c + x, None), jnp.float32(0), jnp.zeros(2))[0]

    single = jax.tree.map(np.float32, star())
    exact = float(
        np.mean(far(jax.tree.map(np.float64, single), jax.tree.map(lambda x: np.float32(x).astype(np.float64), DATA)))
    )
    setting = SHORT | {"parameters": "b/*"}
    assert lh.estimate_llc(far, single, DATA, **setting).diagnosis.init_loss == pytest.approx(exact, rel=1e-13)
    with jax.enable_x64(False):
        assert lh.estimate_llc(in_float32, single, DATA, **setting).diagnosis.init_loss == pytest.approx(exact, rel=1e-6)


def test_masks():
    result = lh.estimate_llc(losses, star(), DATA, HmcSpec(num_burnin_steps=500), parameters="b/*", **EUCLIDEAN)
    assert_exact(result, truth(columns=slice(2, 4)))
    assert result.diagnosis.num_params == 2


@pytest.mark.parametrize("x64", [False, True])
def test_observables(x64):
    small = (X[:50], Y[:50])
    with jax.enable_x64(x64):
        result = lh.estimate_llc(losses, star(), DATA, observables={"small": small}, **SHORT | {"num_steps_bw_draws": 1})
    assert result.draws.draws["observed"].dtype == np.float64
    assert list(result.diagnosis.llc_by_dataset) == [TRAIN, "small"]
    assert result.diagnosis.llc_by_dataset["small"].susceptibility is not None
    assert result.diagnosis.singular_fluctuation > 0
    assert result.draws.draws["observed"].shape[2] == 150
    assert result.plot("llc_by_dataset").axes


def test_another_call_compiles_nothing():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    lh.estimate_llc(losses, star(), DATA, **SHORT)
    assert any(event.endswith("backend_compile_duration") for event in compiled)
    compiled.clear()
    moved = {"a": star()["a"] + 0.01, "b": star()["b"]}
    again = lh.estimate_llc(losses, moved, DATA, **SHORT | {"seed": 1, "localization": 2.0, "num_draws": 47})
    assert not any(event.endswith("backend_compile_duration") for event in compiled)
    assert again.diagnosis.compile_seconds == 0


def test_several_settings_are_one_program():
    settings = [{"sampler": "hmc", "nbeta": nbeta, "metric": "euclidean"} for nbeta in (20.0, 40.0, 80.0)]
    results = lh.estimate_llcs(losses, star(), DATA, [*settings, MALA], **QUIET)
    for result, setting in zip(results[:3], settings, strict=True):
        assert_exact(result, truth(setting["nbeta"]))
    assert results[3].spec.sampler.kind == "mala"
    assert lh.plot_estimates(results[:3], "temperature").axes
    with pytest.raises(InvalidInput, match="nothing for 'calibration'"):
        lh.plot_estimates(results, "calibration")


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
    with pytest.raises(InvalidInput, match=r"got 'tracce'\. Did you mean 'trace'"):
        result.plot("tracce")
    with pytest.raises(InvalidInput, match="nothing for 'influence'"):
        result.plot("influence")


def test_remedies_name_arguments():
    away = {"a": STAR[:2] + 0.5, "b": {"c": STAR[2:]}}
    result = lh.estimate_llc(losses, away, DATA, **EUCLIDEAN, **{**MALA, "num_draws": 200})
    assert result.verdict in ("negative llc", "loss below w*")
    assert result.remedy == "w* is not a minimum of the loss: train it longer, or raise localization to stay near it"


def test_without_an_estimate_it_is_nan():
    result = lh.estimate_llc(losses, star(), DATA, **SHORT)
    lost = dataclasses.replace(
        result, diagnosis=result.diagnosis.model_copy(update={"llc": None, "mcse": None, "ess_bulk": None})
    )
    assert np.isnan(lost.llc)
    assert np.isnan(lost.mcse)
    assert repr(lost).startswith("LLCEstimate(llc - by mala, ESS none")


def test_names_are_lazy_and_known():
    assert set(lh.__all__) == {"LLCEstimate", "estimate_llc", "estimate_llcs", "plot_estimates"}
    with pytest.raises(AttributeError, match="estimate_lcc"):
        _ = lh.estimate_lcc


# --- Errors; those of loss_fn, params and data are in test_wrap.py ----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"observables": {"test": (X[:3, :2], Y[:3])}}, r"whose arrays have shapes .* got \[\(3, 2\), \(3,\)\] as 'test'"),
        ({"observables": {"test": [X[:3], Y[:3]]}}, "An observable must be a pytree like data"),
        ({"observables": {"test": (X[:3], Y[:2])}}, "The arrays of the observable 'test' must have one first axis"),
        ({"sampler": "sgdl"}, "sampler must have 'kind' one of .*sgld.*; got 'sgdl'"),
        ({"num_chain": 4}, "num_chain is no argument of estimate_llc and no field of sgld. Did you mean 'num_chains'"),
        ({"num_draws": 0}, "num_draws must be greater than or equal to 4; got 0. Correct the argument"),
        ({"batch_size": 501}, "batch_size must be at most the number of samples, 500; got 501"),
        ({"sampler": "smc", "localization": 0}, "localization must be above 0 for smc"),
        ({"nbeta": -1.0}, "nbeta must be greater than 0; got -1"),
        ({"metric": "cosine"}, "metric must be .*; got 'cosine'"),
        (
            {"parameters": "c/*"},
            r"Every pattern of parameters must name a parameter; got 'c/\*'\. Did you mean 'b/\*'\? There are: a, b/c",
        ),
    ],
)
def test_wrong_input_is_refused_before_sampling(arguments, message, monkeypatch):
    monkeypatch.setattr("lambda_hat.llc.api.sample_runs", None)
    with pytest.raises(InvalidInput, match=message) as raised:
        lh.estimate_llc(losses, star(), DATA, **QUIET | arguments)
    for word in ("posterior.", "sampler.", "--list"):
        assert word not in str(raised.value)
