"""The parts of an update's change of entropy, against exact entropies and against the same parts by other ways."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest
from test_entropy_adamw import parts
from test_entropy_estimators import APPLY, BATCH, PARAMS, drawn, probabilities
from test_entropy_exact import ENUMERATION, moved
from test_entropy_sequences import batch_of

from lambda_hat.entropy.adamw import AdamW, adam_state, aggregate_gradient, take_apart
from lambda_hat.entropy.attribution import Training, attribution_matrix, entropy_changes, evaluate_references, linearity
from lambda_hat.entropy.estimators import baselines, evaluate, evaluate_chunk, orders
from lambda_hat.entropy.exact import exact_derivatives, exact_entropy
from lambda_hat.entropy.importance import snis
from lambda_hat.entropy.sequences import Batch, all_token_stats
from lambda_hat.targets.policies.objective import group_advantages, sequence_weights

UPDATE = batch_of([1, 2, 3, 0], [1, 2, 0], [1, 3, 2, 2, 0], [1, 3, 1, 1, 1], [1, 1, 2, 0])
HYPER = AdamW(0.9, 0.99, 1e-6, 0.1, 0.05)


@functools.cache
def training():
    """An update of five sequences, by an optimizer that has taken two steps before."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        weights = sequence_weights(group_advantages(np.array([[1, 0, 0, 1, 0]])), UPDATE.mask_BT.sum(1)[None])[0]
        gradient = aggregate_gradient(APPLY, PARAMS, UPDATE, weights)
        optimizer = optax.adamw(1e-2, HYPER.beta1, HYPER.beta2)
        state = jax.jit(optimizer.init)(PARAMS)
        for factor in (0.3, -0.4):
            earlier = jax.tree.map(lambda g, factor=factor: factor * np.cos(3 * np.asarray(g)), gradient)
            state = jax.jit(optimizer.update)(earlier, state, PARAMS)[1]
        return Training(UPDATE, weights, take_apart(HYPER, adam_state(state), PARAMS, gradient))


@functools.cache
def directions():
    """v_i, stacked."""
    return jax.tree.map(np.asarray, parts(APPLY, PARAMS, UPDATE, training().weights, training().update.preconditioner))


def one(index):
    return jax.tree.map(lambda leaf: leaf[index], directions())


def sample(size):
    return Batch(*(array[drawn(np.random.default_rng(5), size)] for array in BATCH))


#: As many as there are completions: programs are compiled once.
SAMPLE = sample(len(BATCH.mask_BT))


def controls(batch, weights=None):
    return baselines(all_token_stats(APPLY, PARAMS, batch), batch.mask_BT, "entropy", weights)


@functools.cache
def matrix():
    return attribution_matrix(APPLY, PARAMS, training(), SAMPLE, controls(SAMPLE), grad_chunk=2, sequence_chunk=32)


def test_columns_are_derivatives_along_the_parts():
    found = orders(APPLY, PARAMS, directions(), SAMPLE, controls(SAMPLE), second=False, direction_chunk=2, sequence_chunk=32)
    assert matrix().shape == (len(SAMPLE.mask_BT), 5)
    np.testing.assert_allclose(matrix(), found.first_KN.T, rtol=1e-8, atol=1e-12)


def test_parts_and_baseline_add_up_to_the_whole():
    update = training().update
    pair = jax.tree.map(lambda *leaves: np.stack(leaves), update.baseline, update.full)
    found = orders(APPLY, PARAMS, pair, SAMPLE, controls(SAMPLE), second=False, direction_chunk=2, sequence_chunk=32)
    baseline, full = found.first_KN
    np.testing.assert_allclose(baseline + matrix().sum(1), full, rtol=1e-9, atol=1e-13)


def test_over_all_completions_columns_are_exact():
    found = attribution_matrix(
        APPLY, PARAMS, training(), BATCH, controls(BATCH, probabilities()), grad_chunk=2, sequence_chunk=32
    )
    columns = np.sum(found * len(found) * probabilities()[:, None], axis=0)
    for index in range(5):
        assert columns[index] == pytest.approx(exact_derivatives(APPLY, PARAMS, one(index), ENUMERATION).first, rel=1e-9)


def test_single_precision():
    wide = entropy_changes(APPLY, PARAMS, training(), SAMPLE, 0.1, grad_chunk=2).grad.change
    expected = matrix()
    params, update = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (PARAMS, training().update))
    narrow = training()._replace(update=update)
    with jax.enable_x64(False):
        found = attribution_matrix(APPLY, params, narrow, SAMPLE, controls(SAMPLE), grad_chunk=5)
        changes = entropy_changes(APPLY, params, narrow, SAMPLE, 0.1, grad_chunk=5).grad.change
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    # Entropies of 3 nats, rounded to 1e-7 of them, change by 1e-3.
    np.testing.assert_allclose(changes, wide, rtol=0, atol=1e-3 * np.abs(wide).max())


