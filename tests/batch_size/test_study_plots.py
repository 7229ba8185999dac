"""Plots and report of a study: of losses in closed form each shows the numbers it should, and none fails on any shape."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PatchCollection, QuadMesh
from test_report import PNG, Page, assert_needs_nothing_else

from lambda_hat.batch_size.plots import CAPTIONS, PLOTS, draw_plots
from lambda_hat.batch_size.report import MAX_TRIALS, _best, study_report
from lambda_hat.batch_size.smoothing import smooth, updates_done
from lambda_hat.batch_size.study import Study, failures, losses, settings, swept, where
from lambda_hat.batch_size.summary import summary
from lambda_hat.batch_size.trades import default_target, trades
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.specs.text import number
from lambda_hat.studies.plots import Drawn

#: The model: trials of rate R / (1 + BC/B) at the best learning rate have the loss exp(-rate updates).
NUM_STEPS, RATE, BC = 1024, 0.01, 64.0
#: How fast the rate falls with octaves from the best learning rate, and how far above it trials diverge.
FALL, REACH = 0.04, 3.5


def best_eta(batch_size, richness=1.0, width=64, depth=2, parameterization="mup", rate_rule="raw"):
    """eta*, linear in B for B << BC, with the theory's powers of the richness, and shifting with the width in SP."""
    power = 0.0 if rate_rule == "standard" else 2.0 if richness <= 1 else 2.0 / depth
    return 2.0**-2 / (1 + BC / batch_size) * richness**power * (64 / width if parameterization == "sp" else 1.0)


def trial(eta, batch_size, richness=1.0, width=64, seed=1, parameterization="mup", optimizer="sgd", depth=2, rate_rule="raw"):
    best = best_eta(batch_size, richness, width, depth, parameterization, rate_rule)
    octaves = np.log2(eta / best)
    rate = RATE / (1 + BC / batch_size) * max(1 - FALL * octaves**2, 0.0) * (1 + 0.02 * (seed - 1))
    diverged = octaves > REACH
    steps = np.unique(np.geomspace(1, NUM_STEPS, 40).round().astype(int))
    losses = np.where(diverged & (steps > 20), np.nan, np.exp(-rate * updates_done(steps)))
    name = f"tgt_{optimizer}_{parameterization}_{width}_{richness:g}_{batch_size}_{eta:g}_{seed}"
    row = {
        "trial_id": name, "family": "trial", "task.kind": "images", "task.dataset": "digits", "task.n_data": 999, "loss": "mse",
        "parameterization": parameterization, "depth": depth, "width": width, "richness": richness, "optimizer": optimizer,
        "eta": eta, "rate_rule": rate_rule, "batch_size": batch_size, "num_steps": NUM_STEPS, "num_epochs": None, "seed": seed,
        "precision": "float32", "checkpoint_steps": (), "temperature": eta / batch_size, "samples": NUM_STEPS * batch_size,
        "final_loss": losses[-1], "test_loss": 1.2 * losses[-1], "train_accuracy": 1 - losses[-1], "test_accuracy": 0.9,
        "diverged_at_step": 21.0 if diverged else np.nan, "failure": "diverged" if diverged else np.nan,
        **{f"activation_change_{layer}": layer * (width / 64) ** (-0.5 * (parameterization == "sp")) * np.exp(0.01 * seed)
           for layer in range(1, depth + 1)},
        "seconds": 0.5,
    }  # fmt: skip
    return row, (steps, losses)


def study_of(**axes):
    """A study of the whole grid of these values."""
    return of_trials([trial(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())])


def of_trials(trials):
    table = pd.DataFrame([row for row, _ in trials])
    return Study(table, {row["trial_id"]: curve for row, curve in trials}, default_target(table))


def measured(study):
    """With an llc that rises with eta, a sharpness at 2/eta but at most 100, and a gradient noise scale around BC."""
    table = study.table
    finite = table["final_loss"].notna()
    added = {
        "llc": 10 + np.log2(table["eta"]),
        "llc_mcse": 0.1 + 0 * table["eta"],
        "sharpness": np.minimum(100.0, 2 / table["eta"]),
        "gradient_noise_scale": BC * 1.1 + 0 * table["eta"],
    }
    return study._replace(table=table.assign(**{name: values.where(finite) for name, values in added.items()}))


#: No plot.
NONE = Drawn({}, {})
GRID = {"batch_size": [4, 16, 64, 256], "eta": [2.0**k for k in range(-9, 3)], "seed": [0, 1, 2]}
SMALL = {"batch_size": [4, 16, 64, 256], "eta": [2.0**-8, 2.0**-5, 2.0**-2, 2.0], "seed": [0, 1]}


def scattered(fixed=False):
    """Random values, of the learning rate and the batch size alone if all else is fixed: nothing is on a grid."""
    rng = np.random.default_rng(0)
    eta, batch_size = 2 ** rng.uniform(-8, 2, 40), rng.integers(1, 300, 40)
    richness, width = 10 ** rng.uniform(-2, 2, 40), rng.integers(8, 300, 40)
    if fixed:
        richness, width = np.ones(40), np.full(40, 64)
    return of_trials([trial(*values) for values in zip(eta, batch_size, richness, width, strict=True)])


