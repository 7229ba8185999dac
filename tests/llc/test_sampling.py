"""The sampling loop."""

from __future__ import annotations

import numpy as np
import pytest
from test_samplers import CASES, assert_within, case, quadratic, spec_of

from lambda_hat.compute import chunks
from lambda_hat.llc.sampling import Run, sample, sample_runs
from lambda_hat.llc.trace import Checkpoint
from lambda_hat.samplers.posterior import PosteriorSpec
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.target import OBSERVABLE_SIZE
from lambda_hat.targets.theory import quadratic_llc

pytestmark = pytest.mark.usefixtures("library_promotion")


class _Killed(Exception):
    pass


def _sample(spec, *, save=None, resume=None, progress=chunks.no_progress, **posterior):
    target = quadratic()
    return sample(
        target.spec.objective(), target.params_star, target.dataset, PosteriorSpec(**posterior), spec,
        save=save, resume=resume, progress=progress,
    )  # fmt: skip


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
    spec = spec_of("sgld", step_size=1e-5, num_draws=30, num_burnin_steps=41, num_steps_bw_draws=20)
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
    """The planned work (FGE) is the gradients asked for; the recorded one adds the trials of the step size."""
    fields = {"num_draws": 30, "num_burnin_steps": 41, "num_steps_bw_draws": 20, "batch_size": 100, "step_size": 1e-5}
    sgld = spec_of("sgld", **fields)
    assert sgld.fge(1000) == pytest.approx(4 * (60 + 600) * 0.2)  # control variates take two gradients
    assert spec_of("sgld", **fields, gradient="plain").fge(1000) == pytest.approx(4 * (60 + 600) * 0.1)
    trials = 4 * 7 * 3 * 0.2  # of 660 steps, every 100th from the first, three minibatches each
    assert _sample(sgld).draws["work"].sum() == pytest.approx(sgld.fge(1000) + trials)
    hmc = spec_of("hmc", num_draws=30, num_burnin_steps=40, num_integration_steps=7)
    assert hmc.fge(1000) == 4 * 70 * 7


RUNS = [Run(PosteriorSpec(nbeta=nbeta, localization=nbeta / 50), spec_of("hmc", num_draws=300, seed=seed))
        for seed, nbeta in enumerate([50.0, 150.0, 500.0])]  # fmt: skip


def _sample_runs(runs, **options):
    target = quadratic()
    return sample_runs(target.spec.objective(), target.params_star, target.dataset, runs, **options)


def test_runs_sampled_together_are_the_runs_sampled_alone():
    traces = _sample_runs(RUNS)
    for run, trace in zip(RUNS, traces, strict=True):
        alone = _sample_runs([run])[0]
        np.testing.assert_allclose(trace.draws["loss_difference"][:, :20], alone.draws["loss_difference"][:, :20], rtol=1e-3)
        exact = quadratic_llc(quadratic().spec.curvatures(), run.posterior.nbeta, run.posterior.localization)
        assert_within(run.posterior.nbeta * trace.posterior_draws("loss_difference"), exact)


def test_a_part_of_the_runs_resumes_in_its_lanes(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 0.01)
    whole = _sample_runs(RUNS)
    saved: list[list[Checkpoint]] = []
    _sample_runs(RUNS, save=saved.append)
    checkpoints = saved[len(saved) // 2]
    assert [(checkpoint.lane, checkpoint.num_lanes) for checkpoint in checkpoints] == [(0, 3), (1, 3), (2, 3)]
    resumed = _sample_runs([RUNS[2], RUNS[0]], resume=[checkpoints[2], checkpoints[0]], lanes=([2, 0], 3))
    for trace, expected in zip(resumed, (whole[2], whole[0]), strict=True):
        for name, draws in expected.draws.items():
            np.testing.assert_array_equal(trace.draws[name], draws)


def test_observables_are_per_sample_losses_at_the_draws():
    """Each run gets its own, whatever the others observe; they average to the full-data loss."""
    target = quadratic()
    few = target.dataset.take(np.arange(3))
    plain = spec_of("hmc", num_draws=20)
    names = [(), ("few", "train"), ("train",)]
    runs = [Run(PosteriorSpec(), plain.model_copy(update={"observables": own})) for own in names]
    nothing, both, train = _sample_runs(runs, observables={"few": few, "unused": few})
    assert "observed" not in nothing.draws
    assert both.observables == {"few": 3, "train": OBSERVABLE_SIZE}
    assert both.draws["observed"].shape == (4, plain.num_burnin_draws + 20, 3 + OBSERVABLE_SIZE)
    np.testing.assert_array_equal(both.draws["observed"][..., 3:], train.draws["observed"])
    everything = Run(PosteriorSpec(), plain.model_copy(update={"observables": ("all",)}))
    all_samples = _sample_runs([everything], observables={"all": target.dataset})[0]
    np.testing.assert_allclose(
        all_samples.draws["observed"].mean(axis=2), all_samples.draws["loss_difference"], rtol=1e-3, atol=1e-6
    )


def test_an_unknown_observable_is_refused():
    run = Run(PosteriorSpec(), spec_of("hmc", observables=("tset",)))
    with pytest.raises(InvalidInput, match=r"got 'tset'.*This target has: train, test"):
        _sample_runs([run], observables={"test": quadratic().dataset})


def test_masked_parameters_stay():
    """The llc of part of a quadratic is that part's."""
    trace = _sample(spec_of("hmc", num_draws=1000), parameters=("w[1:4]",), nbeta=150.0)
    assert trace.draws["coordinates"].shape[2] == 3
    exact = quadratic_llc(quadratic().spec.curvatures()[1:4], 150.0, 1.0)
    assert_within(150.0 * trace.posterior_draws("loss_difference"), exact)
