"""Plots: each draws on any trace a run can leave, and shows the numbers it should."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_diagnostics import METRICS, spec_of
from test_estimates import CHAINS, DRAWS, NBETA, ar1, iid, trace_of

from lambda_hat.llc.diagnostics import diagnose
from lambda_hat.llc.plots import RUN_PLOTS, SWEEP_PLOTS, TARGET_PLOTS, save_png
from lambda_hat.llc.plots.run import plot_trace
from lambda_hat.specs.text import with_error
from lambda_hat.studies.style import EXACT, POOLED

BURNIN = 100


OBSERVABLES = {"train": 30, "class_3": 10, "class_7": 20}
ALWAYS = ("trace", "rank", "running_llc", "autocorrelation", "energy")


def run_of(llc, burnin=0, kind="sgld", metrics=METRICS, everything=False, **sampler):
    """A run with these draws; with coordinates and losses on datasets if `everything` was recorded."""
    spec = spec_of(kind, chains=len(llc), draws=llc.shape[1] - burnin, burnin=burnin, **sampler)
    trace = trace_of(llc, burnin)
    if everything:
        coordinates = np.sqrt(np.abs(llc[:, :, None])) * np.arange(1.0, 9.0)
        observed = llc[:, :, None] * np.linspace(-1, 2, 60) / NBETA
        trace = trace_of(llc, burnin, coordinates=coordinates, observed=observed, observables=OBSERVABLES)
    return spec, trace, diagnose(spec, trace, metrics)


def normal():
    return iid(shape=(CHAINS, BURNIN + DRAWS))


def nan_chains():
    """One diverges after burn-in, growing without bounds first; one is lost from the start."""
    llc = normal()
    llc[1, 480:500] *= np.geomspace(1, 1e30, 20)
    llc[1, 500:] = np.nan
    llc[2] = np.inf
    return llc


def all_nan():
    llc = normal()
    llc[:, :20] *= np.geomspace(1, 1e30, 20)
    llc[:, 20:] = np.nan
    return llc


#: (llc draws, number of burn-in draws among them)
TRACES = {
    "normal": lambda: (normal(), BURNIN),
    "nan chains": lambda: (nan_chains(), BURNIN),
    "one chain left": lambda: (np.where(np.arange(CHAINS)[:, None] > 0, np.nan, normal()), BURNIN),
    "all nan": lambda: (all_nan(), BURNIN),
    "nan from the first draw": lambda: (np.full((CHAINS, 50), np.nan), 10),
    "single chain": lambda: (normal()[:1], BURNIN),
    "tiny": lambda: (iid(shape=(CHAINS, 4)), 0),
    "tiny single chain": lambda: (iid(shape=(1, 5)), 1),
    "standing still": lambda: (np.zeros((CHAINS, 50)), 0),
    "below w*": lambda: (normal() - 20, BURNIN),
    "an outlier": lambda: (np.where(np.arange(BURNIN + DRAWS) == 600, 1e12, normal()), BURNIN),
    "many long chains": lambda: (iid(shape=(30, 5000)), 1000),
}
trace_case = pytest.mark.parametrize("case", TRACES)
run_plot = pytest.mark.parametrize("name", RUN_PLOTS)


def title(fig):
    return fig.get_suptitle()


def png_size(content):
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) < 200_000
    return struct.unpack(">II", content[16:24])


def lines(ax, color):
    return [line for line in ax.lines if to_hex(line.get_color()).lower() == to_hex(color).lower()]


def legend_text(fig):
    return [text.get_text() for legend in fig.legends for text in legend.get_texts()]


@trace_case
@run_plot
def test_every_run_plot_draws_every_trace(name, case):
    llc, burnin = TRACES[case]()
    spec, trace, diagnosis = run_of(llc, burnin, everything=True)
    fig = RUN_PLOTS[name](spec, trace, diagnosis)
    if diagnosis.llc is None and name not in ALWAYS:
        assert fig is None
        return
    assert min(png_size(save_png(fig))) > 200
    assert title(fig) == f"quadratic · sgld · {diagnosis.verdict}"
    assert spec.run_id in [text.get_text() for text in fig.texts]
    assert any(ax.get_xlabel() for ax in fig.axes) or name == "influence"


def test_plots_of_what_was_not_recorded_are_left_out():
    run = run_of(normal(), BURNIN)
    assert [name for name, plot in RUN_PLOTS.items() if plot(*run) is not None] == list(ALWAYS)


@trace_case
@pytest.mark.parametrize("name", TARGET_PLOTS)
def test_every_target_plot_draws_every_trace(name, case):
    llc, burnin = TRACES[case]()
    runs = [run_of(llc, burnin), run_of(normal(), BURNIN, "hmc", num_integration_steps=3)]
    for some in (runs, runs[:1]):
        fig = TARGET_PLOTS[name](some)
        assert (fig is None) == (name != "llc_convergence")
        if fig is not None:
            assert min(png_size(save_png(fig))) > 300


@pytest.mark.parametrize("name", ["trace", "running_llc"])
def test_exact_and_pooled_lines(name):
    spec, trace, diagnosis = run_of(normal(), BURNIN)
    fig = RUN_PLOTS[name](spec, trace, diagnosis)
    (ax,) = fig.axes
    (exact,), (pooled,) = lines(ax, EXACT), lines(ax, POOLED)
    assert (list(exact.get_ydata()), exact.get_linestyle()) == ([5.5, 5.5], "--")
    assert pooled.get_ydata()[-1] == pytest.approx(diagnosis.llc)
    assert legend_text(fig)[:4] == [f"chain {chain}" for chain in range(CHAINS)]
    assert {"exact 11/2", f"llc {with_error(diagnosis.llc, diagnosis.mcse)}"} <= set(legend_text(fig))
    assert "nβ" in RUN_PLOTS["trace"](spec, trace, diagnosis).axes[0].get_ylabel()


def test_no_exact_line_without_exact_value():
    spec, trace, _ = run_of(normal(), BURNIN)
    diagnosis = diagnose(spec, trace, METRICS | {"true_llc": None})
    for name in ALWAYS:
        assert not lines(RUN_PLOTS[name](spec, trace, diagnosis).axes[0], EXACT)


def test_trace_shades_burnin_and_marks_lost_chains():
    fig = plot_trace(*run_of(nan_chains(), BURNIN, num_steps_bw_draws=10))
    (ax,) = fig.axes
    (shade,) = ax.patches
    assert (shade.get_x(), shade.get_width()) == (0, 10 * BURNIN)
    (crosses,) = ax.collections
    np.testing.assert_array_equal(np.asarray(crosses.get_offsets())[:, 0], [10 * 501, 10 * 1])
    assert "not finite from here: 2 of 4 chains" in legend_text(fig)
    assert ax.get_ylim()[1] < 50  # the diverging chain does not squash the others
    assert ax.get_xlim() == (0, 10 * (BURNIN + DRAWS))


def test_a_diverged_run_is_shown_up_to_its_end():
    (ax,) = plot_trace(*run_of(all_nan(), BURNIN)).axes
    assert ax.get_yscale() == "symlog"
    assert ax.get_xlim()[1] < 50
    assert max(np.max(line.get_ydata()) for line in ax.lines) > 1e29


def test_rank_band_holds_agreeing_chains_only():
    def excess(llc):
        fig = RUN_PLOTS["rank"](*run_of(llc))
        (ax,) = fig.axes
        (band,) = ax.patches
        curves = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) > 2]
        assert len(curves) == CHAINS
        np.testing.assert_allclose([curve[-1] for curve in curves], 0)
        return max(np.abs(curve).max() for curve in curves) / (band.get_y() + band.get_height())

    assert excess(iid()) < 1
    assert excess(iid() + np.array([[0], [0], [0], [1.0]])) > 1


def test_convergence_counts_burnin_as_work_but_not_as_evidence():
    llc = normal()
    llc[:, :BURNIN] = 1e9
    spec, trace, diagnosis = run_of(llc, BURNIN)
    assert diagnosis.fge == trace.draws["work"].sum()
    fig = TARGET_PLOTS["llc_convergence"]([(spec, trace, diagnosis)])
    for ax, total in zip(fig.axes, (diagnosis.fge, diagnosis.seconds), strict=True):
        estimate, exact = ax.lines
        assert ax.get_xscale() == "log"
        assert list(exact.get_ydata()) == [5.5, 5.5]
        assert estimate.get_xdata()[-1] == pytest.approx(total)
        assert estimate.get_xdata()[0] == pytest.approx(total * (BURNIN + 4) / (BURNIN + DRAWS))
        assert estimate.get_ydata()[-1] == pytest.approx(diagnosis.llc)
        assert estimate.get_ydata().max() < 20
    assert "gradient equivalents" in fig.axes[0].get_xlabel()
    assert "seconds" in fig.axes[1].get_xlabel()


def test_convergence_names_runs_by_what_differs():
    draws = normal()
    runs = [run_of(draws, BURNIN, step_size=step) for step in (1e-4, 1e-5)] + [run_of(draws, BURNIN, "hmc")]
    names = [text.split(":")[0] for text in legend_text(TARGET_PLOTS["llc_convergence"](runs))]
    assert names == ["sgld step_size=0.0001", "sgld step_size=1e-05", "hmc", "exact 11/2"]


def test_convergence_is_not_squashed_by_a_wild_run():
    wild = run_of(iid(llc=1e6), step_size=1e-2)
    fig = TARGET_PLOTS["llc_convergence"]([run_of(normal(), BURNIN), wild])
    assert fig.axes[0].get_ylim()[1] < 20
    assert any("llc above d/2" in text for text in legend_text(fig))


def test_many_chains_are_not_all_named():
    llc, burnin = TRACES["many long chains"]()
    for plot in RUN_PLOTS.values():
        assert len(legend_text(plot(*run_of(llc, burnin, everything=True)))) < 6


def test_energy_is_loss_and_pull():
    spec, trace, _ = run = run_of(normal(), BURNIN)
    over_time, spread = RUN_PLOTS["energy"](*run).axes
    line = over_time.lines[0]
    expected = (trace.draws["loss_difference"] * NBETA + 0.5 * spec.posterior.localization * 0.1)[0, BURNIN:]
    np.testing.assert_allclose(line.get_ydata(), expected[:: -(-DRAWS // 400)])
    # Independent draws change by twice their variance.
    (bfmi,) = (text for text in spread.get_legend().get_texts() if "E-BFMI" in text.get_text())
    assert float(bfmi.get_text().split()[-1]) == pytest.approx(2, abs=0.1)


def test_autocorrelation_of_ar1():
    fig = RUN_PLOTS["autocorrelation"](*run_of(5 + ar1(0.8, (CHAINS, 4000)), num_steps_bw_draws=10))
    (ax,) = fig.axes
    (mean,) = (line for line in lines(ax, POOLED) if line.get_label().startswith("mean"))
    lags, values = mean.get_data()
    np.testing.assert_array_equal(lags[:3], [0, 10, 20])
    np.testing.assert_allclose(values[:5], 0.8 ** np.arange(5), atol=0.05)


def test_theta_trace_has_a_panel_for_each_coordinate():
    fig = RUN_PLOTS["theta_trace"](*run_of(nan_chains(), BURNIN, everything=True))
    assert len(fig.axes) == 8
    assert legend_text(fig) == ["chain 0", "chain 3"]


def test_llc_by_dataset_shows_what_the_diagnosis_says():
    run = run_of(normal(), BURNIN, everything=True)
    (ax,) = RUN_PLOTS["llc_by_dataset"](*run).axes
    assert [bar.get_width() for bar in ax.patches if bar.get_height() < 0.7] == pytest.approx(
        [found.llc for found in run[2].llc_by_dataset.values()]
    )
    assert [label.get_text() for label in ax.get_yticklabels()] == ["train (30)", "class_3 (10)", "class_7 (20)"]


def test_influence_of_samples_and_of_datasets():
    fig = RUN_PLOTS["influence"](*run_of(normal(), BURNIN, everything=True))
    samples, datasets = (ax.images[0].get_array() for ax in fig.axes[:2])
    assert (samples.shape, datasets.shape) == ((60, 60), (3, 3))
    # Losses are slopes times llc/NBETA, whose variance is 5.
    slopes = np.linspace(-1, 2, 60)
    np.testing.assert_allclose(samples, -np.outer(slopes, slopes) * 5 / NBETA**2, rtol=0.15)
    means = [slopes[:30].mean(), slopes[30:40].mean(), slopes[40:].mean()]
    np.testing.assert_allclose(datasets, -np.outer(means, means) * 5 / NBETA**2, rtol=0.15)


def posterior(run, **changes):
    spec, trace, diagnosis = run
    return spec.model_copy(update={"posterior": spec.posterior.model_copy(update=changes)}), trace, diagnosis


def grid(kind="sgld", steps=(1e-5, 1e-4, 1e-3), localizations=(1.0, 10.0), **fields):
    return [
        posterior(run_of(iid(llc=5.0 * step / 1e-5), kind=kind, step_size=step, **fields), localization=localization)
        for step in steps
        for localization in localizations
    ]


def test_calibration_map():
    runs = [*grid(), run_of(iid(), kind="hmc")]
    fig = TARGET_PLOTS["calibration"](runs)
    left, right = fig.axes[:2]
    np.testing.assert_allclose(left.images[0].get_array(), [[d.llc for _, _, d in runs[k:6:2]] for k in (0, 1)])
    assert [label.get_text() for label in left.get_xticklabels()] == ["1e-05", "0.0001", "0.001"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["1", "10"]
    assert (left.get_title(), right.get_title()) == ("sgld: llc, exact 11/2", "acceptance rate")
    assert legend_text(fig) == ["llc above d/2"]
    assert len(left.collections) - 1 == sum(d.verdict != "ok" for _, _, d in runs[:6]) == 4


def test_calibration_averages_seeds_and_takes_each_sampler_by_itself():
    runs = grid() + grid(seed=1) + grid("sghmc")
    fig = TARGET_PLOTS["calibration"](runs)
    assert len([ax for ax in fig.axes if ax.images]) == 4
    assert TARGET_PLOTS["calibration"](grid(steps=(1e-5,))) is None
    assert TARGET_PLOTS["calibration"](grid(localizations=(1.0,))) is None


def test_calibration_without_an_estimate_somewhere():
    lost = posterior(run_of(all_nan()[:, :DRAWS], kind="sgld", step_size=1e-2), localization=10.0)
    (ax, *_) = TARGET_PLOTS["calibration"]([*grid(), lost]).axes
    assert np.isnan(np.ma.filled(ax.images[0].get_array(), np.nan)).sum() == 2  # one diverged, one was not run


def checkpoints(steps, kind="hmc"):
    target = {
        "family": "mlp",
        "training": {"num_steps": 1000, "checkpoint_steps": [step for step in steps if step is not None]},
    }
    for index, step in enumerate(steps):
        metrics = METRICS | {"init_loss": 2.0 / (index + 1), "true_llc": None, "test_accuracy": 0.3 * index}
        yield run_of(iid(llc=2.0 + index), kind=kind, metrics=metrics, target=target | {"checkpoint": step})


def test_llc_over_training():
    runs = [*checkpoints([1, 10, 100, None]), *checkpoints([1, 10, 100, None], kind="nuts")]
    assert len({spec.target_id for spec, _, _ in runs}) == 1
    fig = TARGET_PLOTS["llc_over_training"](runs)
    above, below, accuracy = fig.axes
    assert [container.get_label() for container in above.containers] == ["hmc", "nuts"]
    x, y = above.containers[0][0].get_data()
    np.testing.assert_array_equal(x, [1, 10, 100, 1000])
    np.testing.assert_allclose(y, [d.llc for _, _, d in runs[:4]])
    assert below.get_xscale() == "log"
    (loss,) = (line for line in below.lines if len(line.get_xdata()))
    np.testing.assert_allclose(loss.get_ydata(), [2, 1, 2 / 3, 0.5])
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [0, 0.3, 0.6, 0.9])
    assert TARGET_PLOTS["llc_over_training"](runs[:1]) is None


def test_llc_over_training_from_the_start():
    fig = TARGET_PLOTS["llc_over_training"](list(checkpoints([0, 10])))
    assert (fig.axes[1].get_xscale(), fig.axes[1].get_xlim()[0]) == ("symlog", 0)
    assert min(png_size(save_png(fig))) > 300


def test_temperature_integrates_the_llc():
    runs = [posterior(run_of(iid(seed), kind="hmc"), nbeta=nbeta) for seed, nbeta in enumerate((10.0, 100.0, 1000.0))]
    left, right = TARGET_PLOTS["temperature"](runs).axes
    llc = [d.llc for _, _, d in runs]
    np.testing.assert_allclose(left.containers[0][0].get_ydata(), llc)
    steps = np.log(10) * (np.array(llc[1:]) + np.array(llc[:-1])) / 2
    np.testing.assert_allclose(right.containers[0][0].get_ydata(), [0, steps[0], steps.sum()])
    assert TARGET_PLOTS["temperature"](runs[:2]) is None


def test_llc_vs_true():
    exact = {2.0: "2", 5.0: "5", 20.0: "20"}
    runs = [run_of(iid(llc=value * 1.1), kind=kind, metrics=METRICS | {"true_llc": text, "num_params": 100})
            for value, text in exact.items() for kind in ("hmc", "sgld")]  # fmt: skip
    runs.append(run_of(all_nan(), kind="sgld", metrics=METRICS | {"true_llc": "5"}))
    results = [(spec, diagnosis) for spec, _, diagnosis in runs]
    fig = SWEEP_PLOTS["llc_vs_true"](results)
    (ax,) = fig.axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "linear")
    by_kind = {container.get_label().split(":")[0]: container[0] for container in ax.containers}
    np.testing.assert_allclose(by_kind["hmc"].get_xdata(), list(exact))
    np.testing.assert_allclose(by_kind["hmc"].get_ydata(), [d.llc for s, _, d in runs if s.sampler.kind == "hmc"])
    assert any(text.startswith("sgld: median |error|") and text.endswith("1 without an estimate") for text in legend_text(fig))
    assert all("order 1.00" in text for text in legend_text(fig) if "median" in text)
    assert SWEEP_PLOTS["llc_vs_true"](results[:2]) is None
    spec, _, unknown = run_of(normal(), BURNIN, metrics=METRICS | {"true_llc": None})
    assert SWEEP_PLOTS["llc_vs_true"]([(spec, unknown)] * 2) is None
