"""The sampling loop and the posterior it samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_samplers import CASES, case, quadratic, spec_of

from lambda_hat import chunks
from lambda_hat.posterior import PosteriorSpec, make_posterior
from lambda_hat.sampling import Checkpoint, sample

pytestmark = pytest.mark.usefixtures("library_promotion")


class _Killed(Exception):
    pass


def _sample(spec, **options):
    target = quadratic()
    return sample(target.spec.objective(), target.params_star, target.dataset, PosteriorSpec(), spec, **options)


@case
@pytest.mark.parametrize("kill_at", [1, 3])
def test_resumed_is_uninterrupted(case, kill_at, monkeypatch):
    """Killed after its first chunk or a later one and continued from the last checkpoint, bit for bit."""
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 0.01)
    thin = CASES[case][1].get("num_steps_bw_draws", 1)
    spec = spec_of(case, num_draws=200, num_burnin_steps=100 * thin)
    whole = _sample(spec)
    saved: list[Checkpoint] = []

    reports = []

    def progress(*report) -> None:
        reports.append(report)
        if len(reports) == kill_at:
            raise _Killed

    with pytest.raises(_Killed):
        _sample(spec, save=saved.append, progress=progress)
    reached = saved[-1].draws["loss_difference"].shape[1]
    assert 0 < reached < spec.num_burnin_draws + spec.num_draws
    resumed = _sample(spec, resume=saved[-1])
    for name, draws in whole.draws.items():
        np.testing.assert_array_equal(resumed.draws[name], draws)
    assert resumed.seconds["sampling"] > saved[-1].seconds["sampling"]


def test_burnin_is_whole_draws_and_kept_apart():
    spec = spec_of("sgld", num_draws=30, num_burnin_steps=41, num_steps_bw_draws=20)
    trace = _sample(spec)
    assert trace.num_burnin_draws == 3
    assert trace.draws["loss_difference"].shape == (4, 33)
    assert trace.posterior_draws("loss_difference").shape == (4, 30)
    np.testing.assert_array_equal(trace.posterior_draws("loss_difference"), trace.draws["loss_difference"][:, 3:])


def test_progress_reaches_the_end():
    seen = []
    _sample(spec_of("hmc", num_draws=50, num_burnin_steps=50), progress=lambda *report: seen.append(report))
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
    assert seen[-1][:3] == (100, 100, "draws")
    assert "burn-in" in seen[0][3]
    assert "sampling" in seen[-1][3]


def test_work_is_counted():
    """FGE against a count of the gradients actually asked for."""
    sgld = spec_of("sgld", num_draws=30, num_burnin_steps=41, num_steps_bw_draws=20, batch_size=100)
    assert sgld.fge(1000) == pytest.approx(4 * (60 + 600) * 0.1)
    hmc = spec_of("hmc", num_draws=30, num_burnin_steps=40, num_integration_steps=7)
    assert hmc.fge(1000) == 4 * 70 * 7
    mclmc = spec_of("mclmc", num_draws=30, num_burnin_steps=40, num_steps_bw_draws=5, num_tuning_steps=100)
    assert mclmc.fge(1000) == 4 * (40 + 150 + 100) * 2


def _posterior(target, nbeta, localization):
    objective = target.spec.objective()
    params_star, dataset = jax.device_put((target.params_star, target.dataset))
    star = objective.per_sample_loss(params_star, dataset)
    return make_posterior(objective, params_star, dataset, star, jnp.asarray(nbeta), jnp.asarray(localization)), star


def test_posterior_gradient_by_finite_differences():
    posterior, _ = _posterior(quadratic("float64"), 150.0, 3.0)
    rng = np.random.default_rng(0)
    w = np.asarray(posterior.position_star) + 0.1 * rng.standard_normal(6)
    gradient = np.asarray(jax.grad(posterior.logdensity_fn)(w))
    for i in range(6):
        step = 1e-6 * np.eye(6)[i]
        numeric = float(posterior.logdensity_fn(w + step) - posterior.logdensity_fn(w - step)) / 2e-6
        assert gradient[i] == pytest.approx(numeric, rel=1e-6)
    assert posterior.logdensity_fn(posterior.position_star) == 0
    exact = 0.5 * np.sum(quadratic().spec.curvatures() * np.square(w - np.asarray(posterior.position_star)))
    assert posterior.loss_difference(w, posterior.logdensity_fn(w)) == pytest.approx(exact, rel=1e-9)


def test_minibatch_estimates_are_unbiased_and_pairing_reduces_noise():
    target = quadratic("float64")
    dataset = jax.device_put(target.dataset)
    posterior, star = _posterior(target, 150.0, 3.0)
    w = posterior.position_star + 0.05
    keys = jax.random.split(jax.random.key(0), 4000)
    differences, gradients = jax.vmap(lambda key: posterior.minibatch_difference_and_grad(w, key, 32))(keys)
    exact = float(posterior.loss_difference(w, posterior.logdensity_fn(w)))
    error = differences.std() / len(keys) ** 0.5
    assert abs(differences.mean() - exact) < 3 * error
    full = target.spec.curvatures() * (w - posterior.position_star)
    gradient_error = gradients.std(axis=0) / len(keys) ** 0.5
    assert (jnp.abs(gradients.mean(axis=0) - full) < 4 * gradient_error).all()

    def unpaired(key):
        indices = jax.random.randint(key, (32,), 0, 1000)
        return jnp.mean(target.spec.objective().per_sample_loss({"w": w}, dataset.take(indices))) - jnp.mean(star)

    assert differences.std() < 0.2 * jax.vmap(unpaired)(keys).std()


def test_default_nbeta_is_wbic():
    assert PosteriorSpec().resolve_nbeta(1000) == pytest.approx(1000 / np.log(1000))
    assert PosteriorSpec(nbeta=7).resolve_nbeta(1000) == 7
