"""Estimates of entropy changes, against the exact ones of policies whose completions can all be enumerated."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from test_entropy_exact import ENUMERATION, direction_like, moved
from test_entropy_sequences import tiny_policy

from lambda_hat.entropy.estimators import baselines, evaluate, orders
from lambda_hat.entropy.exact import completion_probabilities, exact_derivatives, exact_entropy
from lambda_hat.entropy.importance import Evaluation, snis
from lambda_hat.entropy.sequences import Batch, all_token_stats
from lambda_hat.specs.spec import InvalidInput

NUM_DIRECTIONS = 3
INTEGRANDS = ("entropy", "surprisal", "entropy_per_token")
APPLY, PARAMS = tiny_policy()
DIRECTIONS = direction_like(jax.tree.map(lambda leaf: np.stack([leaf] * NUM_DIRECTIONS), PARAMS), scale=0.5)
BATCH = ENUMERATION.batch


def direction(index):
    return jax.tree.map(lambda leaf: leaf[index], DIRECTIONS)


@functools.cache
def probabilities():
    return completion_probabilities(APPLY, PARAMS, ENUMERATION)


@functools.cache
def evaluation(*etas, integrand="entropy"):
    """Every completion under every direction, for every eta: (etas, directions, completions)."""
    found = [evaluate(APPLY, PARAMS, DIRECTIONS, np.full(NUM_DIRECTIONS, eta), BATCH, integrand, 2, 32) for eta in etas]
    return [np.stack(parts) for parts in zip(*found, strict=True)]


@functools.cache
def base(integrand="entropy"):
    logp, h = evaluation(0.0, integrand=integrand)
    return Evaluation(logp[0, :1], h[0, :1])


@functools.cache
def exact(index):
    return exact_derivatives(APPLY, PARAMS, direction(index), ENUMERATION)


@functools.cache
def exact_change(index, eta):
    return exact_entropy(APPLY, moved(PARAMS, direction(index), eta), ENUMERATION) - exact(0).entropy


def enumerated_orders(integrand="entropy", with_baselines=True, dtype=np.float64, direction_chunk=2):
    params, directions = (jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (PARAMS, DIRECTIONS))
    controls = baselines(all_token_stats(APPLY, params, BATCH), BATCH.mask_BT, integrand, probabilities())
    return orders(
        APPLY, params, directions, BATCH, controls if with_baselines else np.zeros_like(controls),
        integrand, True, probabilities(), direction_chunk, 32,
    )  # fmt: skip


def drawn(rng, size):
    return rng.choice(len(probabilities()), size, p=probabilities())


def rows(evaluated, chosen):
    return Evaluation(evaluated.logp_KN[:, chosen], evaluated.h_KN[:, chosen])


# --- Derivatives -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrand", ["entropy", "surprisal"])
def test_orders_over_all_completions_are_exact(integrand):
    found = enumerated_orders(integrand)
    for index in range(NUM_DIRECTIONS):
        assert found.first[index] == pytest.approx(exact(index).first, rel=1e-10)
        assert found.second[index] == pytest.approx(exact(index).second, rel=1e-10)


def test_orders_of_the_mean_over_tokens():
    step = 1e-3
    etas = (-2 * step, -step, 0.0, step, 2 * step)
    logp, h = evaluation(*etas, integrand="entropy_per_token")
    means = np.sum(np.exp(logp) * h, axis=-1) / ENUMERATION.num_prompts
    lengths = BATCH.mask_BT.sum(1)
    sums = evaluation(*etas)[1]
    np.testing.assert_allclose(h, sums / lengths, rtol=1e-12)
    found = enumerated_orders("entropy_per_token")
    np.testing.assert_allclose(found.first, (means[0] - 8 * means[1] + 8 * means[3] - means[4]) / (12 * step), rtol=1e-7)
    curvature = (-means[0] + 16 * means[1] - 30 * means[2] + 16 * means[3] - means[4]) / (12 * step**2)
    np.testing.assert_allclose(found.second, curvature, rtol=1e-4)


@pytest.mark.parametrize("integrand", INTEGRANDS)
def test_baselines_change_the_noise_alone(integrand):
    with_them, without = enumerated_orders(integrand), enumerated_orders(integrand, with_baselines=False)
    np.testing.assert_allclose(with_them.first, without.first, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(with_them.second, without.second, rtol=1e-9, atol=1e-12)
    weights = probabilities()
    assert np.all(np.sum(with_them.first_KN**2 / weights, axis=1) < np.sum(without.first_KN**2 / weights, axis=1))


def test_single_precision_and_other_chunks():
    found = enumerated_orders(dtype=np.float32, direction_chunk=4)
    np.testing.assert_allclose(found.first, enumerated_orders().first, rtol=1e-4)
    np.testing.assert_allclose(found.second, enumerated_orders().second, rtol=1e-4)


def test_orders_of_a_sample_are_unbiased_and_know_their_errors():
    rng = np.random.default_rng(0)
    stats = all_token_stats(APPLY, PARAMS, BATCH)
    # A sample of 40 is one sequence of a batch of 200 x 40, whose baselines are its own 40's.
    chosen = drawn(rng, 200 * 40)
    blocks = [
        baselines(type(stats)(*(a[part] for a in stats)), BATCH.mask_BT[part], "entropy") for part in np.split(chosen, 200)
    ]
    sample = Batch(*(array[chosen] for array in BATCH))
    found = orders(APPLY, PARAMS, DIRECTIONS, sample, np.concatenate(blocks), direction_chunk=3, sequence_chunk=8000)
    for contributions, order in ((found.first_KN, "first"), (found.second_KN, "second")):
        means = 200 * contributions.reshape(NUM_DIRECTIONS, 200, 40).sum(-1)
        for index in range(NUM_DIRECTIONS):
            error = np.std(means[index]) / 200**0.5
            assert abs(means[index].mean() - getattr(exact(index), order)) < 3.5 * error
    # The first order's own error, of each sample, is the spread of the samples.
    per_sample = 200 * found.first_KN.reshape(NUM_DIRECTIONS * 200, 40)
    errors = np.sqrt(40) * np.std(per_sample, axis=1, ddof=1)
    spread = np.std(per_sample.reshape(NUM_DIRECTIONS, 200, 40).sum(-1), axis=1)
    np.testing.assert_allclose(np.sqrt(np.mean(errors.reshape(NUM_DIRECTIONS, 200) ** 2, axis=1)), spread, rtol=0.2)


def test_where_linearity_breaks():
    found = enumerated_orders()
    etas = found.linear_until(0.1)
    for index, eta in enumerate(etas):
        assert abs(found.ratio(eta)[index] - 1) == pytest.approx(0.1, rel=1e-9)
        # What is left is of the third order.
        left = [exact_change(index, e) - found.change(e)[index] for e in (0.004, 0.002)]
        assert left[0] / left[1] == pytest.approx(8, rel=0.1)


def test_the_second_order_is_asked_for():
    first = orders(
        APPLY, PARAMS, DIRECTIONS, BATCH, np.zeros(BATCH.mask_BT.shape), second=False, direction_chunk=2, sequence_chunk=32
    )
    assert first.first.shape == (NUM_DIRECTIONS,)
    with pytest.raises(InvalidInput, match="second=True"):
        first.change(0.1)


# --- Importance sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrand", ["entropy", "surprisal"])
def test_snis_is_within_its_errors(integrand):
    etas = (0.02, 0.1, 0.3)
    rng = np.random.default_rng(1)
    for eta, logp, h in zip(etas, *evaluation(*etas, integrand=integrand), strict=True):
        chosen = drawn(rng, 5000)
        found = snis(rows(base(integrand), chosen), rows(Evaluation(logp, h), chosen))
        for index in range(NUM_DIRECTIONS):
            assert abs(found.change[index] - exact_change(index, eta)) < 3 * found.jackknife_error[index]
        np.testing.assert_allclose(found.bootstrap_error, found.jackknife_error, rtol=0.2)
        np.testing.assert_allclose(found.contributions_KN.sum(1), found.change, rtol=1e-12)


def test_snis_errors_cover():
    eta, size, repetitions = 0.2, 400, 200
    (logp,), (h,) = evaluation(eta)
    rng = np.random.default_rng(2)
    covered = np.zeros((2, NUM_DIRECTIONS))
    for repetition in range(repetitions):
        chosen = drawn(rng, size)
        found = snis(rows(base(), chosen), rows(Evaluation(logp, h), chosen), seed=repetition)
        misses = np.abs(found.change - [exact_change(index, eta) for index in range(NUM_DIRECTIONS)])
        covered += [misses < 2 * found.jackknife_error, misses < 2 * found.bootstrap_error]
    # 95 % nominal; three standard deviations of a binomial of 200 are 4.6 %, and the bias takes a little.
    assert np.all(covered / repetitions > 0.9)
    assert np.all(covered / repetitions < 0.995)


def test_no_change_is_exactly_zero():
    directions = jax.tree.map(lambda leaf: leaf.copy(), DIRECTIONS)
    for leaf in jax.tree.leaves(directions):
        leaf[1] = 0
    for dtype in (np.float32, np.float64):
        params, narrow = (jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), tree) for tree in (PARAMS, directions))
        none = evaluate(APPLY, params, narrow, np.zeros(NUM_DIRECTIONS), BATCH, "entropy", 2, 32)
        there = evaluate(APPLY, params, narrow, np.full(NUM_DIRECTIONS, 0.1), BATCH, "entropy", 2, 32)
        found = snis(none, there)
        assert found.change[1] == found.jackknife_error[1] == 0
        assert found.change[0] != 0
        assert found.ess[1] == pytest.approx(len(BATCH.mask_BT), rel=1e-12)
        assert not found.log_weight_quantiles[1].any()


def test_clipping_is_reported():
    (logp,), (h,) = evaluation(0.3)
    free, cut = snis(base(), Evaluation(logp, h)), snis(base(), Evaluation(logp, h), clip=0.1)
    raw = logp - base().logp_KN
    np.testing.assert_array_equal(free.clip_fraction, 0)
    np.testing.assert_allclose(cut.clip_fraction, np.mean(np.abs(raw) > 0.1, axis=1))
    weights = np.exp(np.clip(raw, -0.1, 0.1))
    np.testing.assert_allclose(cut.change, np.sum(weights * h, axis=1) / weights.sum(1) - base().h_KN.mean(), rtol=1e-10)
    np.testing.assert_allclose(cut.ess, weights.sum(1) ** 2 / (weights**2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(cut.log_weight_quantiles[:, [0, -1]], np.stack([raw.min(1), raw.max(1)], 1))