def without_curves():
    return measured(study_of(**SMALL))._replace(curves={})


def holes():
    """Every third trial is missing, and some steps' losses are infinite or zero."""
    study = measured(study_of(**SMALL, width=[32, 64]))
    for _, curve in list(study.curves.values())[::5]:
        curve[3], curve[5] = np.inf, 0.0
    table = study.table.assign(final_loss=study.table["final_loss"].mask(np.arange(len(study.table)) % 7 == 0, 0.0))
    return study._replace(table=table[np.arange(len(table)) % 3 > 0])


MAPS, CURVES = {"heatmap_batch", "heatmap_temp"}, {"losscurve_temp_samples", "losscurve_temp_eff_steps", "losscurve_grid"}
B_ETA = MAPS | CURVES | {"steps_to_target"}
MEASURED = {"sharpness", "llc"}
#: A study, and the plots that apply to it.
SHAPES = {
    "no trial": (lambda: where(study_of(**GRID), ["eta>100"]), set()),
    "one trial": (lambda: measured(study_of(batch_size=[16], eta=[0.1])), {"losscurve_grid"}),
    "all diverged": (lambda: measured(study_of(batch_size=[4, 16, 64], eta=[64.0, 128.0, 256.0])),
                     MAPS | {"losscurve_grid"}),
    "diverged at once": (lambda: without_losses(study_of(batch_size=[4, 16, 64], eta=[64.0, 128.0])), MAPS),
    "one learning rate": (lambda: measured(study_of(batch_size=[4, 16, 64], eta=[0.01])),
                          {"losscurve_grid", "steps_to_target"}),
    "one seed": (lambda: measured(study_of(**SMALL | {"seed": [5]})), B_ETA | MEASURED),
    "without curves": (without_curves, MAPS | MEASURED),
    "holes": (holes, set(PLOTS) - {"heatmap_gamma"}),
    "no grid": (scattered, {"losscurve_grid"}),
    "no grid of two": (lambda: scattered(fixed=True), MAPS | {"losscurve_grid", "steps_to_target"}),
    "richness": (lambda: study_of(richness=[1e-5, 0.01, 1.0, 100.0, 1e5], eta=GRID["eta"], batch_size=[64]),
                 {"heatmap_gamma", "losscurve_grid"}),
    "widths": (lambda: study_of(width=[32, 64], eta=GRID["eta"], batch_size=[64]),
               {"width_transfer", "coordinate_check", "losscurve_grid"}),
}  # fmt: skip


def without_losses(study):
    return study._replace(curves={name: (steps, np.full(len(steps), np.nan)) for name, (steps, _) in study.curves.items()})


@pytest.mark.parametrize("shape", SHAPES)
def test_every_plot_draws_every_shape_or_does_not_apply(shape):
    make, applying = SHAPES[shape]
    drawn = draw_plots(make())
    assert set(drawn.pngs) == applying
    assert set(drawn.left_out) == set(PLOTS) - applying
    assert all(re.search(r"[a-z]{3}", why) and why[0].islower() and why[-1] != "." for why in drawn.left_out.values())
    for png in drawn.pngs.values():
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(png) < 400_000


def texts(fig):
    """Of the figure's title, its panels' titles, and its legends."""
    legends = [*fig.legends, *(ax.get_legend() for ax in fig.axes if ax.get_legend())]
    return [fig.get_suptitle(), *(ax.get_title() for ax in fig.axes), *(t.get_text() for of in legends for t in of.get_texts())]


def maps(fig):
    """The panels with a map and its cells, as arrays with NaN where there is none."""
    found = [
        (ax, mesh)
        for ax in fig.axes
        for mesh in ax.collections
        if isinstance(mesh, QuadMesh) and ax.get_label() != "<colorbar>"
    ]
    return [(ax, np.ma.filled(mesh.get_array().astype(float), np.nan)) for ax, mesh in found]


def marks(ax, marker):
    return np.array([line.get_xydata()[0] for line in ax.lines if line.get_marker() == marker])


def test_heatmap_batch_shows_medians_and_optima_and_hatches_what_diverged():
    study = study_of(**GRID, width=[32, 64])
    fig = PLOTS["heatmap_batch"](study)
    assert fig.get_suptitle().startswith("final loss over batch size and learning rate · median of 3 seeds")
    found = maps(fig)
    assert [ax.get_title() for ax, _ in found] == ["width=32", "width=64"]
    for ax, cells in found:
        expected = [[trial(eta, size)[0]["final_loss"] for size in GRID["batch_size"]] for eta in GRID["eta"]]
        np.testing.assert_allclose(cells, np.log10(expected))
        (lost,) = (patches for patches in ax.collections if isinstance(patches, PatchCollection))
        assert len(lost.get_paths()) == np.isnan(expected).sum() > 0
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        # The model is a parabola, so the optima between the cells are found exactly.
        np.testing.assert_allclose(marks(ax, "o"), [(size, best_eta(size)) for size in GRID["batch_size"]])
        assert ax.get_xlabel() == "batch size B (samples)"


