"""Plots and report of an entropy study: of known numbers each shows what it should, and none fails on any shape."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from matplotlib.text import Text
from test_report import PNG, Page, assert_needs_nothing_else

from lambda_hat.entropy.analysis import (
    all_influences,
    exchange_fit,
    influences,
    outliers,
    quartile_table,
    r_squared,
    rank_correlation,
    rates,
    signs,
)
from lambda_hat.entropy.plots import CAPTIONS, PLOTS, draw_plots
from lambda_hat.entropy.plots.common import label, plain, views
from lambda_hat.entropy.report import entropy_report
from lambda_hat.entropy.spec import EntropySpec
from lambda_hat.entropy.study import EntropyStudy, Measured, PolicyTraining
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.studies.plots import Drawn
from lambda_hat.targets.policies.spec import PolicySpec

NUM_STEPS, ETA_POLICY = 40, 1e-2
#: R = -A exp(H) + B.
A, B = 0.3, 1.1
#: Rewards of a group, what its sequences add to dH/deta, and the surprisals of their least likely tokens.
REWARDS = np.array([1.0, 0.0, 0.0, 1.0])
INFLUENCE, SURPRISAL = np.array([-1.0, 2.0, 9.0, 0.5]), np.array([0.2, 2.0, 4.0, 0.1])
#: dH/deta along the baseline, its standard error, and the second derivative along the whole.
BASELINE, BASELINE_ERROR, SECOND = -30.0, 0.7, 800.0
SPREAD = 0.5


def policy(seed=0, checkpoint=None, **rl):
    return PolicySpec(seed=seed, checkpoint=checkpoint, rl={"num_steps": NUM_STEPS, "num_checkpoints": 41} | rl)


def training(spec, entropy=None):
    """A policy whose accuracy and entropy are exactly on the curve."""
    steps = np.arange(1, NUM_STEPS + 1)
    entropy = np.linspace(1.2, 0.1, NUM_STEPS) if entropy is None else entropy
    history = {"step": steps, "accuracy": B - A * np.exp(entropy), "entropy": 2 * entropy, "token_entropy": entropy}
    return PolicyTraining(spec.target_id, spec, {"num_params": 99}, history)


def influence_of(groups, scale=1.0):
    """Distinct numbers; those of the third sequence of each group are far from the others."""
    return scale * (np.tile(INFLUENCE, groups) + 0.01 * np.arange(4 * groups))


def matrix_of(sums, size):
    """Columns with these sums and the standard errors SPREAD |sum| / sqrt(size - 1)."""
    rows = 1 + SPREAD * (-1.0) ** np.arange(size)
    return rows[:, None] * sums[None] / size


def measurement(spec, groups=3, size=10, batches=1, etas=(1e-3, 1e-2), exact=True, scale=1.0, texts=("1+{}=", "{}"), **changed):
    count = 4 * groups
    sums = influence_of(groups, scale)
    number, reward = np.arange(count), np.tile(REWARDS, groups)
    surprisal = np.tile(SURPRISAL, groups) + 0.001 * number
    columns = {"surprisal": 1.5 * surprisal, "mean_surprisal": 0.75 * surprisal, "max_surprisal": surprisal,
               "max_surprisal_position": 0, "entropy": 1.0, "mean_entropy": 0.5}  # fmt: skip
    update = pd.DataFrame({
        "sequence": number, "prompt_id": number // 4, "prompt": [texts[0].format(i) for i in number],
        "completion": [texts[1].format(i) for i in number], "answer": "7", "reward": reward,
        "advantage": reward - REWARDS.mean(), "weight": 0.1, "length": 2 + number % 2, **columns, "gradient_norm": 1.0,
        "id": "u", "checkpoint": spec.checkpoint, "seed": 0, "attempt": 0,
    })  # fmt: skip
    drawn = pd.DataFrame({"sequence": np.arange(size), "prompt": "1+1=", "completion": "2", "reward": 1.0, "entropy": 1.0})
    first = BASELINE * scale + sums.sum()
    second = SECOND * scale
    influence, changes, found = [], [], []
    for batch in range(batches):
        for eta in etas:
            influence.append(pd.DataFrame({
                "evaluation": batch, "eta": eta, "sequence": number, "change": eta * sums * (1 + eta), "error": eta * 0.1,
                "change_on_baseline": eta * sums, "error_on_baseline": eta * 0.1, "first_order": eta * sums,
                "first_order_error": eta * 0.2, "ess": size * (0.9 - 0.1 * (number == 2)), "clip_fraction": 0.0,
            }))  # fmt: skip
            changes.append({
                "evaluation": batch, "eta": eta, "full": 0.9 * eta * first, "full_error": 0.1 * eta, "baseline": eta * BASELINE,
                "baseline_error": 0.2 * eta, "grad_sum": eta * sums.sum(), "residual": -0.1 * eta * first,
                "first_order": eta * first, "first_order_error": 0.3 * eta, "second_order": eta * first + eta**2 * second / 2,
                "exact": 0.95 * eta * first if exact else np.nan, "ess": 0.6 * size, "clip_fraction": 0.125,
            })  # fmt: skip
        found.append({
            "num_sequences": size, "entropy": 1.0 + batch, "entropy_error": 0.05, "exact_entropy": 1.25 if exact else None,
            "first": first, "first_error": 2.0, "second": second, "second_error": 10.0,
            "eta_star": 0.2 * abs(first) / second if second else None,
            "baseline_first": BASELINE * scale, "baseline_first_error": BASELINE_ERROR, "grad_first": sums.sum(),
            "truncated": 0,
            "linearity": {"slope": 0.9 * first, "intercept": 0.0, "r_squared": 0.987, "rmse": 0.0, "max_residual": 0.0,
                          "worst": [0]} if len(etas) > 1 else None,
        })  # fmt: skip
    summary = {
        "checkpoint": spec.checkpoint, "eta_policy": ETA_POLICY, "num_update": count, "num_groups": groups,
        "groups_asked": groups, "resample_attempts": 0, "shortfall": 0, "accuracy": 0.4375, "clip": 0.5, "gradient_norm": 2.0,
        "covariance": 0.0625, "integrand": "entropy", "evaluations": found, "seconds": 1.5, "made_with": {}, "truncated": 0,
    } | changed  # fmt: skip
    own = EntropySpec(
        target=spec, etas=etas, update={"num_prompts": groups, "num_completions": 4},
        evaluation={"num_prompts": size, "num_batches": batches},
    )  # fmt: skip
    matrices = [matrix_of(sums, size)] * batches
    return Measured(
        own.entropy_id, own, summary, update, [drawn] * batches, matrices, pd.concat(influence), pd.DataFrame(changes)
    )


def llcs_of(policies):
    rows = [{"target_id": of.target_id, "checkpoint": step, "llc": 10 + step / 10, "mcse": 0.5, "verdict": verdict}
            for of in policies for step, verdict in ((0, "ok"), (20, "ok"), (40, "negative llc"))]  # fmt: skip
    return pd.DataFrame(rows)


def study_of(seeds=(0, 1), checkpoints=(0, 20), llcs=True, entropy=None, **measured):
    policies = [training(policy(seed), entropy) for seed in seeds]
    found = [measurement(policy(seed, step), **measured) for seed in seeds for step in checkpoints]
    by_id = {of.target_id: of for of in policies}
    return EntropyStudy("study", found, by_id, llcs_of(policies) if llcs else None)


def alone(**measured):
    """A study of one measurement."""
    return study_of(seeds=(3,), checkpoints=(20,), **measured)


def without_errors(study):
    """As where one evaluation sequence has all the weight, or only one is known."""
    for measured in study.measured:
        for table, columns in ((measured.changes, ("full_error", "baseline_error")), (measured.influence, ("error",))):
            for index, column in enumerate(columns):
                table[column] = np.where(np.arange(len(table)) % 2 == index, np.inf, np.nan)
        measured.summary["evaluations"][0] |= {"eta_star": np.inf}
        del measured.summary["evaluations"][0]["baseline_first_error"]
        del measured.summary["evaluations"][0]["linearity"]
    return study


def without_curves(study):
    return study._replace(policies={name: of._replace(history={}) for name, of in study.policies.items()})


def texts(fig):
    """Of the figure's title, its panels' titles, annotations and legends."""
    legends = [*fig.legends, *(ax.get_legend() for ax in fig.axes if ax.get_legend())]
    parts = [part.get_suptitle() for part in (fig, *fig.subfigs)]
    written = [text.get_text() for ax in fig.axes for text in ax.texts]
    return [*parts, *(ax.get_title() for ax in fig.axes), *written, *(t.get_text() for of in legends for t in of.get_texts())]


def points(ax):
    """Of each line drawn with errors: its points and the lengths of its error bars, none without."""
    found = []
    for container in ax.containers:
        if hasattr(container, "has_yerr"):
            data, _, bars = container.lines
            lengths = np.diff([segment[:, 1] for segment in bars[0].get_segments()], axis=1)[:, 0] / 2 if bars else None
            found.append((None if data is None else data.get_xydata(), lengths))
    return found


# --- Analysis ----------------------------------------------------------------------------------------------------------


def test_exchange_fit_recovers_its_curve():
    entropy = np.linspace(0.1, 2.0, 50)
    found = exchange_fit(entropy, B - A * np.exp(entropy))
    np.testing.assert_allclose(found, (A, B, 1.0, 50), rtol=1e-12)
    noisy = B - A * np.exp(entropy) + 0.1 * np.random.default_rng(0).normal(size=50)
    line = scipy.stats.linregress(np.exp(entropy), noisy)
    np.testing.assert_allclose(exchange_fit(entropy, noisy)[:3], (-line.slope, line.intercept, line.rvalue**2), rtol=1e-9)
    with_gap = exchange_fit(np.append(entropy, np.nan), np.append(noisy, 0.3))
    np.testing.assert_allclose(with_gap, exchange_fit(entropy, noisy))
    assert exchange_fit([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]) is None
    assert exchange_fit([0.5, 0.6], [0.1, 0.2]) is None


def test_r_squared():
    y = np.array([1.0, 2.0, 6.0])
    assert r_squared(y, y) == 1
    assert r_squared(y, np.full(3, 3.0)) == 0
    assert r_squared(y, -y) == pytest.approx(1 - 4 * 41 / 14)
    assert r_squared(np.zeros(3), np.zeros(3)) == 1
    assert r_squared(np.zeros(3), y) == -np.inf


def test_rank_correlation():
    x, y = np.random.default_rng(1).integers(0, 6, (2, 40))
    assert rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, rel=1e-12)
    assert rank_correlation(x, x**3) == pytest.approx(1)
    assert np.isnan(rank_correlation(x, np.ones(40)))


def test_outliers():
    # The quartiles are 3 and 7, the fences at -3 and 13.
    values = np.array([-3.0, 2, 3, 4, 5, 6, 7, 8, 13])
    assert not outliers(values).any()
    values[[0, -1]] += [-0.1, 0.1]
    assert list(outliers(values)) == [True, *[False] * 7, True]


def test_influences_are_column_sums():
    found = influences(measurement(policy(0, 20), groups=3, size=10, batches=2))
    expected = influence_of(3)
    np.testing.assert_allclose(found["influence"], expected, rtol=1e-12)
    # The mean of two independent batches.
    np.testing.assert_allclose(found["influence_error"], SPREAD * np.abs(expected) / np.sqrt(9) / np.sqrt(2), rtol=1e-12)
    np.testing.assert_allclose(found["share"], np.abs(expected) / np.abs(expected).sum(), rtol=1e-12)
    assert list(found["correct"]) == [True, False, False, True] * 3
    assert list(found["quartile"]) == [2, 3, 4, 1] * 3


def test_quartile_table():
    study = study_of(groups=3)
    table = quartile_table(all_influences(study))
    assert list(table.index) == [(False, 3), (False, 4), (True, 1), (True, 2)]
    assert list(table["sequences"]) == [12] * 4
    sums = influence_of(3).reshape(3, 4)
    np.testing.assert_allclose(table["mean"], sums.mean(axis=0)[[1, 2, 3, 0]])
    np.testing.assert_allclose(table["error"], np.tile(sums, (4, 1)).std(axis=0, ddof=1)[[1, 2, 3, 0]] / np.sqrt(12))
    np.testing.assert_allclose(table["share"], np.abs(sums).sum(axis=0)[[1, 2, 3, 0]] / np.abs(sums).sum())
    assert table["share"].sum() == pytest.approx(1)
    one = quartile_table(influences(study.measured[0]))
    np.testing.assert_allclose(one["share"], table["share"])


def test_rates_of_several_evaluation_batches():
    found = rates(measurement(policy(0, 20), size=10, batches=2))
    sums = influence_of(3).sum()
    np.testing.assert_allclose((found.full, found.baseline, found.grad), (BASELINE + sums, BASELINE, sums))
    errors = (2.0, BASELINE_ERROR, SPREAD * sums / np.sqrt(9))
    np.testing.assert_allclose((found.full_error, found.baseline_error, found.grad_error), np.array(errors) / np.sqrt(2))


@pytest.mark.parametrize(("covariance", "scale", "expected"), [(0.1, 1, "same"), (-0.1, 1, "opposite"), (0.1, 0.01, "unclear")])
def test_signs(covariance, scale, expected):
    # dH/deta is 1.66 scale times ...; see `influence_of`.
    one = measurement(policy(0, 20), groups=4, scale=scale, covariance=covariance)
    assert np.sign(rates(one).full) == 1
    assert signs(one) == expected


# --- Plots -------------------------------------------------------------------------------------------------------------

TRAINED, OF_TWO = {"training", "exchange"}, {"covariance"}
#: Letters that no font has, breaks, mathematics and markup.
STRANGE = ("$x^{0} \N{CJK UNIFIED IDEOGRAPH-4E2D}\n\x07" * 20, "${0}$ </b>" * 9)
#: A study, and the plots that do not apply to it.
SHAPES = {
    "several batches": (lambda: study_of(seeds=(0,), batches=2), set()),
    "nothing measured": (lambda: study_of(checkpoints=()), set(PLOTS) - TRAINED),
    "no policies": (lambda: alone()._replace(policies={}), TRAINED | OF_TWO),
    "nothing at all": (lambda: EntropyStudy("none", [], {}), set(PLOTS)),
    "one measurement": (alone, OF_TWO),
    "no training": (lambda: without_curves(alone()), TRAINED | OF_TWO),
    "errors unknown": (lambda: without_errors(alone()), OF_TWO),
    "nothing optional": (lambda: alone(exact=False, llcs=False, etas=(1e-2,)), OF_TWO),
    "few sequences": (lambda: study_of(seeds=(0,), groups=1, size=2), set()),
    "no influence": (lambda: alone(scale=0.0), OF_TWO),
    "constant entropy": (
        lambda: alone(entropy=np.full(NUM_STEPS, 0.5))._replace(llcs=llcs_of([])), {"exchange"} | OF_TWO,
    ),
    "many": (lambda: study_of(seeds=range(3), checkpoints=range(0, 40, 4), batches=2, groups=2, size=4), set()),
    "strange texts": (lambda: alone(texts=STRANGE), OF_TWO),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_plot_draws_every_shape_or_does_not_apply(shape):
    make, missing = SHAPES[shape]
    drawn, left_out = draw_plots(make())
    assert set(drawn) == set(PLOTS) - missing
    assert set(left_out) == missing
    assert all(reason.startswith(("it needs", "it takes", "no policy")) for reason in left_out.values())
    page = Page(report(make(), Drawn({}, left_out)))
    assert [row for row in page.rows if row[0] in PLOTS] == [[name, why] for name, why in left_out.items()]
    for png in drawn.values():
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(png) < 400_000


def test_plots_are_drawn_by_name():
    study = study_of(seeds=(0,), checkpoints=(0,))
    drawn = draw_plots(study, ["exchange", "covariance", "training"])
    assert (list(drawn.pngs), list(drawn.left_out)) == (["exchange", "training"], ["covariance"])
    assert drawn.left_out["covariance"] == "it needs two measurements or more"
    assert draw_plots(study, []) == ({}, {})
    with pytest.raises(InvalidInput, match=r"got 'influnce'.*Did you mean 'influence'"):
        draw_plots(study, ["influnce"])


@pytest.mark.parametrize("name", PLOTS)
def test_captions(name):
    assert 40 < len(CAPTIONS[name]) < 400


def test_names_say_what_sets_measurements_apart():
    study = study_of(batches=2)
    assert [label(study, view) for view in views(study)][:3] == [
        "policy seed=0 · update 0 · evaluation 0", "policy seed=0 · update 0 · evaluation 1",
        "policy seed=0 · update 20 · evaluation 0",
    ]  # fmt: skip
    other = measurement(policy(0, 0, learning_rate=1e-2))
    assert label(study._replace(measured=[study.measured[0], other]), other) == "learning_rate=0.01 · update 0"
    one = study_of(seeds=(0,), checkpoints=(0,))
    assert label(one, one.measured[0]) == "update 0"
    again = measurement(policy(0, 0), etas=(1e-4,))
    assert label(one._replace(measured=[*one.measured, again]), again) == f"{again.entropy_id} · update 0"


def test_texts_become_labels():
    assert plain("1+2=") == "1+2="
    assert plain("a\n  b\tc") == "a b c"
    assert plain("\N{GREEK SMALL LETTER ALPHA}\N{CJK UNIFIED IDEOGRAPH-4E2D}\x07") == "\N{REPLACEMENT CHARACTER}" * 3
    assert plain("x" * 50) == "x" * 11 + "…"


def test_training_shows_medians_over_seeds_and_the_llc():
    study = study_of(seeds=(0, 1, 2))
    for factor, of in zip((0.5, 1.0, 3.0), study.policies.values(), strict=True):
        of.history["accuracy"] = factor * of.history["accuracy"]
    fig = PLOTS["training"](study)
    accuracy, entropy, llc = fig.axes
    entropies = np.linspace(1.2, 0.1, NUM_STEPS)
    np.testing.assert_allclose(entropy.lines[0].get_xydata(), np.stack([np.arange(NUM_STEPS), entropies], axis=1))
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), B - A * np.exp(entropies))
    assert accuracy.lines[0].get_markevery() == [0, 20]
    good, bad = points(llc)[:2]
    np.testing.assert_allclose(good[0], [[0, 10], [20, 12]])
    np.testing.assert_allclose(bad[0], [[40, 14]])
    np.testing.assert_allclose(np.concatenate([good[1], bad[1]]), 0.5)
    assert {"3 seeds", "measured here", "llc with a verdict other than ok"} <= set(texts(fig))
    assert len(PLOTS["training"](study._replace(llcs=None)).axes) == 2


def test_exchange_names_its_fit():
    fig = PLOTS["exchange"](study_of())
    (ax,) = fig.axes
    cloud, curve = ax.lines
    assert len(cloud.get_xdata()) == 2 * NUM_STEPS
    np.testing.assert_allclose(curve.get_ydata(), B - A * np.exp(curve.get_xdata()), rtol=1e-9)
    assert "R = −a exp(H) + b: a = 0.3, b = 1.1, R² = 1.000" in texts(fig)


def test_attribution_is_ordered():
    fig = PLOTS["attribution"](study_of(seeds=(0,), checkpoints=(0,), groups=2))
    above, ax, beside, _ = fig.subfigs[0].axes
    sums = influence_of(2)
    order = [1, 5, 2, 6, 0, 4, 3, 7]  # advantages below 0 first, then by sum
    np.testing.assert_allclose(np.concatenate([block.get_data().values for block in above.patches]), sums[order])
    assert [list(block.get_data().edges[[0, -1]]) for block in above.patches] == [[-0.5, 3.5], [3.5, 7.5]]
    rows = 1 + SPREAD * (-1.0) ** np.arange(10)
    rows = np.sort(rows)
    np.testing.assert_allclose(ax.images[0].get_array(), rows[:, None] * sums[order] / 10)
    np.testing.assert_allclose(beside.patches[0].get_data().values, rows * sums.sum() / 10)
    assert "4 of 8 matrices" in texts(PLOTS["attribution"](study_of(batches=2)))[0]


def test_influence_is_sorted_and_the_largest_are_named():
    fig = PLOTS["influence"](study_of(seeds=(0,), checkpoints=(0,), groups=2))
    (ax,) = fig.axes
    sums = influence_of(2)
    positive, negative = points(ax)
    ranks = np.argsort(np.argsort(sums))
    for (found, errors), advantage in ((positive, 0.5), (negative, -0.5)):
        here = np.flatnonzero(np.tile(REWARDS, 2) - 0.5 == advantage)
        here = here[np.argsort(sums[here])]
        np.testing.assert_allclose(found, np.stack([ranks[here], sums[here]], axis=1))
        np.testing.assert_allclose(errors, SPREAD * np.abs(sums[here]) / 3)
    named = {text.get_text(): text.xy for text in ax.texts}
    largest = np.argsort(-np.abs(sums))[:4]
    assert set(named) == {f"1+{index}= → {index}" for index in largest}
    for index in largest:
        np.testing.assert_allclose(named[f"1+{index}= → {index}"], (ranks[index], sums[index]))


@pytest.mark.parametrize("shape", ["one measurement", "several batches", "strange texts"])
def test_names_of_large_influences_do_not_overlap(shape):
    fig = PLOTS["influence"](SHAPES[shape][0]())
    fig.draw_without_rendering()
    for ax in fig.axes:
        boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the lines to the points
        assert len(boxes) == 4
        assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])
        assert all(ax.get_window_extent().contains(*corner) for box in boxes for corner in box.corners())


def test_features_ring_outliers():
    study = study_of(seeds=(0,), checkpoints=(0,), groups=6)
    sums = influence_of(6)
    fig = PLOTS["features"](study)
    assert [ax.get_xlabel().partition(" ")[0] for ax in fig.axes] == ["surprisal", "mean", "advantage", "length"]
    first = fig.axes[0]
    correct, incorrect, far, _ = first.lines
    right = np.tile(REWARDS, 6) > 0
    surprisal = study.measured[0].update["max_surprisal"].to_numpy()
    np.testing.assert_allclose(correct.get_xydata(), np.stack([surprisal, sums], axis=1)[right])
    np.testing.assert_allclose(incorrect.get_xydata(), np.stack([surprisal, sums], axis=1)[~right])
    # Quartiles are about -0.6 and 3.8, the fences at -7.3 and 10.5: nothing is far yet.
    assert len(far.get_xdata()) == outliers(sums).sum() == 0
    expected = scipy.stats.spearmanr(surprisal, np.abs(sums)).statistic
    assert f"ρ(|influence|) = {expected:+.2f}" in first.get_title()
    study.measured[0].matrices[0] = matrix_of(np.where(np.arange(24) == 2, 50.0, sums), 10)
    rings = PLOTS["features"](study).axes[0].lines[2].get_xydata()
    np.testing.assert_allclose(rings, [[surprisal[2], 50.0]])


def test_etas_are_per_unit_eta():
    study = study_of(seeds=(0,), checkpoints=(0,), groups=1)
    fig = PLOTS["etas"](study)
    (ax,) = fig.axes
    first, sums = BASELINE + influence_of(1).sum(), influence_of(1).sum()
    full, baseline, grad, residual, exact = points(ax)
    for (found, errors), value, error in (
        (full, 0.9 * first, 0.1), (baseline, BASELINE, 0.2), (grad, sums, None), (residual, -0.1 * first, None),
        (exact, 0.95 * first, None),
    ):  # fmt: skip
        np.testing.assert_allclose(found, [[1e-3, value], [1e-2, value]])
        assert errors is None if error is None else np.allclose(errors, error)
    by_name = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(by_name["first order of v"].get_ydata(), first)
    second = by_name["second order of v"]
    np.testing.assert_allclose(second.get_ydata(), first + second.get_xdata() * SECOND / 2)
    np.testing.assert_allclose(by_name["η*"].get_xdata(), 0.2 * abs(first) / SECOND)
    assert {"update v", "baseline b", "sum of the vᵢ alone", "update v, exact"} <= set(texts(fig))
    assert ax.get_xscale() == "log"
    assert "update v, exact" not in texts(PLOTS["etas"](study_of(exact=False)))


def test_etas_say_what_is_off_the_scale():
    study = study_of(seeds=(0,), checkpoints=(0,), groups=1)
    changes = study.measured[0].changes
    changes["grad_sum"] = changes["eta"] * [500.0, 4000.0]
    (ax,) = PLOTS["etas"](study).axes
    assert ax.get_title().replace("\n", " · ") == "update 0 · η*=0.0049 · Σvᵢ alone off the scale, to 4e+03"
    assert ax.get_ylim()[1] < 100


def test_linearity_tells_how_well_changes_are_predicted():
    fig = PLOTS["linearity"](study_of(seeds=(0,), checkpoints=(0,)))
    sums = influence_of(3)
    assert len(fig.axes) == 2
    for ax, eta in zip(fig.axes, (1e-3, 1e-2), strict=True):
        found = np.concatenate([data for data, _ in points(ax)])
        np.testing.assert_allclose(found[:, 1], found[:, 0] * (1 + eta))
        np.testing.assert_allclose(np.sort(found[:, 0]), np.sort(sums))
        np.testing.assert_allclose(np.concatenate([errors for _, errors in points(ax)]), 0.1)
        expected = 1 - np.sum((eta * sums) ** 2) / np.sum(((sums - sums.mean()) * (1 + eta)) ** 2)
        assert f"R²={expected:.3f}" in ax.get_title()


def test_decomposition_is_of_one_update():
    fig = PLOTS["decomposition"](study_of())
    (ax,) = fig.axes
    heights = np.array([bar.get_height() for bar in ax.patches]).reshape(3, 4)
    sums = influence_of(3).sum()
    np.testing.assert_allclose(heights, ETA_POLICY * np.array([BASELINE, sums, BASELINE + sums])[:, None] * np.ones(4))
    errors = [lengths for data, lengths in points(ax) if data is None]
    for found, error in zip(errors, (BASELINE_ERROR, SPREAD * sums / 3, 2.0), strict=True):
        np.testing.assert_allclose(found, ETA_POLICY * error)
    assert [text.get_text() for text in ax.get_xticklabels()][:2] == ["policy seed=0\nupdate 0", "policy seed=0\nupdate 20"]


def test_covariance_counts_expected_signs():
    falling = [measurement(policy(0, step), groups=1, covariance=covariance) for step, covariance in ((0, 0.5), (10, -0.2))]
    rising = measurement(policy(0, 20), groups=4, covariance=-0.1)
    study = EntropyStudy("signs", [*falling, rising], {})
    fig = PLOTS["covariance"](study)
    (ax,) = fig.axes
    grad, full = points(ax)
    firsts = np.array([influence_of(groups).sum() for groups in (1, 1, 4)])
    np.testing.assert_allclose(full[0], np.stack([[0.5, -0.2, -0.1], ETA_POLICY * (firsts + BASELINE)], axis=1))
    np.testing.assert_allclose(grad[0][:, 1], ETA_POLICY * firsts)
    np.testing.assert_allclose(full[1], ETA_POLICY * 2.0)
    assert ax.get_title() == "signs as expected in 2 of 3"


def test_diagnostics_are_shares():
    fig = PLOTS["diagnostics"](study_of(seeds=(0,), checkpoints=(0,)))
    left, right = fig.axes
    whole, least = left.lines
    np.testing.assert_allclose(whole.get_xydata(), [[1e-3, 0.6], [1e-2, 0.6]])
    np.testing.assert_allclose(least.get_ydata(), 0.8)
    np.testing.assert_allclose(right.lines[0].get_ydata(), 0.125)


@pytest.mark.parametrize("name", sorted(set(PLOTS) - {"attribution"}))
def test_many_panels_are_told(name):
    fig = PLOTS[name](SHAPES["many"][0]())
    assert len(fig.axes) <= 12
    told = {"influence": "9 of 30 panels", "features": "12 of 120 panels", "etas": "9 of 60 panels",
            "linearity": "of 120 panels", "diagnostics": "6 of 60 lines"}  # fmt: skip
    assert told.get(name, "") in fig.get_suptitle()


# --- The report --------------------------------------------------------------------------------------------------------


def report(study, plots=()):
    drawn = plots if isinstance(plots, Drawn) else Drawn(dict(plots), {})
    return entropy_report("ens_0123456789abcdef", "H & <eta>", study, drawn, "2026-01-02 03:04")


def spaced(row):
    return [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row]


def test_report_needs_nothing_else():
    html = report(study_of(), {"exchange": PNG, "etas": PNG})
    page = Page(html)
    assert_needs_nothing_else(html, page)
    text = " ".join(page.texts)
    assert "H & <eta>: 4 measurements of the policy's entropy" in text
    assert "Accuracy R against entropy H" in text


def test_report_says_what_was_measured_and_found():
    page = Page(report(study_of(groups=2)))
    fields = dict(page.settings)
    assert (fields["measurements"], fields["policies"], fields["training sequences"]) == ("4", "2", "32")
    assert (fields["groups left out"], fields["update.num_prompts"]) == ("none of 8", "2")
    rows = [spaced(row) for row in page.rows]
    assert ["all", "2", "40", "0.104 → 0.768", "1.2 → 0.1", "0.3", "1.1", "1"] in rows
    sums = influence_of(2)
    first = BASELINE + sums.sum()
    assert [
        "policy seed=0 · update 0", "0.4375", "1.000 ± 0.050", "1.25", f"{first:.1f} ± 2.0", "-30.00 ± 0.70",
        f"{sums.sum():.1f} ± {SPREAD * sums.sum() / 3:.1f}", f"{0.2 * abs(first) / SECOND:.4g}", "0.0625", "opposite", "none",
        "0 of 8, 0 of 10",
    ] in rows  # fmt: skip
    assert [
        "0.01", f"{0.009 * first:.4f} ± 0.0010", "-0.3000 ± 0.0020", f"{0.01 * sums.sum():.4g}", f"{-0.001 * first:.4g}",
        f"{0.01 * first:.4f} ± 0.0030", f"{0.01 * first + 1e-4 * SECOND / 2:.4g}", f"{0.0095 * first:.4g}", "6", "12.5%",
    ] in rows  # fmt: skip
    assert ["policy seed=1 · update 20", f"{0.9 * first:.4g}", "0", "0.987", "0", "0", "0.001"] in rows
    total = np.abs(sums).sum()
    assert [
        "policy seed=0 · update 0", "1+6=", "6", "7", "0", "-0.5", "2", "6.009", "4.006", "1",
        f"{sums[6]:.1f} ± {SPREAD * sums[6] / 3:.1f}", f"{sums[6] / total:.1%}",
    ] in rows  # fmt: skip
    share = sums.reshape(2, 4)[:, 2].sum() / total
    assert any(row[:3] == ["incorrect", "4, an unlikely token", "8"] and row[4] == f"{share:.1%}" for row in rows)
    found = int(outliers(sums).sum()) * 4
    far = f"{found} of the {found} outliers" if found else "no outlier"
    assert f"are 25% of all sequences, and have {share:.0%} of the influence and {far}" in " ".join(page.texts)
    assert ["target.seed", "0, 1"] in rows


def test_report_escapes_what_policies_wrote():
    study = study_of(texts=("<script>alert({})</script>", "</td><img src=x onerror=alert({})>"))
    html = report(study, draw_plots(study, ["influence"]))
    assert "<script" not in html
    assert "<img src=x" not in html
    assert any("<script>alert(10)</script>" in row for row in Page(html).rows)


def test_report_is_not_silent_about_groups_left_out():
    study = study_of(shortfall=2, groups_asked=5)
    page = Page(report(study))
    assert dict(page.settings)["groups left out"] == "8 of 20"
    assert [row[-2] for row in page.rows if row[:2] == ["policy seed=0 · update 0", "0.4375"]] == ["2 of 5"]
    assert "Completions of some prompts had equal rewards" in " ".join(page.texts)
    assert "Completions of some prompts" not in " ".join(Page(report(study_of())).texts)


def test_report_is_not_silent_about_completions_cut_off():
    page = Page(report(study_of(truncated=3)))
    assert dict(page.settings)["completions cut off"] == "12 of 88"
    assert [row[-1] for row in page.rows if row[:2] == ["policy seed=0 · update 0", "0.4375"]] == ["3 of 12, 0 of 10"]
    assert "as many tokens as" in " ".join(page.texts)
    whole = Page(report(study_of()))
    assert dict(whole.settings)["completions cut off"] == "none"
    assert "as many tokens as" not in " ".join(whole.texts)


@pytest.mark.parametrize("shape", SHAPES)
def test_report_of_every_shape(shape):
    study = SHAPES[shape][0]()
    page = Page(report(study))
    assert dict(page.settings)["measurements"] == str(len(study.measured))
