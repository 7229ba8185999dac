"""Estimates beyond the llc against closed forms of Gaussian posteriors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_estimates import CHAINS, NBETA, ar1, iid, trace_of

from lambda_hat.llc import observables
from lambda_hat.llc.observables import Measure

N = 1000
DRAWS = 4000


def regression(num_params=5, num_data=60, nbeta=NBETA, localization=1.0, draws=DRAWS, phi=0.0, seed=0):
    """Losses of a linear model's samples on draws from its exact posterior.

    l_i(w) - l_i(w*) = g_i u + 1/2 (x_i u)^2 with residuals that make the mean gradient zero; u ~ N(0, S),
    S = (nbeta H + localization)^-1. Then Cov[l_i, l_j] = g_i S g_j + 1/2 (x_i S x_j)^2.

    Returns:
      (observed (chains, draws, n), the exact covariance (n, n), H).
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_data, num_params))
    y = rng.standard_normal(num_data)
    residual = x @ np.linalg.lstsq(x, y, rcond=None)[0] - y
    g = residual[:, None] * x
    hessian = x.T @ x / num_data
    covariance = np.linalg.inv(nbeta * hessian + localization * np.eye(num_params))
    z = ar1(phi, (CHAINS, draws, num_params), seed + 1)
    u = z @ np.linalg.cholesky(covariance).T
    observed = u @ g.T + 0.5 * np.square(u @ x.T)
    return observed, g @ covariance @ g.T + 0.5 * np.square(x @ covariance @ x.T), hessian


@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_influence_of_a_linear_model(phi):
    observed, exact, _ = regression(phi=phi)
    found = observables.influence(observed)
    np.testing.assert_allclose(found.values, found.values.T)
    z = (found.values + exact) / found.mcse
    # Errors are of 16 batches, so z is Student's t: its standard deviation is some 1.07, its correlated entries spread that.
    assert 0.6 < np.std(z) < 1.6
    assert np.abs(z).max() < 8
    np.testing.assert_allclose(found.values, -exact, atol=0.1 * np.abs(exact).max())


def test_covariance_is_within_chains():
    """Chains at different levels do not make independent losses move together."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((CHAINS, DRAWS, 2)) + 50 * np.arange(CHAINS)[:, None, None]
    values, errors = observables.covariance(x, x)
    np.testing.assert_allclose(values, np.eye(2), atol=0.06)
    assert abs(values[0, 1]) < 4 * errors[0, 1]


def test_covariance_of_few_draws_has_no_error():
    x = np.random.default_rng(0).standard_normal((2, 5, 3))
    values, errors = observables.covariance(x, x)
    assert np.isfinite(values).all()
    assert np.isnan(errors).all()


def test_covariance_errors_cover():
    """z has the spread of Student's t with 15 degrees of freedom, 1.07, also for draws that are correlated."""
    zs = []
    for seed in range(200):
        x = ar1(0.5, (CHAINS, 400, 1), seed)
        values, errors = observables.covariance(x, x)
        zs.append(float((values[0, 0] - 1) / errors[0, 0]))
    assert np.std(zs) == pytest.approx(1.07, abs=4 * 1.07 / math.sqrt(2 * 200))


def test_susceptibilities_of_a_linear_model():
    """chi_D = -Cov[L_n, L_D - L_n], of means of blocks of samples."""
    observed, exact, _ = regression()
    weights = np.zeros((60, 3))
    weights[:, 0], weights[:20, 1], weights[20:, 2] = 1 / 60, 1 / 20, 1 / 40
    losses = observed @ weights
    of_blocks = weights.T @ exact @ weights
    found = observables.susceptibilities(losses[:, :, 0], losses)
    np.testing.assert_allclose(found.values[0], 0, atol=1e-15)
    np.testing.assert_array_less(np.abs(found.values[1:] + of_blocks[0, 1:] - of_blocks[0, 0]), 4 * found.mcse[1:])


@pytest.mark.parametrize("localization", [1.0, 100.0])
def test_singular_fluctuation_of_a_linear_model(localization):
    """Of all the samples: nbeta/2 times the mean of the exact variances."""
    observed, exact, _ = regression(localization=localization, phi=0.5)
    value, error = observables.singular_fluctuation(observed, NBETA, observed.shape[2])
    assert value == pytest.approx(NBETA / 2 * np.mean(np.diag(exact)), abs=4 * error)
    assert error < 0.05 * value