def test_optima_at_an_end_are_marked_apart():
    (ax, _), *_ = maps(PLOTS["heatmap_batch"](study_of(batch_size=[16, 4096], eta=[2.0**k for k in range(-7, -2)])))
    np.testing.assert_allclose(marks(ax, "o"), [(16, best_eta(16))])
    np.testing.assert_allclose(marks(ax, "X"), [(4096, 2.0**-3)])


def test_heatmap_temp_is_over_eta_by_batch_size():
    study = study_of(**GRID)
    fig = PLOTS["heatmap_temp"](study)
    ((ax, cells),) = maps(fig)
    np.testing.assert_array_equal(cells, maps(PLOTS["heatmap_batch"](study))[0][1])
    (mesh,) = (mesh for mesh in ax.collections if isinstance(mesh, QuadMesh))
    corners = mesh.get_coordinates()
    # Cells are slanted: of eta=2^-8 and B=16 halfway to the neighbours, 2^-9, 2^-7 and 4, 64, in log.
    np.testing.assert_allclose(corners[1, 1], (2**-8.5 / 8, 2**-8.5))
    np.testing.assert_allclose(corners[2, 2], (2**-7.5 / 32, 2**-7.5))
    np.testing.assert_allclose(marks(ax, "o"), [(best_eta(size) / size, best_eta(size)) for size in GRID["batch_size"]])
    assert ax.get_xlabel() == "temperature η/B"


def tempting(study):
    """The same study, in which what diverged ended dead or above its start instead, with losses below all others."""
    table, curves = study.table.copy(), dict(study.curves)
    lost = table["failure"].notna()
    table.loc[lost, "final_loss"] = 1e-9
    table.loc[lost, "failure"] = np.where(np.arange(lost.sum()) % 2, "dead", "above start")
    for name in table["trial_id"][lost]:
        curves[name] = curves[name][0], np.full(len(curves[name][0]), 1e-9)
    return study._replace(table=table.assign(diverged_at_step=np.nan), curves=curves)


def test_what_failed_otherwise_counts_as_what_diverged():
    """In maps, optima, slopes, trades, collapses, the table of the best and the summary."""
    grid = {"batch_size": [4, 16, 64, 256], "eta": [2.0**k for k in range(-9, 5)], "seed": [0, 1, 2]}
    diverged = study_of(**grid, richness=[0.5, 1.0], width=[32, 64])
    failed = tempting(diverged)
    assert losses(failed.table).equals(losses(diverged.table))
    assert failures(failed.table).keys() == {"dead", "above start"}
    for name in ("heatmap_batch", "heatmap_temp", "heatmap_gamma"):
        for (ax, cells), (other, same) in zip(maps(PLOTS[name](failed)), maps(PLOTS[name](diverged)), strict=True):
            np.testing.assert_array_equal(cells, same)
            assert np.isnan(cells).any()
            np.testing.assert_array_equal(marks(ax, "o"), marks(other, "o"))
            assert ax.get_title() == other.get_title()
    for name in ("width_transfer", "coordinate_check", "losscurve_temp_samples", "losscurve_temp_eff_steps"):
        found, same = ([ax.get_title() for ax in PLOTS[name](study).axes] for study in (failed, diverged))
        assert found == same
    assert default_target(failed.table) == diverged.target_loss
    assert [trade.fit for trade in trades(failed)] == [trade.fit for trade in trades(diverged)]
    best, same_best = (_best(study.table, swept(study.table)) for study in (failed, diverged))
    assert best == same_best
    best, same_best = (summary(study)["best"] for study in (failed, diverged))
    assert best == same_best
    # What was measured of it all the same, by its name, is not shown.
    some = {"batch_size": [4, 16], "eta": [0.125, 0.25, 64.0], "width": [32]}
    measures = measured(study_of(**some)), tempting(measured(study_of(**some)))
    measures[1].table["sharpness"] = measures[1].table["sharpness"].fillna(5.0)
    measures[1].table["llc"] = measures[1].table["llc"].fillna(5.0)
    for name in ("sharpness", "llc"):
        (_, cells), (_, same) = (maps(PLOTS[name](study))[-1] for study in measures[::-1])
        np.testing.assert_array_equal(cells, same)
    right, other = (PLOTS["sharpness"](study).axes[1] for study in measures[::-1])
    assert [line.get_xydata().tolist() for line in right.lines] == [line.get_xydata().tolist() for line in other.lines]
    assert right.get_ylim() == other.get_ylim()
    # Its curve is drawn, and marked as that of a trial that diverged.
    for ax, other in zip(PLOTS["losscurve_grid"](failed).axes, PLOTS["losscurve_grid"](diverged).axes, strict=True):
        assert len(marks(ax, "x")) == len(marks(other, "x")) > 0
    (row,) = (row for row in Page(study_report("stu_1", "x", failed, NONE)).settings if row[0] == "dead")
    assert int(row[1]) == failures(failed.table)["dead"]


def test_temperatures_that_differ_in_the_last_digit_are_one():
    study = study_of(batch_size=[3, 9, 27], eta=[0.01 * 3**k for k in range(4)])
    assert study.table["temperature"].nunique() > 6
    fig = PLOTS["losscurve_temp_samples"](study)
    assert len(fig.axes) == 4  # those of two batch sizes and more


