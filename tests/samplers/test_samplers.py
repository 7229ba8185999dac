"""One conformance table over all samplers, from the union of their specs."""

from __future__ import annotations

import functools
import typing

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from lambda_hat.compute.chunks import compile_clock
from lambda_hat.llc.sampling import sample
from lambda_hat.llc.trace import Trace
from lambda_hat.samplers.kinds import AnySamplerSpec
from lambda_hat.samplers.posterior import Posterior, PosteriorSpec, make_centre, make_posterior
from lambda_hat.samplers.sgld import SgldSpec
from lambda_hat.samplers.stochastic import StochasticSpec
from lambda_hat.targets.analytic import QuadraticData, QuadraticSpec
from lambda_hat.targets.selection import select
from lambda_hat.targets.target import Dataset, Objective
from lambda_hat.targets.theory import quadratic_llc

pytestmark = pytest.mark.usefixtures("library_promotion")

SPECS = {spec.model_fields["kind"].default: spec for spec in typing.get_args(typing.get_args(AnySamplerSpec)[0])}

# Settings under which each sampler's own bias is well below the Monte Carlo error; one row per variant.
LONG = {"batch_size": 32, "num_burnin_steps": 4000, "num_draws": 2000, "num_steps_bw_draws": 10}
CASES = {
    "sgld": ("sgld", LONG),
    "sgld-plain": ("sgld", {**LONG, "gradient": "plain", "integrator": "euler", "step_size": 1e-4}),
    "sgld-rmsprop": ("sgld", {**LONG, "preconditioner": "rmsprop"}),
    "sgld-adam": ("sgld", {**LONG, "preconditioner": "adam", "step_size": 1.5e-5, "num_steps_bw_draws": 40}),
    "sghmc": ("sghmc", LONG),
    "sgnht": ("sgnht", LONG),
    "mala": ("mala", {"num_burnin_steps": 2000, "num_draws": 2000, "num_steps_bw_draws": 20}),
    "hmc": ("hmc", {"num_draws": 2000, "num_integration_steps": 10}),
    "nuts": ("nuts", {"num_draws": 3000}),
    "mclmc": ("mclmc", {}),
    "adjusted_mclmc": ("adjusted_mclmc", {"num_draws": 2000}),
    "vi": ("vi", {}),
    "vi-low-rank": ("vi", {"rank": 3}),
    "smc": ("smc", {"num_chains": 4, "num_burnin_steps": 100, "num_particles": 256}),
}
#: Kinds that are right whatever the posterior, given time, and what is time enough on a normal crossing.
EXACT = {
    "mala": {"num_draws": 10_000, "target_acceptance": 0.9},
    "hmc": {"num_draws": 5000},
    "nuts": {"num_draws": 2500},
    "adjusted_mclmc": {"num_draws": 5000},
    "smc": {"num_draws": 400},
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


def _loss(params, dataset):
    """A parabola around each sample plus two valleys that cross, without value beyond a radius: one program for all tests."""
    w, constants = params["w"], dataset.constants
    offset = w[None, :] - dataset.samples["e"]
    loss = 0.5 * jnp.sum((offset @ constants["precision"]) * offset, axis=1) + constants["crossing"] * jnp.square(w[0] * w[1])
    return jnp.where(jnp.max(jnp.abs(w)) > constants["radius"], jnp.nan, loss)


def _mean_loss(params, dataset):
    """The mean over samples, whose own mean is 0, less a constant: full-data samplers take no longer for many samples."""
    w, constants = params["w"], dataset.constants
    loss = 0.5 * w @ constants["precision"] @ w + constants["crossing"] * jnp.square(w[0] * w[1])
    return jnp.where(jnp.max(jnp.abs(w)) > constants["radius"], jnp.nan, loss)


OBJECTIVE = Objective(_loss, _mean_loss)


def problem(precision, crossing: float = 0.0, radius: float = np.inf, dtype: str = "float32"):
    """(w*, data) with L_n(w) - L_n(w*) = w P w / 2 + crossing w_0^2 w_1^2 in four dimensions."""
    e = 0.1 * np.random.default_rng(0).standard_normal((500, 4))
    e -= e.mean(axis=0, keepdims=True)
    constants = {"precision": np.asarray(precision), "crossing": np.asarray(crossing), "radius": np.asarray(radius)}
    dataset = Dataset({"e": e.astype(dtype)}, {name: value.astype(dtype) for name, value in constants.items()})
    return {"w": np.zeros(4, dtype)}, dataset


CURVATURES = np.geomspace(1.0, 0.05, 4)
CORRELATED = 5 * (np.eye(4) + 0.9 * (np.ones((4, 4)) - np.eye(4)))


def run(spec, target, **posterior) -> Trace:
    return sample(OBJECTIVE, *target, PosteriorSpec(**posterior), spec)


def test_every_sampler_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(SPECS)


@case
def test_quadratic(case):
    nbeta, localization = 150.0, 3.0
    trace = run(spec_of(case), problem(np.diag(CURVATURES)), nbeta=nbeta, localization=localization)
    exact = quadratic_llc(CURVATURES, nbeta, localization)
    assert_within(nbeta * trace.posterior_draws("loss_difference"), exact)
    assert trace.posterior_draws("is_divergent").sum() == 0


@case
def test_correlated_gaussian(case):
    """Correlations a diagonal preconditioner cannot remove; checks both moments the diagnostics use."""
    nbeta, localization = 40.0, 1.0
    trace = run(spec_of(case), problem(CORRELATED), nbeta=nbeta, localization=localization)
    eigenvalues = np.linalg.eigvalsh(CORRELATED)
    distance = float(np.sum(1 / (nbeta * eigenvalues + localization)))
    if case == "vi":  # The nearest Gaussian without correlations has the precisions' diagonal: its own, known error.
        diagonal = np.diag(CORRELATED)
        distance = float(np.sum(1 / (nbeta * diagonal + localization)))
        eigenvalues = diagonal
    assert_within(nbeta * trace.posterior_draws("loss_difference"), quadratic_llc(eigenvalues, nbeta, localization))
    assert_within(trace.posterior_draws("squared_distance"), distance)


@pytest.mark.parametrize("case", EXACT)
def test_normal_crossing(case):
    """L = w_0^2 w_1^2, of multiplicity 2, where no Gaussian is near; the value at this nbeta is by quadrature."""
    spec, nbeta = spec_of(case, **EXACT[case]), 144.765
    trace = run(spec, problem(np.zeros((4, 4)), crossing=1.0), nbeta=nbeta, localization=1.0)
    assert_within(nbeta * trace.posterior_draws("loss_difference"), 0.36140331580966856)


def posterior_at(dtype: str) -> Posterior:
    params, dataset = problem(np.diag(CURVATURES), dtype=dtype)
    selection = select(params, ("*",))
    centre = make_centre(OBJECTIVE, params, dataset, "euclidean", selection, True)
    return make_posterior(OBJECTIVE, centre, selection, jnp.asarray(150.0, dtype), jnp.asarray(3.0, dtype))


@case
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_keeps_dtype(case, dtype):
    spec = spec_of(case)
    with jax.enable_x64(dtype == "float64"):
        posterior = posterior_at(dtype)
        algorithm = spec.algorithm()
        numbers = {name: jnp.asarray(value, dtype) for name, value in spec.numbers().items()}
        keys = jax.random.split(jax.random.key(0), 2)
        start = jnp.zeros(4, dtype)

        def init(key):
            return algorithm.init(key, start, posterior, numbers)

        def step(key, state):
            return algorithm.step(key, state, posterior, numbers, jnp.asarray(0, jnp.int32))

        state = jax.eval_shape(jax.vmap(init), keys)
        after, info = jax.eval_shape(jax.vmap(step), keys, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    floats = [leaf.dtype for leaf in jax.tree.leaves((state, info)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype(dtype)}


@case
def test_numbers_do_not_recompile(case):
    spec = spec_of(case, num_draws=20)
    run(spec, problem(np.diag(CURVATURES)))
    before = compile_clock.seconds
    changed = {name: 0.9 * value for name, value in spec.numbers().items()}
    run(spec.model_copy(update={**changed, "seed": 7, "num_draws": 33}), problem(CORRELATED), nbeta=77.0, localization=0.3)
    assert compile_clock.seconds == before


@case
def test_nan_is_contained(case):
    """A parabola with no value from two standard deviations on."""
    spec = spec_of(case, num_draws=200)
    trace = run(spec, problem(np.eye(4), radius=0.22), nbeta=30.0, localization=50.0)
    loss, divergent = trace.draws["loss_difference"], trace.draws["is_divergent"]
    assert loss.shape == (spec.num_chains, spec.num_burnin_draws + 200)
    assert divergent.sum() > 0 or not np.isfinite(loss).all() or np.nanmax(loss) < 4 * 0.22**2 / 2
    # A chain may be lost, but then it says so; what it drew before stays.
    assert np.isfinite(loss[:, 0]).all()
    lost = ~np.isfinite(loss).all(axis=1)
    assert (divergent[lost].sum(axis=1) > 0).all()


@case
def test_same_seed_same_draws_and_chains_differ(case):
    spec, target = spec_of(case, num_draws=20), problem(np.diag(CURVATURES))
    first, again = run(spec, target), run(spec, target)
    np.testing.assert_array_equal(first.draws["loss_difference"], again.draws["loss_difference"])
    other = run(spec.model_copy(update={"seed": 1}), target)
    assert (first.draws["loss_difference"] != other.draws["loss_difference"]).mean() > 0.9
    assert (first.draws["loss_difference"][0] != first.draws["loss_difference"][1]).mean() > 0.9


@pytest.mark.parametrize("case", [case for case, (_, fields) in CASES.items() if "batch_size" not in fields])
def test_work_is_near_the_plan(case):
    """What the steps report adds up to what the spec says beforehand, which for nuts is a guess."""
    spec = spec_of(case, num_draws=20)
    trace = run(spec, problem(np.diag(CURVATURES)))
    ratio = trace.draws["work"].sum() / spec.fge(500)
    assert 0.02 < ratio < 2 if case == "nuts" else ratio == pytest.approx(1, abs=0.02)


def test_control_variates_are_exact_on_a_quadratic():
    """All samples have the same curvature, so the gradient has no noise from which samples were drawn."""
    posterior = posterior_at("float64")
    position = jnp.asarray([0.3, -0.2, 0.1, 0.5])
    exact = np.diag(CURVATURES) @ np.asarray(position)
    for estimator, noisy in (("control_variates", False), ("plain", True)):
        minibatch = StochasticSpec(gradient=estimator, batch_size=8).minibatch()
        gradients = [minibatch(jax.random.key(seed), position, posterior)[1] for seed in range(3)]
        off = max(float(np.max(np.abs(gradient - exact))) for gradient in gradients)
        assert (off > 1e-3) if noisy else (off < 1e-12)


def log_normalizer(curvatures: np.ndarray, nbeta: float, localization: float) -> float:
    """log E[exp(-nbeta L)] over N(0, I / localization), of a quadratic L."""
    return -0.5 * float(np.sum(np.log1p(nbeta * curvatures / localization)))


def test_smc_log_normalizer():
    """Its exponential is consistent; what the adaptation adds to that of fixed temperatures does not show here."""
    nbeta, localization = 150.0, 3.0
    exact, ratios = log_normalizer(CURVATURES, nbeta, localization), []
    for seed in range(6):
        spec = spec_of("smc", num_draws=4, seed=seed)
        trace = run(spec, problem(np.diag(CURVATURES)), nbeta=nbeta, localization=localization)
        logs = trace.posterior_draws("log_normalizer").astype(np.float64)
        np.testing.assert_array_equal(logs[:, 0], logs[:, -1])
        ratios += list(np.exp(logs[:, -1] - exact))
    error = np.std(ratios) / len(ratios) ** 0.5
    assert abs(np.mean(ratios) - 1) < 3 * error
    assert error < 0.1


def test_smc_says_when_it_ran_out_of_steps():
    trace = run(spec_of("smc", num_burnin_steps=20, num_draws=20), problem(1e6 * np.eye(4)), nbeta=1e6, localization=1e-4)
    assert (trace.posterior_draws("is_divergent") == 1).all()


def test_smc_keeps_its_mass_matrix_at_a_jump():
    """A particle or two have all the weight there, whose variances are nothing to move by."""
    algorithm = spec_of("smc", num_burnin_steps=20).algorithm()
    numbers = {name: jnp.float64(value) for name, value in spec_of("smc").numbers().items()}
    params, dataset = problem(1e6 * np.eye(4), dtype="float64")
    selection = select(params, ["*"])
    centre = make_centre(OBJECTIVE, params, dataset, "euclidean", selection, False)
    posterior = make_posterior(OBJECTIVE, centre, selection, jnp.float64(1e6), jnp.float64(1e-4))
    before = algorithm.init(jax.random.key(0), jnp.zeros(4, jnp.float64), posterior, numbers)
    before = before._replace(inverse_mass_matrix=jnp.arange(1, 5, dtype=jnp.float64))
    after, info = algorithm.step(jax.random.key(1), before, posterior, numbers, jnp.asarray(19))
    assert (after.t, after.jumped, info.is_divergent) == (1, 1, 1)
    np.testing.assert_array_equal(after.inverse_mass_matrix, before.inverse_mass_matrix)


def test_vi_weights_give_the_normalizer():
    """Where the posterior is in the family, log p - log q is the same everywhere: the log normaliser of p."""
    nbeta, localization = 40.0, 1.0
    for case, precision in (("vi", np.diag(CURVATURES)), ("vi-low-rank", CORRELATED)):
        trace = run(spec_of(case), problem(precision), nbeta=nbeta, localization=localization)
        # Of the density as it is, not over the localisation's Gaussian.
        gaussian = 2 * np.log(2 * np.pi / localization)
        expected = gaussian + log_normalizer(np.linalg.eigvalsh(precision), nbeta, localization)
        weights = trace.posterior_draws("log_weight").astype(np.float64)
        assert np.std(weights) < 0.2
        assert np.log(np.mean(np.exp(weights - expected))) == pytest.approx(0, abs=0.02)


def test_mclmc_says_where_its_step_is_too_long():
    """Two crossing valleys, ever narrower: the one step tuned to typical places fails in the narrow ones."""
    trace = run(spec_of("mclmc"), problem(np.zeros((4, 4)), crossing=1.0), nbeta=1e6, localization=0.1)
    steps = trace.posterior_draws("is_divergent").size * spec_of("mclmc").num_steps_bw_draws
    assert trace.posterior_draws("is_divergent").sum() > 0.01 * steps


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_burnin_steps": 399}, "num_burnin_steps must be at least 400 with step_size=auto.*got 399"),
        ({"num_draws": 50, "eval_every": 60}, "eval_every must be at most num_draws, 50, or 0 for never; got 60"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        SgldSpec(**fields)