def test_singular_fluctuation_of_a_realisable_regular_model():
    """At n samples from the model itself, nu is d/2 (Watanabe 2009), up to 1/sqrt(n)."""
    rng = np.random.default_rng(0)
    n, d, nbeta = 20_000, 4, 2000.0
    x, noise = rng.standard_normal((n, d)), rng.standard_normal(n)
    u = rng.standard_normal((2, 400, d)) / math.sqrt(nbeta)
    part = rng.choice(n, 500, replace=False)
    observed = u @ (noise[part, None] * x[part]).T + 0.5 * np.square(u @ x[part].T)
    value, error = observables.singular_fluctuation(observed, nbeta, n)
    assert value == pytest.approx(d / 2, abs=4 * error)
    assert 0.05 < error < 0.5  # the choice of the samples, mostly


def test_wbic_at_its_temperature_only():
    nbeta = N / math.log(N)
    assert observables.wbic(Measure(3.0, 0.1), nbeta, N, 0.5) == pytest.approx((500 + 3 * math.log(N), 0.1 * math.log(N)))
    assert observables.wbic(Measure(3.0, None), nbeta, N, 0.5).mcse is None
    assert observables.wbic(Measure(3.0, 0.1), 1.01 * nbeta, N, 0.5) is None


def quadratic_log_z(nbeta, curvatures, localization):
    """log E_phi[exp(-nbeta (L - L*))] under phi = N(0, 1/localization)."""
    return -0.5 * np.sum(np.log1p(nbeta * curvatures / localization))


def test_free_energy_is_of_the_mean_of_z():
    log_z = np.log([1.0, 3.0]) - 2000.0
    value, error = observables.free_energy(log_z, NBETA, 0.5)
    assert value == pytest.approx(NBETA * 0.5 + 2000.0 - math.log(2.0))
    assert error == pytest.approx(math.log(3.0) / 2)
    assert observables.free_energy(log_z[:1], NBETA, 0.5).mcse is None


def test_integration_gives_the_free_energy_of_a_quadratic():
    curvatures, localization = np.geomspace(0.1, 1, 10), 2.0
    nbeta = np.geomspace(1, 1000, 30)
    scaled = nbeta[:, None] * curvatures
    llc = np.sum(scaled / (2 * (scaled + localization)), axis=1)
    values, errors = observables.free_energy_by_integration(nbeta, llc, np.full(30, 0.1))
    exact = np.array([-quadratic_log_z(b, curvatures, localization) for b in nbeta])
    assert values[0] == errors[0] == 0
    np.testing.assert_allclose(values, exact - exact[0], atol=2e-3 * exact[-1])
    assert errors[-1] == pytest.approx(0.1 * np.log(1000) / np.sqrt(29), rel=0.02)


def test_recorded_is_without_burnin_lost_chains_and_gaps():
    llc = iid(shape=(CHAINS, 12))
    llc[1] = np.nan
    full = np.where(np.arange(12) % 3 == 2, np.arange(12.0), np.nan) + np.zeros((CHAINS, 1))
    observed = np.arange(CHAINS * 12 * 5, dtype=np.float32).reshape(CHAINS, 12, 5)
    trace = trace_of(llc, burnin=4, full_difference=full, observed=observed, observables={"train": 2, "test": 3})
    np.testing.assert_array_equal(observables.recorded(trace, "full_difference"), [[5.0, 8.0, 11.0]] * 3)
    found = observables.recorded(trace, "observed")
    np.testing.assert_array_equal(found, observed[[0, 2, 3], 4:])
    assert found.dtype == np.float64
    assert observables.recorded(trace, "log_normalizer") is None
    assert observables.blocks(trace.observables) == {"train": slice(0, 2), "test": slice(2, 5)}
    losses = observables.block_losses(found, trace.observables)
    np.testing.assert_allclose(losses[:, :, 1], found[:, :, 2:].mean(axis=2))
    lost = trace_of(np.full((2, 12), np.nan), observed=observed[:2], observables={"train": 5})
    assert observables.recorded(lost, "observed") is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_chain_that_failed_in_a_field_is_left_out_of_it(value):
    """It takes no draw from the others, which would leave the ones at which it was finite."""
    full = np.where(np.arange(12) % 3 == 2, np.arange(12.0), np.nan) + np.zeros((CHAINS, 1))
    full[2, 8] = value
    observed = np.ones((CHAINS, 12, 5))
    observed[0, 5, 3] = value
    trace = trace_of(iid(shape=(CHAINS, 12)), burnin=4, full_difference=full, observed=observed, observables={"train": 5})
    np.testing.assert_array_equal(observables.recorded(trace, "full_difference"), [[5.0, 8.0, 11.0]] * 3)
    assert observables.recorded(trace, "observed").shape == (3, 8, 5)
    both = observables.recorded_together(trace, "full_difference", "observed")
    assert [field.shape for field in both] == [(2, 3), (2, 3, 5)]
    np.testing.assert_array_equal(both[0], [[5.0, 8.0, 11.0]] * 2)