def test_heatmap_gamma_fits_the_powers_of_the_richness():
    axes = {"richness": [1e-4, 1e-3, 1e-2, 1.0, 10.0, 100.0, 1000.0], "batch_size": [64]}
    study = study_of(**axes, eta=[2.0**k for k in range(-34, 12)], depth=[2, 3])
    fig = PLOTS["heatmap_gamma"](study)
    assert [ax.get_title()[:7] for ax, _ in maps(fig)] == ["depth=2", "depth=3"]
    for (ax, _), powers in zip(maps(fig), ((2, 1), (2, 2 / 3)), strict=True):
        np.testing.assert_allclose(
            marks(ax, "o"), [(g, best_eta(64, g, depth=2 if powers[1] == 1 else 3)) for g in axes["richness"]]
        )
        for text, side, power in zip(re.split(r" · |\n", ax.get_title())[1:], ("lazy", "rich"), powers, strict=True):
            found = re.fullmatch(rf"{side}: γ\^(\S+)(?: ± \S+)?, theory (\S+)", text)
            assert float(found[1]) == pytest.approx(power, abs=1e-2)
            assert float(found[2]) == pytest.approx(power, abs=1e-3)
        fitted, theory = (
            next(line for line in ax.lines if line.get_linestyle() == style and len(line.get_xdata()) > 1)
            for style in ("-", "--")
        )
        np.testing.assert_allclose(fitted.get_ydata(), theory.get_ydata())
    # The standard rule already scales the rate with the richness.
    scaled = PLOTS["heatmap_gamma"](study_of(**axes, eta=GRID["eta"], rate_rule=["standard"]))
    assert not any("theory" in text for text in texts(scaled))


def test_a_few_panels_are_chosen_evenly():
    fig = PLOTS["heatmap_batch"](study_of(batch_size=[4, 16], eta=[0.1, 0.2], width=list(range(10, 50)), richness=[0.5, 1.0]))
    found = [ax.get_title() for ax, _ in maps(fig)]
    assert found == [f"width={width} · richness={g}" for width in (10, 23, 36, 49) for g in ("0.5", "1")]
    assert "8 of 80 panels" in fig.get_suptitle()


def test_losscurves_at_equal_temperature():
    fig = PLOTS["losscurve_temp_samples"](study_of(**GRID))
    assert len(fig.axes) == 9
    assert "9 of 11 panels" in fig.get_suptitle()
    (ax,) = (ax for ax in fig.axes if ax.get_title().startswith("η/B=2⁻⁹"))
    sizes = [size for size in GRID["batch_size"] if size / 2**9 in GRID["eta"]]
    curves = [line for line in ax.lines if len(line.get_xdata()) > 1]
    assert len(curves) == len(sizes) > 2
    for line, size in zip(curves, sizes, strict=True):
        steps, losses = trial(size / 2**9, size)[1]
        updates = updates_done(steps)
        np.testing.assert_allclose(line.get_xdata(), size * updates[updates > 0])
        np.testing.assert_allclose(line.get_ydata(), smooth(steps, losses, relative=0.2)[updates > 0])


def test_losscurves_in_flow_time_have_the_largest_batch_size_beside_them():
    fig = PLOTS["losscurve_temp_eff_steps"](study_of(**GRID))
    beside = [next(line for line in ax.lines if line.get_linestyle() == "--") for ax in fig.axes]
    assert "B=256, η=0.25" in texts(fig)
    steps, losses = trial(0.25, 256)[1]
    for line in beside:
        np.testing.assert_allclose(line.get_xdata(), 0.25 * updates_done(steps)[1:])
        np.testing.assert_allclose(line.get_ydata(), smooth(steps, losses, relative=0.2)[1:])


def test_losscurve_grid_ends_where_trials_diverge():
    fig = PLOTS["losscurve_grid"](study_of(batch_size=[4, 64], eta=[2.0**-6, 2.0**-4, 8.0], seed=[0, 1, 2]))
    assert [ax.get_title() for ax in fig.axes] == ["batch_size=4", "batch_size=64"]
    for ax in fig.axes:
        assert len([line for line in ax.lines if len(line.get_xdata()) > 1]) == 3
        assert len(marks(ax, "x")) == 1
        assert len([band for band in ax.collections if not isinstance(band, QuadMesh)]) == 3
    assert {"η=2⁻⁶", "η=2⁻⁴", "η=8"} <= set(texts(fig))


def test_width_transfer_says_how_the_optimum_shifts():
    study = study_of(width=[32, 64, 128], eta=GRID["eta"], parameterization=["sp", "mup"], seed=[0, 1], batch_size=[64])
    fig = PLOTS["width_transfer"](study)
    for ax, name, power in zip(fig.axes, ("mup", "sp"), (0, -1), strict=True):
        setting, fitted = ax.get_title().split("\n")
        assert setting == f"parameterization={name}"
        assert fitted.startswith("exponent of best η over N: ")
        assert float(fitted.split()[6]) == pytest.approx(power, abs=1e-3)
    for ax, parameterization in zip(fig.axes, ("mup", "sp"), strict=True):
        expected = [best_eta(64, width=width, parameterization=parameterization) for width in (32, 64, 128)]
        np.testing.assert_allclose(marks(ax, "*")[:, 0], expected)
    assert {"N=32", "N=64", "N=128"} <= set(texts(fig))


