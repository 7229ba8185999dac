"""Estimates of the llc against closed forms."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.signal import lfilter

from lambda_hat.llc.estimates import (
    HOPELESS_K,
    autocorr,
    estimate,
    load_arviz,
    nbeta_sensitivity,
    pareto_k,
    rhat,
    running_llc,
    to_arviz,
)
from lambda_hat.llc.trace import Trace

NBETA, CHAINS, DRAWS = 100.0, 4, 1000


def trace_of(llc, burnin=0, squared_distance=None, acceptance_rate=0.9, is_divergent=0.0, observables=None, **more):
    """A trace of the given llc draws, (chains, draws), burn-in first; `more` are optional fields, of any trailing shape."""
    fields = {"acceptance_rate": acceptance_rate, "is_divergent": is_divergent, "work": 10.0}
    fields["squared_distance"] = 0.1 if squared_distance is None else squared_distance
    draws = {name: np.broadcast_to(value, llc.shape).astype(np.float64) for name, value in fields.items()}
    draws |= {"loss_difference": llc / NBETA, "loss_square": np.square(llc / NBETA)}
    return Trace(draws | more, burnin, {"compile": 2.0, "sampling": 4.0}, observables or {})


def iid(seed=0, shape=(CHAINS, DRAWS), llc=5.0):
    """Draws of nbeta (L(w) - L(w*)) on a regular model: Gamma(llc, 1)."""
    return np.random.default_rng(seed).gamma(llc, size=shape)


def ar1(phi, shape, seed=0, axis=1):
    """A stationary AR(1) process of unit variance along `axis`."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    noise = np.moveaxis(noise, axis, -1)
    noise[..., 1:] *= np.sqrt(1 - phi**2)
    return np.moveaxis(lfilter([1.0], [1.0, -phi], noise, axis=-1), -1, axis)


def gaussian(curvatures, localization, shape, seed=0, phi=0.0):
    """(llc draws, |w-w*|^2), each `shape`, from the exact posterior of a quadratic; AR(1) in time if phi > 0."""
    scale = 1 / np.sqrt(NBETA * curvatures + localization)
    w = ar1(phi, (*shape, len(curvatures)), seed) * scale
    return NBETA / 2 * np.square(w) @ curvatures, np.sum(np.square(w), axis=2)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_errors_of_ar1(phi):
    """ESS of the mean is N (1-phi)/(1+phi).

    A sum of autocorrelations up to lag M has a relative standard error of sqrt(2 (2M+1)/N) (Sokal), its square root half of
    that; M = 6 tau covers ArviZ's window. Allowed: three of them.
    """
    draws = 5000
    trace = trace_of(5.0 + ar1(phi, (CHAINS, draws)))
    pooled = estimate(trace, NBETA, list(range(CHAINS)))
    total, tau = CHAINS * draws, (1 + phi) / (1 - phi)
    relative = np.sqrt(2 * (2 * 6 * tau + 1) / total)
    assert pooled.ess_bulk == pytest.approx(total / tau, rel=3 * relative)
    assert pooled.mcse == pytest.approx(np.sqrt(tau / total), rel=1.5 * relative)
    assert pooled.sd == pytest.approx(1.0, abs=4 * np.sqrt(tau / total))
    assert abs(pooled.llc - 5.0) < 4 * np.sqrt(tau / total)
    one = [estimate(trace, NBETA, [chain]).ess_bulk for chain in range(CHAINS)]
    assert one == pytest.approx([draws / tau] * CHAINS, rel=3 * 2 * relative)
    assert rhat(trace.draws["loss_difference"]) < 1.01
    assert 0 < pooled.ess_tail <= 1.5 * total


def test_rhat_of_shifted_chains():
    """Half the chains half a standard deviation up, half down: R-hat^2 = 1 + 0.25 * 8/7 over the eight half-chains."""
    shift = np.array([[0.5], [-0.5], [0.5], [-0.5]])
    normal = np.random.default_rng(0).standard_normal((CHAINS, 4000))
    assert rhat(normal + shift) == pytest.approx(1.134, abs=0.02)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("localization", [1.0, 100.0])
