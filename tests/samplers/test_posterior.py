"""The posterior: temperatures, estimates on minibatches, chunks, masks and metrics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_samplers import quadratic

from lambda_hat.samplers import metric
from lambda_hat.samplers.metric import relative_scales
from lambda_hat.samplers.posterior import PosteriorSpec, make_centre, make_posterior
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets import full_data
from lambda_hat.targets.full_data import euclidean_centre, full_difference, per_sample_losses
from lambda_hat.targets.selection import num_selected, select, tensor_names, to_params
from lambda_hat.targets.target import Dataset, Objective

CURVATURES = quadratic().spec.curvatures()


def quadratic_posterior(nbeta=150.0, localization=3.0, parameters=("*",)):
    target = quadratic("float64")
    selection = select(target.params_star, parameters)
    centre = make_centre(target.spec.objective(), target.params_star, target.dataset, "euclidean", selection, True)
    return make_posterior(target.spec.objective(), centre, selection, jnp.asarray(nbeta), jnp.asarray(localization)), centre


def test_default_nbeta_is_wbic():
    assert PosteriorSpec().resolve_nbeta(1000) == pytest.approx(1000 / np.log(1000))
    assert PosteriorSpec(nbeta=7).resolve_nbeta(1000) == 7


def test_gradient_by_finite_differences():
    posterior, _ = quadratic_posterior()
    u = 0.1 * np.random.default_rng(0).standard_normal(6)
    gradient = np.asarray(jax.grad(posterior.logdensity_fn)(u))
    for i in range(6):
        step = 1e-6 * np.eye(6)[i]
        numeric = float(posterior.logdensity_fn(u + step) - posterior.logdensity_fn(u - step)) / 2e-6
        assert gradient[i] == pytest.approx(numeric, rel=1e-6)
    assert posterior.logdensity_fn(np.zeros(6)) == 0
    exact = 0.5 * np.sum(CURVATURES * np.square(u))
    assert posterior.loss_difference(u, posterior.logdensity_fn(u)) == pytest.approx(exact, rel=1e-9)


def test_minibatch_estimates_are_unbiased_and_pairing_reduces_noise():
    posterior, centre = quadratic_posterior()
    u = jnp.full(6, 0.05)
    keys = jax.random.split(jax.random.key(0), 4000)
    differences, gradients = jax.vmap(lambda key: posterior.minibatch_difference_and_grad(u, key, 32))(keys)
    exact = float(posterior.loss_difference(u, posterior.logdensity_fn(u)))
    assert abs(differences.mean() - exact) < 3 * differences.std() / len(keys) ** 0.5
    gradient_error = gradients.std(axis=0) / len(keys) ** 0.5
    assert (jnp.abs(gradients.mean(axis=0) - CURVATURES * u) < 4 * gradient_error).all()

    def unpaired(key):
        indices = jax.random.randint(key, (32,), 0, 1000)
        params = {"w": centre.params_star["w"] + u}
        losses = quadratic().spec.objective().per_sample_loss(params, centre.dataset.take(indices))
        return jnp.mean(losses) - jnp.mean(centre.losses)

    assert differences.std() < 0.2 * jax.vmap(unpaired)(keys).std()


def test_control_variates_are_exact_on_a_quadratic():
    posterior, _ = quadratic_posterior()
    u = jnp.asarray(np.random.default_rng(0).standard_normal(6))
    difference, gradient = posterior.minibatch_difference_and_grad(u, jax.random.key(0), 8, True)
    assert difference == pytest.approx(0.5 * np.sum(CURVATURES * np.square(u)), rel=1e-9)
    np.testing.assert_allclose(gradient, CURVATURES * u, rtol=1e-9)


# --- Chunks ----------------------------------------------------------------------------------------------------------


def _cosh_loss(params, dataset):
    hidden = jnp.tanh(dataset.samples["x"] @ params["layer"]["w"] + params["layer"]["b"][None, :])
    return jnp.log(jnp.cosh(hidden @ params["out"] - dataset.samples["y"]))


COSH = Objective(_cosh_loss)


def cosh_problem(n=103):
    rng = np.random.default_rng(1)
    params = {"layer": {"b": rng.standard_normal(4), "w": rng.standard_normal((3, 4))}, "out": rng.standard_normal(4)}
    return params, Dataset({"x": rng.standard_normal((n, 3)), "y": rng.standard_normal(n)}, {})


@pytest.mark.parametrize("size", [7, 50, 103, 1000])
def test_chunks_change_nothing(size, monkeypatch):
    params, dataset = cosh_problem()
    expected = _cosh_loss(params, dataset)
    monkeypatch.setattr(full_data, "CHUNK_SAMPLES", size)
    np.testing.assert_allclose(per_sample_losses(COSH, params, dataset), expected, rtol=1e-12)
    selection = select(params, ["*"])
    centre = make_centre(COSH, params, dataset, "euclidean", selection, False)
    away = jax.tree.map(lambda x: x + 0.1, params)

    def mean(params):
        return jnp.mean(_cosh_loss(params, dataset))

    assert full_difference(COSH, away, centre) == pytest.approx(float(mean(away) - mean(params)), rel=1e-12)
    gradient = jax.grad(lambda p: full_difference(COSH, p, centre))(away)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), gradient, jax.grad(mean)(away))


# --- Masks -----------------------------------------------------------------------------------------------------------


def test_names_and_selection():
    params, _ = cosh_problem()
    assert tensor_names(params) == ["layer/b", "layer/w", "out"]
    assert select(params, ["*"]) == ("", "", "")
    assert select(params, ["layer/*"]) == ("", "", None)
    assert select(params, ["layer/w[1]", "out"]) == (None, "1", "")
    assert num_selected(params, select(params, ["layer/w[1]", "out"])) == 8


def test_only_what_is_selected_moves():
    params, _ = cosh_problem()
    selection = select(params, ["layer/w[:, 1:3]", "out"])
    u = jnp.arange(1.0, 11.0)
    scales = [jnp.asarray(1.0), jnp.asarray(2.0), jnp.asarray(10.0)]
    moved = jax.tree.map(lambda new, old: np.asarray(new - old), to_params(u, params, scales, selection), params)
    np.testing.assert_array_equal(moved["layer"]["b"], 0)
    np.testing.assert_allclose(moved["layer"]["w"][:, 1:3], 2 * np.arange(1, 7).reshape(3, 2))
    np.testing.assert_array_equal(moved["layer"]["w"][:, [0, 3]], 0)
    np.testing.assert_allclose(moved["out"], 10 * np.arange(7, 11))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["laier/*"], r"got 'laier/\*'\. Did you mean 'layer/\*'\? There are: layer/b, layer/w, out"),
        (["out[9]"], r"must fit the tensor 'out', of shape \(4,\)"),
        (["out[2:2]"], "it is empty"),
        (["out[1,1]"], "must fit the tensor"),
        (["out[1]", "out[2]"], "got two of 'out'"),
    ],
)
def test_wrong_masks_are_refused(patterns, message):
    params, _ = cosh_problem()
    with pytest.raises(InvalidInput, match=message):
        select(params, patterns)


# --- Metrics ---------------------------------------------------------------------------------------------------------


def _relu_loss(params, dataset):
    hidden = jax.nn.relu(dataset.samples["x"] @ params["w1"] + params["b1"][None, :])
    return jnp.square(hidden @ params["w2"] - dataset.samples["y"])


RELU = Objective(_relu_loss)


def relu_problem():
    rng = np.random.default_rng(2)
    params = {"b1": rng.standard_normal(5), "w1": rng.standard_normal((3, 5)), "w2": rng.standard_normal(5)}
    return params, Dataset({"x": rng.standard_normal((80, 3)), "y": rng.standard_normal(80)}, {})


@pytest.mark.parametrize("factor", [1e-4, 30.0, 1e4])
def test_relative_posterior_is_that_of_the_rescaled_network(factor):
    params, dataset = relu_problem()
    rescaled = {"b1": params["b1"] * factor, "w1": params["w1"] * factor, "w2": params["w2"] / factor}
    selection = select(params, ["*"])
    u = 0.3 * np.random.default_rng(3).standard_normal(num_selected(params, selection))
    densities = []
    for w in (params, rescaled):
        centre = make_centre(RELU, w, dataset, "relative", selection, False)
        densities.append(make_posterior(RELU, centre, selection, jnp.asarray(20.0), jnp.asarray(1.0)).logdensity_fn(u))
    assert abs(densities[0]) > 1
    assert densities[1] == pytest.approx(float(densities[0]), rel=1e-9)


def test_relative_scales_by_hand(monkeypatch):
    """One tensor: scale^2 = c / F with c = rms^2 F, so the scale is its rms; so it is of a dead one."""
    params, dataset = relu_problem()
    dead = {"alive": params["w2"], "dead": np.full(3, 0.2), "zero": np.zeros(2)}
    alive_only = Objective(lambda p, d: jnp.square(d.samples["x"][:, :1] @ p["alive"][None, :1] - 1.0)[:, 0])
    monkeypatch.setattr(metric, "IDENTIFIED", 0.0)
    scales = relative_scales(alive_only, euclidean_centre(alive_only, dead, dataset))
    np.testing.assert_allclose(scales, [np.sqrt(np.mean(params["w2"] ** 2)), 0.2, 1.0], rtol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-3, 1.0, 1e6])
def test_small_parameters_are_held_by_the_data(size):
    """L = h (w - w*)^2 / 2: nbeta h scale^2 is 100, or more where w* is large; of w* = 0 the unit is 1 to begin with."""
    h, nbeta = 400.0, 400 / np.log(400)
    objective = Objective(lambda p, d: 0.5 * h * jnp.square(p["w"] - size - d.samples["e"]))
    noise = 0.1 * np.random.default_rng(0).standard_normal(400)
    dataset, star = Dataset({"e": noise - noise.mean()}, {}), {"w": np.asarray(size)}
    (scale,) = relative_scales(objective, euclidean_centre(objective, star, dataset))
    assert nbeta * h * scale**2 == pytest.approx(max(100, nbeta * h * (size or 1.0) ** 2), rel=1e-6)
