"""Plots: each draws on any trace a run can leave, and shows the numbers it should."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_diagnostics import METRICS, spec_of
from test_llc import CHAINS, DRAWS, iid, trace_of

from lambda_hat.diagnostics import diagnose
from lambda_hat.plots import EXACT, POOLED, RUN_PLOTS, TARGET_PLOTS, plot_trace, save_png

BURNIN = 100


def run_of(llc, burnin=0, kind="sgld", **sampler):
    spec = spec_of(kind, chains=len(llc), draws=llc.shape[1] - burnin, burnin=burnin, **sampler)
    trace = trace_of(llc, burnin)
    return spec, trace, diagnose(spec, trace, METRICS)


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
    spec, trace, diagnosis = run_of(llc, burnin)
    fig = RUN_PLOTS[name](spec, trace, diagnosis)
    assert min(png_size(save_png(fig))) > 300
    (ax,) = fig.axes
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert ax.get_title("left") == f"quadratic · sgld · {diagnosis.verdict}"
    assert ax.get_title("right") == spec.run_id


@trace_case
@pytest.mark.parametrize("name", TARGET_PLOTS)
def test_every_target_plot_draws_every_trace(name, case):
    llc, burnin = TRACES[case]()
    runs = [run_of(llc, burnin), run_of(normal(), BURNIN, "hmc", num_integration_steps=3)]
    assert min(png_size(save_png(TARGET_PLOTS[name](runs)))) > 300
    png_size(save_png(TARGET_PLOTS[name](runs[:1])))


@pytest.mark.parametrize("name", ["trace", "running_llc"])
def test_exact_and_pooled_lines(name):
    spec, trace, diagnosis = run_of(normal(), BURNIN)
    fig = RUN_PLOTS[name](spec, trace, diagnosis)
    (ax,) = fig.axes
    (exact,), (pooled,) = lines(ax, EXACT), lines(ax, POOLED)
    assert (list(exact.get_ydata()), exact.get_linestyle()) == ([5.5, 5.5], "--")
    assert pooled.get_ydata()[-1] == pytest.approx(diagnosis.llc)
    assert legend_text(fig)[:4] == [f"chain {chain}" for chain in range(CHAINS)]
    assert {"exact 11/2", f"llc {diagnosis.llc:.4g} ± {diagnosis.mcse:.2g}"} <= set(legend_text(fig))
    assert "nβ" in RUN_PLOTS["trace"](spec, trace, diagnosis).axes[0].get_ylabel()


def test_no_exact_line_without_exact_value():
    spec, trace, _ = run_of(normal(), BURNIN)
    diagnosis = diagnose(spec, trace, METRICS | {"true_llc": None})
    for plot in RUN_PLOTS.values():
        assert not lines(plot(spec, trace, diagnosis).axes[0], EXACT)


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
    fig = TARGET_PLOTS["llc_convergence"]([(spec, trace, diagnosis)])
    for ax, total in zip(fig.axes, (spec.fge, diagnosis.seconds), strict=True):
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
        assert len(legend_text(plot(*run_of(llc, burnin)))) < 6