def test_coordinate_check_prints_slopes():
    study = study_of(width=[32, 64, 128, 256], eta=GRID["eta"], parameterization=["sp", "mup"], seed=[0, 1], batch_size=[64])
    fig = PLOTS["coordinate_check"](study)
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in fig.axes]
    for (first, second), power in zip(legends, (0.0, -0.5), strict=True):
        assert first.startswith("layer 1: slope ")
        assert second.startswith("layer 2: slope ")
        assert float(first.split()[3]) == pytest.approx(power, abs=1e-6)
    # A decade at least, so that what is flat looks flat.
    assert all(np.ptp(np.log10(ax.get_ylim())) > 1 for ax in fig.axes)
    assert all(" · η=" in ax.get_title() for ax in fig.axes)


def test_coordinate_check_is_at_a_rate_that_all_widths_survive():
    study = study_of(width=[64, 4096], eta=[2.0**-9, 2.0**-3], parameterization=["sp"], batch_size=[64])
    assert study.table["final_loss"].isna().sum() == 1
    (ax,) = PLOTS["coordinate_check"](study).axes
    assert ax.get_title() == "η=2⁻⁹"
    assert "half of the seeds fail, at every width; there is none" in PLOTS["coordinate_check"](where(study, ["eta>0.1"]))


def test_steps_to_target_finds_the_critical_batch_size():
    study = measured(
        study_of(batch_size=[4, 8, 16, 32, 64, 128, 256, 512, 1024], eta=[2.0**k for k in range(-10, 3)], seed=[0, 1, 2])
    )
    (found,), target = trades(study), study.target_loss
    # The window, the interpolation and the grid of learning rates each move the steps by some percent.
    assert found.fit.batch_size == pytest.approx(BC, rel=0.1)
    assert found.fit.min_steps == pytest.approx(-np.log(target) / RATE, rel=0.1)
    assert found.noise_scale == pytest.approx(1.1 * BC)
    fig = PLOTS["steps_to_target"](study)
    steps, samples = (ax.containers[0][0].get_xydata() for ax in fig.axes)
    np.testing.assert_allclose(samples[:, 1], steps[:, 0] * steps[:, 1])
    (text,) = (text for text in texts(fig) if "B_crit" in text)
    assert f"B_crit {found.fit.batch_size:.3g} [" in text
    assert "gradient noise scale 70.4" in text
    assert f"training to a loss of {target:.3g}" in fig.get_suptitle()
    # Three quarters of the batch sizes get there.
    assert found.table["batch_size"].nunique() >= 0.75 * 9
    best = study.table.groupby(["batch_size", "seed"])["final_loss"].min().groupby("batch_size").median()
    assert target == sorted(best)[6]  # of nine the seventh: 0.75 of the distance from the lowest to the highest


def test_the_target_loss_is_the_study_s_whatever_is_shown():
    """Of a setting with lower losses, alone, the fit is the same as beside others; and it is to the loss that was set."""
    sizes = [4, 16, 64, 256, 1024]
    study = study_of(
        batch_size=sizes, eta=[2.0**k for k in range(-10, 3)], seed=[0, 1, 2], width=[32, 64], parameterization=["sp"]
    )
    whole = {trade.label: trade for trade in trades(study)}
    shifted = study.table.assign(
        final_loss=study.table["final_loss"].where(study.table["width"] == 32, study.table["final_loss"] / 2)
    )
    assert default_target(where(study._replace(table=shifted), ["width=64"]).table) < default_target(shifted)
    for width in (32, 64):
        alone = where(study, [f"width={width}"])
        (found,) = trades(alone)
        assert (alone.target_loss, found.fit) == (study.target_loss, whole[f"width={width}"].fit)
        page = " ".join(" ".join(Page(study_report("stu_1", "x", alone, NONE)).texts).split())
        assert f"of training to a loss of {study.target_loss:.5g}, the target loss of the study" in page
    chosen = study._replace(target_loss=0.5)
    assert all(
        "to a loss of 0.5" in row[5]
        for row in Page(study_report("stu_1", "x", chosen, NONE)).rows
        if row[0] == "critical batch size"
    )
    steps = {trade.label: trade.fit.min_steps for trade in trades(chosen)}
    assert all(steps[label] < trade.fit.min_steps for label, trade in whole.items())
    assert trades(study._replace(target_loss=None)) == []


def test_sharpness_against_the_rate_that_the_weights_feel():
    study = measured(study_of(**GRID, width=[32]))
    fig = PLOTS["sharpness"](study)
    ((_, cells),) = maps(fig)
    np.testing.assert_allclose(cells[np.isfinite(cells)].max(), 2)
    right = next(ax for ax in fig.axes if ax.get_xlabel().startswith("learning rate applied"))
    (stability,) = (line for line in right.lines if line.get_linestyle() == "--")
    np.testing.assert_allclose(stability.get_ydata() * stability.get_xdata(), 2)
    curve = right.lines[0]
    np.testing.assert_allclose(curve.get_ydata(), np.minimum(100, 2 * 32 / curve.get_xdata()))
    assert "2 / rate" in texts(fig)
    adam = PLOTS["sharpness"](study._replace(table=study.table.assign(optimizer="adam")))
    assert "2 / rate" not in texts(adam)