@pytest.mark.parametrize("compute", ["matrix", "changes"])
def test_an_interrupted_call_goes_on(compute):
    saved, shown = [], []

    def call(**settings):
        if compute == "matrix":
            return attribution_matrix(
                APPLY, PARAMS, training(), SAMPLE, controls(SAMPLE), grad_chunk=2, sequence_chunk=32, **settings
            )
        found = entropy_changes(APPLY, PARAMS, training(), SAMPLE, 0.1, grad_chunk=2, **settings)
        return np.stack([found.grad.contributions_KN, found.baseline_plus_grad.contributions_KN])

    def stop(columns):
        saved.append(columns)
        if columns.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(save=stop)
    resumed = call(resume=saved[-1], progress=lambda done, total, unit, note: shown.append((done, total)))
    np.testing.assert_array_equal(resumed, call())
    assert [columns.done for columns in saved] == [2, 4]
    assert shown == [(4, 5), (5, 5)]


def test_changes_are_within_their_errors_of_exact_ones():
    eta, update = 0.05, training().update
    # The weights' clip is far beyond any of them.
    found = entropy_changes(APPLY, PARAMS, training(), sample(6000), eta, clip=20.0, grad_chunk=5, sequence_chunk=3000)

    def exact(*steps):
        params = PARAMS
        for step in steps:
            params = moved(params, jax.tree.map(np.asarray, step), eta)
        return exact_entropy(APPLY, params, ENUMERATION)

    def check(estimate, index, change):
        # Of twelve normal deviates one is beyond 3 in every thirty seeds, beyond 3.5 in every two hundred.
        assert abs(estimate.change[index] - change) < 3.5 * estimate.jackknife_error[index]
        assert estimate.bootstrap_error[index] == pytest.approx(estimate.jackknife_error[index], rel=0.25)
        assert estimate.contributions_KN[index].sum() == pytest.approx(estimate.change[index], rel=1e-9)

    check(found.full, 0, exact(update.full) - exact())
    check(found.baseline, 0, exact(update.baseline) - exact())
    for index in range(5):
        check(found.grad, index, exact(one(index)) - exact())
        check(found.baseline_plus_grad, index, exact(update.baseline, one(index)) - exact(update.baseline))


def test_changes_are_those_along_each_part():
    eta = 0.1
    found = entropy_changes(APPLY, PARAMS, training(), SAMPLE, eta, grad_chunk=2)
    base, there = (evaluate(APPLY, PARAMS, directions(), np.full(5, step), SAMPLE, direction_chunk=2) for step in (0.0, eta))
    np.testing.assert_allclose(found.grad.change, snis(base, there).change, rtol=1e-9)


@pytest.mark.parametrize("grad_chunk", [2, 64])
def test_no_more_policies_are_evaluated_than_there_are(monkeypatch, grad_chunk):
    """Chunks are of nearly equal sizes: of five parts three twos or one five."""
    evaluated = []

    def counted(apply, params, directions, etas, *rest):
        evaluated.append(len(etas))
        return evaluate_chunk(apply, params, directions, etas, *rest)

    for module in ("attribution", "estimators"):
        monkeypatch.setattr(f"lambda_hat.entropy.{module}.evaluate_chunk", counted)
    found = entropy_changes(APPLY, PARAMS, training(), SAMPLE, 0.1, grad_chunk=grad_chunk)
    size = {2: 2, 64: 5}[grad_chunk]
    references, parts = -(-3 // size), 2 * -(-5 // size)
    assert evaluated == [size] * (references + parts)
    monkeypatch.undo()
    references = evaluate_references(APPLY, PARAMS, training(), SAMPLE, [0.01, 0.1], grad_chunk=grad_chunk)
    again = entropy_changes(APPLY, PARAMS, training(), SAMPLE, 0.1, grad_chunk=grad_chunk, references=references)
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_a_part_of_nothing_changes_nothing():
    """To the bit, above the baseline too, in float32 as well: what is compared is evaluated alike."""
    weights = training().weights * np.array([1, 0, 1, 1, 1])
    params, update = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (PARAMS, training().update))
    own = Training(UPDATE, weights, update)
    found = entropy_changes(APPLY, params, own, SAMPLE, 0.1, grad_chunk=2)
    assert found.grad.change[1] == found.baseline_plus_grad.change[1] == 0
    assert np.all(found.baseline_plus_grad.change[[0, 2, 3, 4]] != 0)


def test_what_parts_do_together_is_of_second_order():
    residuals = [entropy_changes(APPLY, PARAMS, training(), SAMPLE, eta, grad_chunk=2).residual for eta in (2e-3, 1e-3)]
    assert residuals[0] / residuals[1] == pytest.approx(4, rel=0.05)


def test_linearity():
    etas = np.array([1.0, 2, 3, 4])
    line = linearity(etas, 2 * etas - 1)
    assert line[:3] == pytest.approx((2, -1, 1), rel=1e-12)
    assert line.rmse == pytest.approx(0, abs=1e-12)
    bent = linearity(etas, [0, 0, 0, 1], num_worst=2)
    # The normal equations: slope 0.3, intercept -0.5, residuals 0.2, -0.1, -0.4, 0.3.
    assert bent[:5] == pytest.approx((0.3, -0.5, 1 - 0.3 / 0.75, np.sqrt(0.3 / 4), 0.4), rel=1e-12)
    assert bent.worst == (2, 3)
