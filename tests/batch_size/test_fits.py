"""Fits and smoothing: known minima, slopes, critical batch sizes and collapses, with noise, edges and divergence."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lambda_hat.batch_size.critical import collapse, critical_batch_size, steps_to_target
from lambda_hat.batch_size.fits import optimum, power_slope, richness_slopes, width_transfer
from lambda_hat.batch_size.smoothing import smooth, updates_done
from lambda_hat.specs.spec import InvalidInput

ETAS = 2.0 ** np.arange(-6, 7)
NAN = math.nan


def bowl(centre, curvature=0.1):
    """Losses whose logarithm is a parabola in log2 eta."""
    return 0.3 * np.exp(curvature * np.square(np.log2(ETAS) - centre))


# --- Optima ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [-4.7, -0.5, 0.0, 1.31])
def test_a_parabola_s_minimum_is_exact(centre):
    found = optimum(ETAS, bowl(centre))
    assert found.log2_eta == pytest.approx(centre, abs=1e-9)
    assert found.loss == pytest.approx(0.3, rel=1e-9)
    assert found.flag == ""
    assert found.bracketed
    assert found.error == pytest.approx(0.15)


def test_uneven_grids_in_any_order():
    order = np.random.default_rng(0).permutation(10)
    keep = np.array([0, 1, 3, 4, 5, 7, 8, 9, 11, 12])
    found = optimum(ETAS[keep][order], bowl(1.9)[keep][order])
    assert found.log2_eta == pytest.approx(1.9, abs=1e-9)
    assert found.step == 1


def test_error_over_seeds():
    """Refined minima of seeds around 0.4 scatter; the error is their standard error, and covers the truth."""
    rng = np.random.default_rng(0)
    hits, errors = [], []
    for _ in range(200):
        losses = np.stack([bowl(0.4 + shift) for shift in 0.2 * rng.standard_normal(4)])
        found = optimum(ETAS, losses)
        errors.append(math.sqrt(found.error**2 - 0.15**2))  # of the seeds alone: on parabolas the grid makes none
        hits.append(abs(found.log2_eta - 0.4) < 3.18 * errors[-1])  # t of 3 degrees of freedom, 95 %
    assert 0.9 < np.mean(hits) < 0.99
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("losses", "place", "flag"),
    [
        (bowl(9), 6, "edge"),
        (bowl(-8), -6, "edge"),
        (np.where(ETAS > 2**1.5, NAN, bowl(1.2)), 1, "failure"),
        (np.where(ETAS > 2**2.5, NAN, bowl(1.2)), 1.2, ""),
        (np.where(ETAS > 2**-5.5, NAN, bowl(0)), -6, "edge"),
        (np.where(ETAS > 2**2.5, np.inf, bowl(3)), 2, "failure"),
        (np.full(13, NAN), NAN, "none"),
    ],
)
def test_edges_and_divergence_are_flagged_and_not_fitted(losses, place, flag):
    found = optimum(ETAS, losses)
    assert found.log2_eta == pytest.approx(place, abs=1e-9, nan_ok=True)
    assert found.flag == flag
    assert found.bracketed == (flag in ("", "failure"))
    if flag == "failure":
        assert found.error == pytest.approx(1 / math.sqrt(12))


def test_steep_curves_stay_within_the_grid_s_error():
    """A bowl eight times as steep above its minimum: the parabola's minimum moves with the grid, on average by its error."""
    x = np.log2(ETAS)
    found = []
    for centre in np.linspace(-0.5, 0.5, 40, endpoint=False):
        losses = np.exp(0.1 * np.where(x > centre, 8, 1) * np.square(x - centre))
        found.append(optimum(ETAS, losses).log2_eta - centre)
    assert 0.05 < np.std(found) < 0.2


def test_the_worst_seed_s_flag_is_the_point_s():
    found = optimum(ETAS, np.stack([bowl(0.0), bowl(9.0)]))
    assert found.flag == "edge"
    found = optimum(ETAS, np.stack([bowl(0.0), np.where(ETAS > 1, NAN, bowl(0.0))]))
    assert found.flag == "failure"
    assert found.error == pytest.approx(1 / math.sqrt(12))


def test_zero_and_equal_losses():
    losses = bowl(2.0)
    losses[5] = 0.0
    assert optimum(ETAS, losses).log2_eta == pytest.approx(-1, abs=0.01)
    assert optimum(ETAS, np.where(np.abs(np.log2(ETAS)) < 4, 0.5, 1.0)).bracketed


# --- Slopes ------------------------------------------------------------------------------------------------------------


def test_exact_power():
    x = np.array([1e-3, 1e-2, 1e-1, 1.0])
    found = power_slope(x, 3 * x**1.7)
    assert found.slope == pytest.approx(1.7, rel=1e-12)
    assert math.exp(found.intercept) == pytest.approx(3, rel=1e-10)
    assert found.high - found.low < 1e-10