def test_llc_is_beside_the_loss():
    study = measured(study_of(**GRID))
    (left, loss), (right, llc) = maps(PLOTS["llc"](study))
    assert (left.get_title(), right.get_title()) == ("final loss", "llc")
    np.testing.assert_array_equal(np.isnan(loss), np.isnan(llc))
    expected = np.broadcast_to(10 + np.log2(GRID["eta"])[:, None], llc.shape)
    np.testing.assert_allclose(llc[np.isfinite(llc)], expected[np.isfinite(llc)])


def test_plots_are_drawn_by_name():
    study = study_of(**GRID)
    drawn = draw_plots(study, ["heatmap_temp", "llc", "heatmap_batch"])
    assert (list(drawn.pngs), list(drawn.left_out)) == (["heatmap_temp", "heatmap_batch"], ["llc"])
    assert draw_plots(study, []) == ({}, {})
    with pytest.raises(InvalidInput, match=r"got 'heatmap_bach'.*Did you mean 'heatmap_batch'"):
        draw_plots(study, ["heatmap_bach"])


def test_why_a_plot_cannot_be_drawn():
    """In the numbers of the study."""
    flat, steps = study_of(batch_size=[4, 16, 64], eta=[0.01]), study_of(**GRID)
    lost = study_of(batch_size=[16, 64], eta=[64.0, 128.0], width=[32, 64])
    too_few = "it takes 2 values of {} in one setting; found {} in all of them"
    one_rate = too_few.format("batch_size and of eta", "3 and 1")
    reach = "it takes three batch sizes of one setting that reach {} after the first step; no setting has them"
    for name, study, why in (
        ("heatmap_batch", flat, one_rate),
        ("heatmap_gamma", steps, too_few.format("richness and of eta", "1 and 12")),
        ("losscurve_temp_samples", flat, one_rate),
        ("losscurve_temp_eff_steps", lost, "it takes two batch sizes at one temperature η/B, with trials that did not fail; "
         "no temperature has them"),
        ("losscurve_grid", steps._replace(curves={}), "there is no loss curve with a finite loss after the first step"),
        ("width_transfer", steps, too_few.format("width and of eta", "1 and 12")),
        ("width_transfer", lost, "every trial failed"),
        ("coordinate_check", steps, too_few.format("width", "1")),
        ("steps_to_target", lost, reach.format("a loss")),
        ("steps_to_target", steps._replace(target_loss=1e-6), reach.format("the target loss, 1e-06")),
        ("sharpness", steps, "no network's sharpness was measured; curvature=true of the study does"),
        ("llc", steps, "no network's llc was measured; sampler=NAME of the study does"),
        ("llc", measured(flat), one_rate),
    ):  # fmt: skip
        assert PLOTS[name](study) == why


def test_a_plot_that_fails_is_named(monkeypatch):
    monkeypatch.setitem(PLOTS, "llc", lambda study: study.nothing)
    with pytest.raises(RuntimeError, match=r"the plot llc failed: AttributeError: .*nothing"):
        draw_plots(study_of(**SMALL), ["heatmap_batch", "llc"])


def legend_of(fig):
    return {text.get_text() for legend in fig.legends for text in legend.get_texts()}


def test_legends_name_what_is_drawn():
    fine = {"batch_size": [16, 64, 256], "eta": [2.0**k for k in range(-9, 0)]}
    lost, cut = fine | {"eta": [2.0**k for k in range(-9, 5)]}, fine | {"eta": [2.0**k for k in range(-9, -4)]}
    assert legend_of(PLOTS["heatmap_batch"](study_of(**fine))) == {"best η"}
    assert legend_of(PLOTS["heatmap_temp"](study_of(**lost))) == {"best η", "failed"}
    assert legend_of(PLOTS["heatmap_batch"](study_of(**cut))) == {"at an end of the η tried"}
    assert legend_of(PLOTS["heatmap_batch"](study_of(**lost | {"eta": [32.0, 64.0]}))) == {"failed"}
    assert legend_of(PLOTS["heatmap_batch"](scattered(fixed=True))) == {"failed"}  # crosses: there is no grid to hatch
    raw = {"richness": [1e-3, 1e-2, 10.0, 100.0], "eta": [2.0**k for k in range(-28, 8)], "batch_size": [64]}
    assert legend_of(PLOTS["heatmap_gamma"](study_of(**raw))) == {"best η", "failed", "fitted power", "theory"}
    assert legend_of(PLOTS["llc"](measured(study_of(**fine)))) == set()
    assert legend_of(PLOTS["llc"](measured(study_of(**lost)))) == {"failed"}
    assert legend_of(PLOTS["sharpness"](measured(study_of(**lost)))) == {"failed", "2 / rate", "B=16", "B=64", "B=256"}
    widths = {"width": [32, 4096], "eta": fine["eta"], "batch_size": [64], "parameterization": ["sp"]}
    assert legend_of(PLOTS["width_transfer"](study_of(**widths))) == {"N=32", "N=4096", "best η", "at an end of the η tried"}
    dead = where(study_of(**widths), ["eta>2e-2"])  # at which the wide network fails whatever the rate
    assert legend_of(PLOTS["width_transfer"](dead)) == {"N=32", "best η"}
    assert legend_of(PLOTS["losscurve_grid"](study_of(batch_size=[64], eta=[0.25, 0.125]))) == {"η=0.25", "η=2⁻³"}
    assert legend_of(PLOTS["losscurve_grid"](study_of(batch_size=[64], eta=[0.25, 8.0]))) == {"η=0.25", "η=8", "failed"}
    inside = study_of(batch_size=[4, 16, 64, 256], eta=[2.0**k for k in range(-9, 1)])
    (label,) = legend_of(PLOTS["steps_to_target"](inside))
    assert label.startswith("B_crit")
    ends = study_of(batch_size=[4, 16, 64, 256], eta=[0.01, 0.02])
    fig = PLOTS["steps_to_target"](ends)
    assert "at an end of the η tried" in legend_of(fig)
    for ax in fig.axes:  # over the full marks of their errors
        (hollow,) = (line for line in ax.lines if line.get_markerfacecolor() == "white")
        full = ax.containers[0][0]
        assert len(hollow.get_xdata()) == 4
        assert hollow.get_zorder() > full.get_zorder()


