"""One conformance table over all samplers, from the union of their specs."""

from __future__ import annotations

import functools
import typing

import blackjax
import jax.numpy as jnp
import numpy as np
import pytest

from lambda_hat.chunks import compile_clock
from lambda_hat.posterior import PosteriorSpec
from lambda_hat.samplers import AnySamplerSpec
from lambda_hat.sampling import Trace, sample
from lambda_hat.target import Dataset, Objective
from lambda_hat.targets.analytic import QuadraticData, QuadraticSpec
from lambda_hat.theory import quadratic_llc

pytestmark = pytest.mark.usefixtures("library_promotion")

SPECS = {spec.model_fields["kind"].default: spec for spec in typing.get_args(typing.get_args(AnySamplerSpec)[0])}

# Settings under which each sampler's own bias is well below the Monte Carlo error; one row per variant.
CASES = {
    "sgld": ("sgld", {"step_size": 2e-5, "num_burnin_steps": 4000, "num_draws": 4000, "num_steps_bw_draws": 20}),
    "sgld-rmsprop": (
        "sgld",
        {"preconditioner": "rmsprop", "step_size": 2e-6, "num_burnin_steps": 8000, "num_draws": 4000, "num_steps_bw_draws": 20},
    ),
    "sgld-adam": (
        "sgld",
        {"preconditioner": "adam", "step_size": 2e-6, "num_burnin_steps": 8000, "num_draws": 4000, "num_steps_bw_draws": 20},
    ),
    "hmc": ("hmc", {"num_draws": 2000}),
    "mclmc": ("mclmc", {"num_draws": 2000}),
}
case = pytest.mark.parametrize("case", CASES)


def spec_of(case: str, **changes):
    kind, fields = CASES[case]
    return SPECS[kind](**{**fields, **changes})


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over (chain, draw) and its standard error, the ESS by BlackJAX (the package's own diagnostics use ArviZ)."""
    values = values.astype(np.float64)
    ess = float(blackjax.diagnostics.effective_sample_size(jnp.asarray(values)))
    return values.mean(), values.std() / ess**0.5


def assert_within(values: np.ndarray, expected: float, errors: float = 3.0) -> None:
    mean, error = mean_and_error(values)
    assert abs(mean - expected) < errors * error, f"{mean} +- {error} is not {expected}"
    assert error < 0.1 * abs(expected), f"the test has no power: {mean} +- {error}"


@functools.cache
def quadratic(precision: str = "float32"):
    return QuadraticSpec(dim=6, condition_number=20, precision=precision, data=QuadraticData(n_data=1000)).build()


def run(target, spec, **posterior) -> Trace:
    return sample(target.spec.objective(), target.params_star, target.dataset, PosteriorSpec(**posterior), spec)


def test_every_sampler_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(SPECS)


@case
def test_quadratic(case):
    target, nbeta, localization = quadratic(), 150.0, 3.0
    trace = run(target, spec_of(case), nbeta=nbeta, localization=localization)
    exact = quadratic_llc(target.spec.curvatures(), nbeta, localization)
    assert_within(nbeta * trace.posterior_draws("loss_difference"), exact)


CORRELATED = 5 * (np.eye(4) + 0.9 * (np.ones((4, 4)) - np.eye(4)))


def _correlated_loss(params, dataset):
    w = params["w"][None, :] - dataset.samples["e"]
    return 0.5 * jnp.sum((w @ dataset.constants["precision"]) * w, axis=1)


CORRELATED_OBJECTIVE = Objective(_correlated_loss)


@case
def test_correlated_gaussian(case):
    """Correlations the diagonal preconditioners cannot remove; checks both moments the diagnostics use."""
    nbeta, localization = 40.0, 1.0
    e = 0.1 * np.random.default_rng(0).standard_normal((500, 4)).astype(np.float32)
    e -= e.mean(axis=0, keepdims=True)
    dataset = Dataset({"e": e}, {"precision": CORRELATED.astype(np.float32)})
    posterior = PosteriorSpec(nbeta=nbeta, localization=localization)
    # Its widest direction is slower than the quadratic's, so Langevin needs longer steps to have power.
    longer = {"step_size": 5 * CASES[case][1]["step_size"]} if case.startswith("sgld") else {}
    trace = sample(CORRELATED_OBJECTIVE, {"w": np.zeros(4, np.float32)}, dataset, posterior, spec_of(case, **longer))
    eigenvalues = np.linalg.eigvalsh(CORRELATED)
    assert_within(nbeta * trace.posterior_draws("loss_difference"), quadratic_llc(eigenvalues, nbeta, localization))
    assert_within(trace.posterior_draws("squared_distance"), float(np.sum(1 / (nbeta * eigenvalues + localization))))


SHORT = {"num_draws": 20, "num_burnin_steps": 100}


@case
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_keeps_dtype(case, precision):
    trace = run(quadratic(precision), spec_of(case, **SHORT))
    assert {draws.dtype for draws in trace.draws.values()} == {np.dtype(precision)}


@case
def test_numbers_do_not_recompile(case):
    spec = spec_of(case, **SHORT)
    run(quadratic(), spec)
    before = compile_clock.seconds
    changed = {name: 0.9 * value for name, value in spec.numbers().items()}
    run(quadratic(), spec.model_copy(update={**changed, "seed": 7, "num_draws": 33}), nbeta=77.0, localization=0.3)
    assert compile_clock.seconds == before


def _hole_loss(params, dataset):
    """A parabola with no value beyond |w| = 0.2."""
    w = params["w"]
    loss = 0.5 * jnp.sum(jnp.square(w[None, :] - dataset.samples["e"]), axis=1)
    return jnp.where(jnp.max(jnp.abs(w)) > 0.2, jnp.nan, loss)


HOLE_OBJECTIVE = Objective(_hole_loss)


@case
def test_nan_is_contained(case):
    dataset = Dataset({"e": np.zeros((300, 3), np.float32)}, {})
    spec = spec_of(case, num_draws=200, num_burnin_steps=200)
    posterior = PosteriorSpec(nbeta=30.0)
    trace = sample(HOLE_OBJECTIVE, {"w": np.zeros(3, np.float32)}, dataset, posterior, spec)
    loss, divergent = trace.draws["loss_difference"], trace.draws["is_divergent"]
    assert loss.shape == (spec.num_chains, spec.num_burnin_draws + 200)
    assert divergent.sum() > 0 or not np.isfinite(loss).all() or np.nanmax(loss) < 0.06
    # A chain may be lost, but then it says so; what it drew before stays.
    assert np.isfinite(loss[:, 0]).all()
    lost = ~np.isfinite(loss).all(axis=1)
    assert (divergent[lost].sum(axis=1) > 0).all()


@case
def test_same_seed_same_draws_and_chains_differ(case):
    spec = spec_of(case, **SHORT)
    first, again = run(quadratic(), spec), run(quadratic(), spec)
    np.testing.assert_array_equal(first.draws["loss_difference"], again.draws["loss_difference"])
    other = run(quadratic(), spec.model_copy(update={"seed": 1}))
    assert (first.draws["loss_difference"] != other.draws["loss_difference"]).mean() > 0.9
    assert (first.draws["loss_difference"][0] != first.draws["loss_difference"][1]).mean() > 0.9