def test_interval_covers_the_slope():
    rng = np.random.default_rng(1)
    x = np.repeat(np.geomspace(0.01, 1, 4), 3)
    found = [power_slope(x, np.exp(0.5 * np.log(x) + 0.2 * rng.standard_normal(12))) for _ in range(500)]
    covered = np.mean([fit.low <= 0.5 <= fit.high for fit in found])
    assert covered == pytest.approx(0.95, abs=3.5 * math.sqrt(0.95 * 0.05 / 500))
    assert np.std([fit.slope for fit in found]) == pytest.approx(np.mean([fit.error for fit in found]), rel=0.15)


def test_shared_errors_do_not_average_over_seeds():
    """Two points whose seeds all agree: the resolution alone is left, sqrt(2) * error / log of the distance."""
    x = np.repeat([1.0, 100.0], 5)
    found = power_slope(x, x**2, np.full(10, 0.2))
    assert found.error == pytest.approx(0.2 * math.sqrt(2) / math.log(100), rel=1e-9)
    assert power_slope(x, x**2).error < 1e-12


def test_points_left_out_and_too_few():
    x = np.array([1.0, 2, 4, 8])
    found = power_slope(x, [1, 2, 4, 100], keep=[True, True, True, False])
    assert found.slope == pytest.approx(1)
    assert found.left_out == (8.0,)
    assert found.num_x == 3
    assert power_slope(x, [1, NAN, 4, NAN]).left_out == (2.0, 8.0)
    assert math.isnan(power_slope(x, [1, NAN, 4, NAN]).error)
    assert power_slope(x, [1, NAN, NAN, NAN]) is None