def test_nbeta_sensitivity_of_a_quadratic(localization, k):
    """t = localization / (nbeta h + localization) for equal curvatures, also from averages over k correlated steps."""
    llc, _ = gaussian(np.full(10, 0.5), localization, (CHAINS, 1000 * k), phi=0.9)
    averages = llc.reshape(CHAINS, 1000, k).mean(axis=2)
    exact = localization / (NBETA * 0.5 + localization)
    squares = np.square(llc).reshape(CHAINS, 1000, k).mean(axis=2)
    value, mcse = nbeta_sensitivity(averages, k, squares)
    assert value == pytest.approx(exact, abs=4 * mcse)
    assert mcse < 0.15
    value, mcse = nbeta_sensitivity(averages, k)
    # The factor recovered from the lag-1 autocorrelation of 4000 draws is known to some 3 %.
    assert value == pytest.approx(exact, abs=4 * np.hypot(mcse, 0.03 * (1 - exact)))


def test_running_llc_ends_at_the_estimate():
    llc = iid()
    pooled = estimate(trace_of(llc), NBETA, list(range(CHAINS)))
    means, errors = running_llc(llc, [2, 100, DRAWS])
    assert np.isnan(errors[0])  # two draws give no error
    assert (means[-1], errors[-1]) == pytest.approx((pooled.llc, pooled.mcse))
    assert means[1] == pytest.approx(llc[:, :100].mean())


@pytest.mark.parametrize("k", [0.3, 0.7, 1.2])
def test_pareto_k(k):
    """The k-th power of 1 / uniform has a Pareto tail of shape k; the fit's prior pulls it towards a half."""
    tail, pull = 3 * np.sqrt(40_000), 10 / (10 + 3 * np.sqrt(40_000))
    found = pareto_k(k * np.random.default_rng(0).exponential(size=40_000))
    assert found == pytest.approx(k + pull * (0.5 - k), abs=3 * (1 + k) / np.sqrt(tail))


@pytest.mark.parametrize(
    ("log_weights", "expected"),
    [
        (np.arange(10.0), None),  # too few for a tail
        (np.zeros(400), None),
        (np.r_[np.zeros(399), 1e-7], None),
        (np.r_[np.zeros(300), np.full(98, -1e9), 1e3, 1e3], HOPELESS_K),  # two draws have all the weight
    ],
)
def test_weights_without_a_tail_that_can_be_fitted(log_weights, expected):
    assert pareto_k(log_weights) == expected


def test_autocorrelation_of_ar1():
    """phi^k at lag k, within some four standard errors sqrt((1+phi^2) / (1-phi^2) / N)."""
    phi, draws = 0.8, 40_000
    found = autocorr(ar1(phi, (draws,), axis=0))
    assert found[:20] == pytest.approx(phi ** np.arange(20), abs=4 * np.sqrt((1 + phi**2) / (1 - phi**2) / draws))


@pytest.mark.parametrize("burnin", [0, 30])
def test_to_arviz(burnin):
    llc = iid(shape=(8, burnin + 6))
    data = to_arviz(trace_of(llc, burnin), NBETA)
    np.testing.assert_allclose(data["posterior"]["llc"], llc[:, burnin:])
    assert data["posterior"]["squared_distance"].dims == ("chain", "draw")
    assert ("warmup_posterior" in data) == (burnin > 0)
    if burnin:
        np.testing.assert_allclose(data["warmup_posterior"]["llc"], llc[:, :burnin])
    assert float(load_arviz().ess(data["posterior"]["llc"].values)) > 0


def test_arviz_is_imported_without_its_announcement(tmp_path):
    """ArviZ 0.23 warns at import once a day, by a stamp in the cache folder; here it has none."""
    code = "from lambda_hat.llc.estimates import load_arviz; load_arviz()"
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code]
    subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, check=True)