def test_titles_say_how_many_lines_are_drawn():
    study = study_of(batch_size=[2**k for k in range(1, 11)], eta=[2.0**k for k in range(-9, 3)], richness=[0.5, 1.0])
    assert "7 of 12 learning rates" in PLOTS["losscurve_grid"](study).get_suptitle()
    found = PLOTS["losscurve_temp_samples"](study).get_suptitle()
    assert "1 of 2 settings" in found
    assert re.search(r"7 of (8|9|10) batch sizes", found)
    many = study_of(batch_size=[4, 16, 64, 256], eta=[2.0**k for k in range(-9, 1)], width=list(range(60, 70)))
    assert "6 of 10 settings" in PLOTS["steps_to_target"](many).get_suptitle()
    widths = study_of(batch_size=[64], eta=[0.1, 0.2], width=list(range(60, 70)))
    assert "7 of 10 widths" in PLOTS["width_transfer"](widths).get_suptitle()


# --- Filters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "keep"),
    [
        ([], lambda row: True),
        (["batch_size=16,64"], lambda row: row.batch_size in (16, 64)),
        (["batch_size=range(16,65)", "seed=1"], lambda row: row.batch_size in (16, 64) and row.seed == 1),
        (["eta>=0.25"], lambda row: row.eta >= 0.25),
        (["eta > 0.25", "eta<=1"], lambda row: 0.25 < row.eta <= 1),
        (["temperature<1e-3"], lambda row: row.temperature < 1e-3),
        (["temperature=0.00390625"], lambda row: np.isclose(row.temperature, 2.0**-8)),
        (["final_loss=none"], lambda row: np.isnan(row.final_loss)),
        (["optimizer=SGD", "task.dataset=digits,other"], lambda row: True),
        (["optimizer=adam"], lambda row: False),
    ],
)
def test_where(texts, keep):
    study = study_of(**GRID)
    found = where(study, texts)
    assert list(found.table["trial_id"]) == [row.trial_id for row in study.table.itertuples() if keep(row)]
    assert list(found.curves) == list(found.table["trial_id"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size", "A condition is COLUMN=VALUE.*got 'batch_size'.*batch_size=16,64"),
        ("batch_size=", "got 'batch_size='"),
        ("batchsize=3", "got 'batchsize=3'.*Did you mean 'batch_size'"),
        ("eta>1,2", "one number; got 'eta>1,2'"),
        ("eta<big", "one number; got 'eta<big'"),
        ("optimizer<3", "one number; got 'optimizer<3'"),
        ("eta=(", "is no value"),
    ],
)
def test_where_refuses(text, message):
    with pytest.raises(InvalidInput, match=message):
        where(study_of(batch_size=[4], eta=[0.1]), [text])


