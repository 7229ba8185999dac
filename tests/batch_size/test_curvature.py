"""Curvature: products against finite differences and dense Hessians; eigenvalues, traces, densities against known spectra."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from lambda_hat.batch_size import curvature as module
from lambda_hat.batch_size.curvature import curvature, hessian_trace, hvp, spectral_density, top_eigenvalues
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets import full_data
from lambda_hat.targets.analytic import QuadraticData, QuadraticSpec
from lambda_hat.targets.target import Dataset, Objective, Target, TargetSpec


def _network_loss(params, dataset):
    hidden = jnp.tanh(dataset.samples["x"] @ params["in"]["w"] + params["in"]["b"][None, :])
    return 0.5 * jnp.square(hidden @ params["out"] - dataset.samples["y"])


def _linear_loss(params, dataset):
    return 0.5 * jnp.square(dataset.samples["x"] @ params["w"])


def _diagonal_loss(params, dataset):
    return 0.5 * dataset.samples["one"] * jnp.sum(dataset.constants["h"] * jnp.square(params["w"]))


LOSSES = {"network": Objective(_network_loss), "linear": Objective(_linear_loss), "diagonal": Objective(_diagonal_loss)}


class LossSpec(TargetSpec):
    name: str

    def objective(self):
        return LOSSES[self.name]


def network(precision="float64", num_data=103):
    """A tanh network of 25 parameters, away from any minimum: its Hessian has eigenvalues of both signs."""
    rng = np.random.default_rng(1)
    params = {"in": {"w": rng.standard_normal((3, 5)), "b": rng.standard_normal(5)}, "out": rng.standard_normal(5)}
    samples = {"x": rng.standard_normal((num_data, 3)), "y": rng.standard_normal(num_data)}
    cast = functools.partial(jax.tree.map, lambda array: array.astype(precision))
    return Target(LossSpec(name="network", precision=precision), cast(params), Dataset(cast(samples), {}), {})


def diagonal(eigenvalues):
    params = {"w": np.zeros(len(eigenvalues))}
    dataset = Dataset({"one": np.ones(2)}, {"h": np.asarray(eigenvalues, np.float64)})
    return Target(LossSpec(name="diagonal", precision="float64"), params, dataset, {})


def mean_loss_of(target):
    flat, unravel = ravel_pytree(target.params_star)
    return flat, lambda flat: jnp.mean(target.spec.objective().per_sample_loss(unravel(flat), target.dataset))


@functools.cache
def dense():
    """The Hessian of the network, (25, 25)."""
    flat, loss = mean_loss_of(network())
    return np.asarray(jax.jit(jax.hessian(loss))(flat))


# --- Products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [50, 4096])
def test_products_by_finite_differences_and_dense(size, monkeypatch):
    monkeypatch.setattr(full_data, "CHUNK_SAMPLES", size)
    target = network()
    flat, loss = mean_loss_of(target)
    vector = np.random.default_rng(0).standard_normal(flat.size)
    product = jax.jit(hvp, static_argnums=0)(target.spec.objective(), target.params_star, target.dataset, vector)
    np.testing.assert_allclose(product, dense() @ vector, rtol=1e-10, atol=1e-12)
    gradient = jax.jit(jax.grad(loss))
    step = 1e-5
    numeric = (gradient(flat + step * vector) - gradient(flat - step * vector)) / (2 * step)
    np.testing.assert_allclose(product, numeric, rtol=1e-6, atol=1e-7)


def test_closed_form_losses_are_used():
    target = QuadraticSpec(precision="float64", data=QuadraticData(n_data=20), dim=6, condition_number=50).build()
    samples = {name: np.full_like(array, np.nan) for name, array in target.dataset.samples.items()}
    dataset = Dataset(samples, target.dataset.constants)
    product = hvp(target.spec.objective(), target.params_star, dataset, jnp.ones(6))
    np.testing.assert_allclose(product, target.spec.curvatures(), rtol=1e-12)


# --- Eigenvalues -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "close"), [("float64", 1e-10), ("float32", 1e-5)])
def test_eigenvalues_of_a_network(precision, close):
    target = network(precision)
    exact = np.linalg.eigvalsh(dense())
    found = top_eigenvalues(target, 4, jax.random.key(0), tolerance=close)
    np.testing.assert_allclose(found.largest, exact[::-1][:4], atol=2 * close * exact[-1])
    assert found.smallest == pytest.approx(exact[0], abs=2 * close * exact[-1])
    assert exact[0] < -0.01
    assert found.num_products <= 25


def test_errors_bound_the_distance_to_an_eigenvalue_and_stop_the_loop():
    exact = np.concatenate([np.geomspace(1e-3, 1, 300), [5.0, 7.0, 20.0]])
    target = diagonal(exact)
    loose, tight = (top_eigenvalues(target, 5, jax.random.key(1), tolerance, 256) for tolerance in (3e-2, 1e-6))
    assert 5 < loose.num_products < tight.num_products < len(exact)
    for found in (loose, tight):
        distances = np.min(np.abs(found.largest[:, None] - exact[None, :]), axis=1)
        assert (distances <= found.largest_errors + 1e-12).all()
    np.testing.assert_allclose(tight.largest[:3], [20, 7, 5], rtol=1e-10)
    np.testing.assert_allclose(tight.largest[3:], exact[[299, 298]], rtol=1e-6)
    assert tight.smallest == pytest.approx(1e-3, abs=2e-5)
    limited = top_eigenvalues(target, 5, jax.random.key(1), 1e-6, max_products=16)
    assert limited.num_products == 16
    assert limited.largest_errors.max() > 1e-3


def test_an_exhausted_krylov_space_goes_on_to_further_eigenvalues():
    found = top_eigenvalues(diagonal([3.0] * 5 + [1.0] * 5), 10, jax.random.key(0))
    np.testing.assert_allclose(found.largest, [3.0] * 5 + [1.0] * 5, rtol=1e-12)
    flat = top_eigenvalues(diagonal(np.zeros(10)), 10, jax.random.key(0))
    np.testing.assert_array_equal(flat.largest, np.zeros(10))


def test_one_parameter():
    found = curvature(diagonal([2.5]), jax.random.key(0), num_probes=1)
    assert found.sharpness == pytest.approx(2.5, rel=1e-12)
    assert found.eigenvalues.smallest == pytest.approx(2.5, rel=1e-12)
    assert found.trace.value == pytest.approx(2.5, rel=1e-12)


def test_other_numbers_do_not_compile_again():
    top_eigenvalues(diagonal([1.0, 2, 3, 4]), 2, jax.random.key(0))
    compiled = module._advance._cache_size()
    top_eigenvalues(diagonal([4.0, 3, 9, 4]), 1, jax.random.key(7))
    assert module._advance._cache_size() == compiled


def test_what_cannot_be_measured_is_said():
    with pytest.raises(InvalidInput, match="number of parameters, 3; got 4"):
        top_eigenvalues(diagonal([1.0, 2, 3]), 4, jax.random.key(0))
    with pytest.raises(InvalidInput, match="at least 2"):
        hessian_trace(diagonal([1.0, 2, 3]), jax.random.key(0), 1)
    diverged, key = diagonal([1.0, np.nan, 3, 4]), jax.random.key(0)
    for measure in (lambda: top_eigenvalues(diverged, 1, key), lambda: hessian_trace(diverged, key)):
        with pytest.raises(FloatingPointError, match="diverged"):
            measure()


# --- Trace -------------------------------------------------------------------------------------------------------------


def test_trace_is_exact_for_few_parameters_or_ranks():
    found = hessian_trace(network(), jax.random.key(0), 25)
    assert found.value == pytest.approx(np.trace(dense()), rel=1e-10)
    assert found.error == 0
    low_rank = diagonal([5.0, -2.0, 1.0] + [0.0] * 27)
    found = hessian_trace(low_rank, jax.random.key(0), 4)
    assert found.value == pytest.approx(4, rel=1e-10)
    assert found.error < 1e-10


def test_trace_is_unbiased_and_its_error_is_right():
    # Rotated, or random signs would see each eigenvalue of a diagonal matrix exactly.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 40)) * np.geomspace(10, 0.1, 40)[None, :] @ np.linalg.qr(rng.standard_normal((40, 40)))[0]
    target = Target(LossSpec(name="linear", precision="float64"), {"w": np.zeros(40)}, Dataset({"x": x}, {}), {})
    exact = np.sum(np.square(x)) / 60
    found = [hessian_trace(target, jax.random.key(seed), 8) for seed in range(60)]
    values, errors = (np.array(of) for of in zip(*found, strict=True))
    assert abs(values.mean() - exact) < 3.5 * values.std() / 60**0.5
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(values.std(), rel=0.3)
    # Hutchinson's own probes have a standard deviation of sqrt(2 (|H|^2 - sum_i H_ii^2)).
    hessian = x.T @ x / 60
    plain = np.sqrt(2 * (np.sum(np.square(hessian)) - np.sum(np.square(np.diag(hessian)))) / 24)
    assert np.median(errors) < 0.5 * plain


# --- Density -----------------------------------------------------------------------------------------------------------


def test_density_of_few_eigenvalues_is_their_shares():
    # A sphere's probe sees a share of Beta(k/2, (d-k)/2): standard deviation sqrt(2 p (1-p) / (d+2)) for the share p = k/d.
    found = spectral_density(diagonal([-1.0] * 50 + [2.0] * 150 + [5.0] * 200), jax.random.key(0), 16, 20, width=0.05)
    assert found.nodes.shape == (16, 20)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, rtol=1e-10)
    for value, share in ((-1, 1 / 8), (2, 3 / 8), (5, 1 / 2)):
        near = np.abs(found.grid - value) < 0.3
        error = np.sqrt(2 * share * (1 - share) / 402 / 16)
        assert np.trapezoid(found.density[near], found.grid[near]) == pytest.approx(share, abs=3.5 * error)
    peak = found.density[np.abs(found.grid - 5) < 0.3].max()
    assert peak == pytest.approx(0.5 / (0.05 * np.sqrt(2 * np.pi)), rel=0.05)
    assert np.trapezoid(found.density, found.grid) == pytest.approx(1, abs=1e-3)


def test_density_of_linear_regression_is_marchenko_pastur():
    n, d = 1200, 400
    x = np.random.default_rng(0).standard_normal((n, d))
    target = Target(LossSpec(name="linear", precision="float64"), {"w": np.zeros(d)}, Dataset({"x": x}, {}), {})
    found = spectral_density(target, jax.random.key(0), 32, 100, width=0.06)
    ratio = d / n
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    grid = np.linspace(low, high, 4001)[1:-1]
    law = np.sqrt((high - grid) * (grid - low)) / (2 * np.pi * ratio * grid)
    distribution = np.cumsum(law) * (grid[1] - grid[0])
    seen = np.array([np.sum(found.weights * (found.nodes <= value)) / 32 for value in grid])
    # Half a step of the quadrature, pi/4 / 100, and 1.36 times 2 sqrt(1/2 / 402 / 32), Kolmogorov's 95 % for the probes.
    assert np.max(np.abs(seen - distribution)) < 0.025
    inside = (found.grid > low + 0.15) & (found.grid < high - 0.15)
    expected = np.sqrt((high - found.grid[inside]) * (found.grid[inside] - low)) / (2 * np.pi * ratio * found.grid[inside])
    assert np.sqrt(np.mean(np.square(found.density[inside] / expected - 1))) < 0.1
    moments = [np.mean(np.sum(found.weights * found.nodes**k, axis=1)) for k in (1, 2)]
    np.testing.assert_allclose(moments, [1, 1 + ratio], rtol=0.05)


def test_probes_that_do_not_fit_together_follow_one_another(monkeypatch):
    target = network()
    monkeypatch.setattr(module, "BASIS_NUMBERS", 2 * 13 * 25)
    found = spectral_density(target, jax.random.key(0), num_probes=4, num_iterations=12)
    assert found.nodes.shape == (4, 12)
    assert len(np.unique(found.nodes[:, -1])) == 4
    exact = np.linalg.eigvalsh(dense())
    assert np.all((found.nodes >= exact[0] - 1e-9) & (found.nodes <= exact[-1] + 1e-9))


def test_curvature_is_all_of_it():
    target = network("float32")
    exact = np.linalg.eigvalsh(dense())
    found = curvature(target, jax.random.key(0), num_eigenvalues=3)
    assert found.sharpness == pytest.approx(exact[-1], rel=1e-3)
    assert found.trace.value == pytest.approx(exact.sum(), rel=1e-4)
    assert found.eigenvalues.largest.shape == (3,)
    assert np.trapezoid(found.density.density, found.density.grid) == pytest.approx(1, abs=1e-3)