def trials(by, centres, seeds=3, noise=0.05, **columns):
    """A table of trials whose log2 eta* is `centres` at the values `by`; losses diverge four octaves above."""
    rng = np.random.default_rng(3)
    rows = []
    name, values = by
    for value, centre in zip(values, centres, strict=True):
        for seed in range(seeds):
            losses = bowl(centre + noise * rng.standard_normal())
            losses[np.log2(ETAS) > centre + 4] = NAN
            rows += [
                {name: value, "eta": eta, "seed": seed, "final_loss": loss, "failure": None, **columns}
                for eta, loss in zip(ETAS, losses, strict=True)
            ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_richness_slopes():
    """eta* ~ richness^2 below 1 and richness^(2/3) above, for three layers; the ends of the grid are beyond its edges."""
    richness = np.array([0.0025, 0.01, 0.015, 0.02, 0.03, 1.0, 10, 20, 40, 1e5])
    centres = np.where(richness < 1, 2 * np.log2(richness / 0.01) - 4, 2 / 3 * np.log2(richness / 10) + 1.5)
    found = richness_slopes(trials(("richness", richness), centres, rate_rule="raw", depth=3, optimizer="sgd"))
    assert found.theory == (2, pytest.approx(2 / 3))
    for slope, theory in zip((found.lazy, found.rich), found.theory, strict=True):
        assert slope.low < theory < slope.high
        assert slope.error < 0.2
    assert found.lazy.left_out == (richness[0],)
    assert found.rich.left_out == (1e5,)
    assert [of.flag for of in found.optima] == ["edge", *[""] * 8, "edge"]
    np.testing.assert_allclose([of.log2_eta for of in found.optima[1:-1]], centres[1:-1], atol=0.1)


def test_richness_slopes_refuse_mixtures():
    table = trials(("richness", [0.01, 0.02]), [0, 1], rate_rule="raw", depth=2, optimizer="adam")
    assert richness_slopes(table).theory == (1, 0.5)
    assert richness_slopes(table).rich is None
    with pytest.raises(InvalidInput, match="rate_rule=raw"):
        richness_slopes(table.assign(rate_rule="standard"))
    with pytest.raises(InvalidInput, match="alone"):
        richness_slopes(pd.concat([table, table.assign(batch_size=2)]))


def test_width_transfer():
    widths = [32, 128, 512]
    same = width_transfer(trials(("width", widths), [1.2, 1.2, 1.2]))
    np.testing.assert_allclose(same.shifts, 0, atol=0.15)
    assert same.slope.low < 0 < same.slope.high
    falls = width_transfer(trials(("width", widths), [1, 0, -1]))
    np.testing.assert_allclose(falls.shifts, [0, -1, -2], atol=0.15)
    assert falls.slope.slope == pytest.approx(-0.5, abs=0.05)
    beyond = width_transfer(trials(("width", widths), [1, 3, 9]))
    assert math.isnan(beyond.shifts[2])
    assert beyond.slope.left_out == (512,)


# --- Batch size --------------------------------------------------------------------------------------------------------


def test_steps_to_target_interpolates():
    steps = np.arange(1, 101)
    losses = np.exp(-0.05 * updates_done(steps))
    assert steps_to_target((steps, losses), 0.1) == pytest.approx(math.log(10) / 0.05, rel=1e-9)
    # Means over ten steps of the same curve: the same answer, to the curvature of the curve over ten steps.
    sparse = steps[9::10]
    means = losses.reshape(10, 10).mean(axis=1)
    assert steps_to_target((sparse, means), 0.1) == pytest.approx(math.log(10) / 0.05, abs=0.5)
    assert steps_to_target((steps, losses), 1e-3) is None
    assert steps_to_target((steps, losses), 2.0) == 0
    assert steps_to_target((steps, np.where(steps > 20, NAN, losses)), 0.1) is None
    assert steps_to_target((np.array([1, 2]), np.array([1.0, 0.0])), 0.5) == 1


def test_critical_batch_size_is_recovered():
    sizes = np.repeat(2.0 ** np.arange(0, 13), 3)
    exact = 200 * (1 + 50 / sizes)
    found = critical_batch_size(sizes, exact)
    assert found.batch_size == pytest.approx(50, rel=1e-6)
    assert found.min_steps == pytest.approx(200, rel=1e-6)
    assert found.min_samples == pytest.approx(10_000, rel=1e-6)
    assert found.in_range
    # S B / (S B at 1) = (1 + B/50) / (1 + 1/50) is 1.2 at B = 11.2.
    assert found.linear_limit == pytest.approx(11.2, rel=0.05)

    rng = np.random.default_rng(2)
    runs = [critical_batch_size(sizes, exact * np.exp(0.1 * rng.standard_normal(39))) for _ in range(300)]
    for name, value in (("batch_size", 50), ("min_steps", 200), ("min_samples", 10_000)):
        covered = np.mean([low <= value <= high for low, high in (getattr(run, f"{name}_interval") for run in runs)])
        assert covered == pytest.approx(0.95, abs=0.045)


def test_critical_batch_size_of_partial_data():
    sizes = 2.0 ** np.arange(10)
    steps = [*(100 * (1 + 30 / sizes[:-2])), None, NAN]
    assert critical_batch_size(sizes, steps).batch_size == pytest.approx(30, rel=1e-6)
    assert critical_batch_size(sizes[:2], steps[:2]) is None
    # Linear scaling all the way: nothing is known of B_crit but that it is larger.
    noise = np.exp(0.03 * np.random.default_rng(0).standard_normal(10))
    linear = critical_batch_size(sizes, 1e6 / sizes * noise)
    assert not linear.in_range
    assert linear.batch_size > 512
    assert linear.linear_limit is None
    # No gain from batches at all.
    flat = critical_batch_size(sizes, np.full(10, 100.0) * noise)
    assert not flat.in_range
    assert flat.batch_size < 1


def loss_curve(size, seed=0, noise=0.0, floor=0.0):
    steps = np.unique(np.geomspace(1, max(8, 2**14 // size), 60).astype(int))
    samples = size * updates_done(steps)
    rng = np.random.default_rng(seed)
    return steps, (1 / (1 + samples / 100) + floor) * np.exp(noise * rng.standard_normal(len(steps)))


def test_collapse_and_where_it_breaks():
    sizes = [2, 4, 8, 16, 32]

    # Larger batches are slower by 1 + B/64 at the same samples: log loss differs by up to log of that.
    def slower(size):
        steps, losses = loss_curve(size)
        return steps, losses * (1 + size / 64)

    exact = collapse([(size, loss_curve(size)) for size in sizes])
    np.testing.assert_allclose(exact.differences, 0, atol=0.02)
    assert exact.breaks_at is None
    found = collapse([(size, slower(size)) for size in sizes], tolerance=0.1)
    expected = [math.log((1 + size / 64) / (1 + 2 / 64)) for size in sizes]
    np.testing.assert_allclose(found.differences, expected, atol=0.02)
    # log((1 + B/64) / (1 + 2/64)) = 0.1 at B = 8.94.
    assert found.breaks_at == pytest.approx(8.94, rel=0.15)


def test_collapse_subtracts_the_scatter_of_seeds():
    curves = [(size, loss_curve(size, 10 * size + seed, noise=0.2)) for size in (2, 4, 8) for seed in range(4)]
    with_seeds = collapse(curves)
    alone = collapse([(size, loss_curve(size, 10 * size, noise=0.2)) for size in (2, 4, 8)])
    assert with_seeds.breaks_at is None
    assert alone.differences[1:].min() > 0.15
    assert with_seeds.differences.max() < 0.08


def test_collapse_with_divergence():
    steps, losses = loss_curve(8)
    diverged = (steps, np.where(steps > 20, NAN, losses))
    found = collapse([(2, loss_curve(2)), (4, loss_curve(4)), (8, diverged)])
    assert np.isinf(found.differences[2])
    assert found.breaks_at == 8
    found = collapse([(1, diverged), (2, loss_curve(2)), (4, loss_curve(4))])
    assert list(np.isinf(found.differences)) == [True, False, False]
    assert found.differences[1] == 0
    assert found.breaks_at is None
    assert collapse([(1, diverged)]) is None


# --- Smoothing ---------------------------------------------------------------------------------------------------------


def test_updates_done():
    np.testing.assert_array_equal(updates_done(np.array([1, 2, 3, 5, 10])), [0, 1, 2, 3.5, 7])


def test_points_weigh_as_many_steps_as_they_stand_for():
    steps = np.array([1, 2, 3, 6, 7, 8])  # their steps: 0-1, 1-2, 2-3, 3-6, 6-7, 7-8
    losses = np.array([1.0, 2, 3, 4, 5, 6])
    # The middle of the fourth is 4.5: a window of 7 reaches from 1 to 8, one of 6.9 from 2 to 7.
    assert smooth(steps, losses, window=7)[3] == pytest.approx((2 + 3 + 3 * 4 + 5 + 6) / 7)
    assert smooth(steps, losses, window=6.9)[3] == pytest.approx((3 + 3 * 4 + 5) / 5)
    # The middle of the fifth is 6.5, with 1.5 steps to its right: the three steps to its left do not fit into as many.
    assert smooth(steps, losses, window=7)[4] == pytest.approx((5 + 6) / 2)
    np.testing.assert_array_equal(smooth(steps, losses, window=1), losses)


def test_relative_windows_follow_the_steps():
    steps = np.arange(1, 1001)
    line = 1000.0 - updates_done(steps)
    np.testing.assert_allclose(smooth(steps, line, relative=0.2), line, rtol=1e-9)
    noise = smooth(steps, np.random.default_rng(0).standard_normal(1000), relative=0.2)
    # A window of 0.2 * 800 steps, and of 0.2 * 50.
    assert noise[700:900].std() < 0.3
    assert noise[45:55].std() > noise[700:900].std()
    np.testing.assert_allclose(noise[0], np.random.default_rng(0).standard_normal(1)[0])


def test_windows_shorter_than_a_jump_in_the_schedule_do_not_cross_it():
    steps = np.concatenate([np.arange(1, 21), 20 + 100 * np.arange(1, 11)])
    losses = np.concatenate([np.full(20, 7.0), np.full(10, 1.0)])
    np.testing.assert_array_equal(smooth(steps, losses, window=80), losses)
    # The window of the first point after it, from -80 to 220, holds all twenty before it, for a hundred steps' weight to come.
    crossing = smooth(steps, losses, window=300)
    np.testing.assert_array_equal(crossing[:20], losses[:20])
    np.testing.assert_array_equal(crossing[21:], losses[21:])


def test_an_interleaved_schedule_is_smoothed():
    """Even points with log-spaced ones between them: numbers of steps that jump all the time."""
    steps = np.unique(np.concatenate([np.linspace(40, 2000, 50), np.geomspace(1, 2000, 50)]).astype(int))
    counts = np.diff(steps, prepend=0)
    noise = np.random.default_rng(0).standard_normal(len(steps)) / np.sqrt(counts)
    trend = 1 - updates_done(steps) / 2000
    found = smooth(steps, trend + noise, relative=0.3)
    late = (steps > 1000) & (steps < 1700)
    # Windows of some 400 steps: a standard deviation of 1/20, where points of 40 steps have 1/6.
    assert np.std((found - trend)[late]) < 0.08
    # Windows of few unequal points are off centre by less than one of them, of the trend's 1/50 at most.
    assert np.max(np.abs(smooth(steps, trend, relative=0.3) - trend)) < 0.012


def test_divergence_is_not_mixed_with_what_was_before():
    steps = np.arange(1, 31)
    losses = np.concatenate([np.full(20, 7.0), np.full(4, 1.0), [np.inf, 1.0], np.full(4, NAN)])
    found = smooth(steps, losses, window=9)
    assert np.isfinite(found[:24]).all()
    assert np.isnan(found[24:]).all()
    assert found[23] == 1
    assert found[20] == pytest.approx((3 * 7 + 4) / 7)


def test_one_width_is_given():
    for widths in ({}, {"window": 2.0, "relative": 0.1}, {"window": 0}):
        with pytest.raises(InvalidInput, match="one positive width"):
            smooth(np.arange(1, 4), np.ones(3), **widths)