def test_swept_settings():
    study = study_of(**GRID, width=[64])
    assert swept(study.table) == ["eta", "batch_size", "seed"]
    assert "final_loss" not in settings(study.table)
    # Epochs: the batch size determines the number of steps.
    epochs = study.table.assign(num_steps=4096 // study.table["batch_size"])
    assert swept(epochs) == ["eta", "batch_size", "seed"]
    assert swept(study.table.assign(num_steps=np.arange(len(study.table)))) == ["eta", "batch_size", "num_steps", "seed"]


# --- The report --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studied():
    study = measured(study_of(**GRID, width=[32, 64], richness=[1.0]))
    return study, study_report(
        "stu_0123456789abcdef",
        "B & <eta>",
        study,
        Drawn({"heatmap_batch": PNG, "llc": PNG}, {"width_transfer": "of <b>"}),
        "2026-01-02 03:04",
    )


def test_report_needs_nothing_else(studied):
    _, html = studied
    page = Page(html)
    assert_needs_nothing_else(html, page)


def test_report_says_what_was_run_and_found(studied):
    study, html = studied
    page = Page(html)
    text = " ".join(page.texts)
    assert "B & <eta>: 288 trials" in text
    assert "stu_0123456789abcdef" in text
    fields = dict(page.settings)
    failed = str(study.table["final_loss"].isna().sum())
    assert (fields["trials"], fields["failed"], fields["diverged"]) == ("288", failed, failed)
    assert (fields["optimizer"], fields["richness"]) == ("sgd", "1")
    assert ["batch_size", "4", "4, 16, 64, 256"] in page.rows
    assert ["seed", "3", "0, 1, 2"] in page.rows
    (head,) = (index for index, row in enumerate(page.rows) if row[:4] == ["width", "eta", "batch_size", "final_loss"])
    best = trial(0.25, 256)[0]["final_loss"]
    assert [row[:4] for row in page.rows[head + 1 : head + 3]] == [
        [width, "0.25", "256", f"{best:.5g}"] for width in ("32", "64")
    ]
    assert any(row[0] == "exponent of the best η over N" and row[4] == "0" for row in page.rows)
    found, _ = trades(study)
    (row,) = (row for row in page.rows if row[:2] == ["critical batch size", "width=32"])
    assert row[2] == f"{found.fit.batch_size:.5g}"
    assert row[4] == "gradient noise scale 70.4"
    assert f"heatmap_batch : {CAPTIONS['heatmap_batch']}." in text
    assert ["width_transfer", "of <b>"] in page.rows
    assert "A selection" not in text


def test_captions_are_for_readers():
    """A sentence or more on each plot, that is not its docstring."""
    assert CAPTIONS.keys() == PLOTS.keys()
    for name, caption in CAPTIONS.items():
        assert 80 < len(caption) < 500
        assert caption[-1].isalnum() or caption[-1] == ")"
        assert " ".join((PLOTS[name].__doc__ or "").split())[:40] not in caption


def test_report_of_a_selection_says_so():
    study = study_of(**GRID, width=[32, 64])
    chosen = where(study, ["width=32", "eta<1"])
    page = Page(study_report("stu_1", "x", chosen, NONE, chosen=["width=32", "eta<1"], num_trials=len(study.table)))
    text = " ".join(" ".join(page.texts).split())
    assert f"x: {len(chosen.table)} of {len(study.table)} trials" in text
    assert "the trials with width=32 and eta<1 ." in text
    assert not page.of("1")  # which "<1" would be


def test_report_leaves_no_value_out():
    """Of any setting, whether it was swept, follows another, or is the same in all trials."""
    etas, seeds = [1.1**k for k in range(-30, 10)], list(range(40))
    trials = [trial(eta, 64) for eta in etas] + [trial(1.0, 64, seed=seed) for seed in seeds] + [trial(1.0, 16)]
    study = of_trials(trials)
    steps = study.table["batch_size"].map({64: 512, 16: 2048})
    classes = "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"
    study = study._replace(table=study.table.assign(num_steps=steps))
    study.table.insert(1, "task.classes", classes)
    page = Page(study_report("stu_1", "x", study, NONE))
    rows = {row[0]: row for row in page.rows if len(row) == 3}
    assert rows["eta"] == ["eta", "40", ", ".join(map(number, etas))]
    assert rows["seed"] == ["seed", "40", ", ".join(map(str, seeds))]
    assert rows["num_steps"] == ["num_steps", "2", "512, 2048"]  # as the batch size has it
    fields = dict(page.settings)
    assert fields["task.classes"] == classes
    every = {name for name in settings(study.table) if study.table[name].notna().any() and name != "checkpoint_steps"}
    assert every <= fields.keys() | rows.keys()


def test_report_names_the_exponents_of_the_richness():
    study = study_of(richness=[1e-3, 1e-2, 10.0, 100.0], eta=[2.0**k for k in range(-28, 8)], batch_size=[64])
    rows = {row[0]: row for row in Page(study_report("stu_1", "richness", study, NONE)).rows}
    for name, power in (("lazy, γ ≤ 0.03", 2), ("rich, γ ≥ 10", 1)):
        row = rows[f"exponent of the best η over γ, {name}"]
        assert float(row[2]) == pytest.approx(power)
        assert row[3:] == ["–", str(power), "of 2 values"]


def test_report_of_a_large_study_is_bounded():
    rows = [trial(0.1, 4, seed=seed)[0] for seed in range(MAX_TRIALS + 1)]
    page = Page(study_report("stu_1", "seeds", Study(pd.DataFrame(rows), {}), NONE))
    assert f"The best {MAX_TRIALS} of {MAX_TRIALS + 1} trials, by final loss" in " ".join(page.texts)
    assert len(page.rows) < MAX_TRIALS + 20


@pytest.mark.parametrize("shape", SHAPES)
def test_report_of_every_shape(shape):
    study = SHAPES[shape][0]()
    page = Page(study_report("stu_1", shape, study, NONE))
    assert dict(page.settings)["trials"] == str(len(study.table))
