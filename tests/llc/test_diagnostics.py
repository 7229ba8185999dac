"""What a run is said to be: every verdict from a trace made for it, and what must not enter a number."""

from __future__ import annotations

import json
import re
from typing import get_args

import numpy as np
import pytest
from test_estimates import CHAINS, DRAWS, NBETA, ar1, gaussian, iid, trace_of
from test_observables import regression

from lambda_hat.llc.diagnostics import Diagnosis, diagnose
from lambda_hat.llc.run import RunSpec
from lambda_hat.llc.trace import FIELDS, Trace
from lambda_hat.samplers.kinds import AnySamplerSpec
from lambda_hat.targets.families import AnyTargetSpec

DIM = 20
METRICS = {"init_loss": 0.5, "num_params": DIM, "num_data": 1000, "true_llc": "11/2"}


def spec_of(kind="hmc", draws=DRAWS, chains=CHAINS, burnin=0, target=None, localization=1.0, **sampler):
    fields = {"kind": kind, "num_chains": chains, "num_draws": draws, "num_steps_bw_draws": 1, **sampler}
    fewest = 400  # of steps that some need to adapt in
    fields["num_burnin_steps"] = max(burnin * fields["num_steps_bw_draws"], fewest)
    posterior = {"nbeta": NBETA, "localization": localization}
    return RunSpec.from_dict(
        {"target": target or {"family": "quadratic", "dim": DIM}, "posterior": posterior, "sampler": fields}
    )


def verdicts(diagnosis):
    return [finding.verdict for finding in diagnosis.findings]


def test_pooled_numbers():
    llc = iid()
    diagnosis = diagnose(spec_of(), trace_of(llc, acceptance_rate=0.7), METRICS)
    assert diagnosis.llc == pytest.approx(llc.mean())
    assert diagnosis.llc_per_chain == pytest.approx(llc.mean(axis=1))
    assert (diagnosis.true_llc, diagnosis.true_llc_text) == (5.5, "11/2")
    assert diagnosis.relative_error == pytest.approx(llc.mean() / 5.5 - 1)
    assert diagnosis.acceptance_rate == pytest.approx(0.7)
    assert (diagnosis.seconds, diagnosis.compile_seconds, diagnosis.nbeta) == (4.0, 2.0, NBETA)
    assert diagnosis.fge == 10.0 * llc.size  # as counted, not as planned
    assert diagnosis.ess_per_fge == pytest.approx(diagnosis.ess_bulk / diagnosis.fge)
    assert diagnosis.ess_per_second == pytest.approx(diagnosis.ess_bulk / 4)
    assert diagnosis.work_normalized_variance == pytest.approx(diagnosis.mcse**2 * diagnosis.fge)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["hmc", "sgld", "mclmc"])
def test_iid_draws_are_ok(kind, seed):
    diagnosis = diagnose(spec_of(kind), trace_of(iid(seed)), METRICS)
    assert (diagnosis.verdict, diagnosis.remedy, diagnosis.findings) == ("ok", "", ())


@pytest.mark.parametrize("seed", range(6))
def test_correlated_draws_are_ok(seed):
    """At an ESS of some 250 R-hat is above 1.01 more often than not."""
    llc = 5.0 + 2.2 * ar1(0.88, (CHAINS, DRAWS), seed)
    assert diagnose(spec_of(), trace_of(llc), METRICS).verdict == "ok"


def test_burnin_never_enters():
    """Poisoned burn-in draws change nothing."""
    llc, divergent = iid(shape=(CHAINS, 100 + DRAWS)), np.zeros((CHAINS, 100 + DRAWS))
    spec = spec_of("sgld", burnin=100)
    clean = diagnose(spec, trace_of(llc, 100), METRICS)
    llc, squared_distance = llc.copy(), np.full(llc.shape, 0.1)
    llc[:, :100] = squared_distance[:, :100] = 1e9
    divergent[:, :100] = 1
    poisoned = trace_of(llc, 100, squared_distance, is_divergent=divergent)
    poisoned.draws["acceptance_rate"] = np.where(np.arange(llc.shape[1]) < 100, 1e9, poisoned.draws["acceptance_rate"])
    assert diagnose(spec, poisoned, METRICS) == clean


@pytest.mark.parametrize("where", [0, 150])
@pytest.mark.parametrize("field", [field for field in FIELDS if field != "work"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e200])
def test_a_lost_chain_is_left_out(where, field, value):
    llc = iid(shape=(CHAINS, 100 + DRAWS))
    lost, rest = trace_of(llc, 100), trace_of(llc[[0, 1, 3]], 100)
    lost.draws[field] = lost.draws[field].copy()
    lost.draws[field][2, where:] = value
    diagnosis = diagnose(spec_of("sgld", burnin=100), lost, METRICS)
    others = diagnose(spec_of("sgld", burnin=100, chains=3), rest, METRICS)
    pooled = ("llc", "sd", "mcse", "ess_bulk", "ess_tail", "rhat", "nbeta_sensitivity", "acceptance_rate", "divergences")
    assert [getattr(diagnosis, name) for name in pooled] == [getattr(others, name) for name in pooled]
    assert (diagnosis.chains_kept, diagnosis.num_chains) == (3, 4)
    assert diagnosis.llc_per_chain == (*others.llc_per_chain[:2], None, others.llc_per_chain[2])
    assert verdicts(diagnosis) == ["nan chains"]


def divergent_steps():
    return spec_of(), trace_of(iid(), is_divergent=np.arange(DRAWS) % 50 == 0)


def loss_below():
    return spec_of(), trace_of(np.where(np.arange(DRAWS) % 7 == 0, -3.0, iid(llc=8.0)))


def loss_below_under_noise():
    stretch = np.where(np.arange(DRAWS) % 250 < 50, -6.0, 12.0)
    return spec_of("sgld"), trace_of(stretch + 3.0 * np.random.default_rng(0).standard_normal((CHAINS, DRAWS)))


def ramp(first, last):
    return spec_of(draws=4000), trace_of(np.linspace(first, last, 4000) * iid(shape=(CHAINS, 4000), llc=5.0) / 5)


def over_localised():
    llc, squared_distance = gaussian(np.full(DIM, 0.01), 10.0, (CHAINS, DRAWS))
    return spec_of(localization=10.0), trace_of(llc, 0, squared_distance)


def full_losses(llc, shift, every=10):
    """All-data losses at every tenth draw: those of the minibatches, shifted and less their noise."""
    noise = 0.5 * np.random.default_rng(1).standard_normal(llc.shape)
    return np.where(np.arange(llc.shape[1]) % every == every - 1, llc + shift + noise, np.nan) / NBETA


def losses_disagree():
    llc = iid()
    return spec_of("sgld"), trace_of(llc, full_difference=full_losses(llc, 0.6))


def heavy_tailed():
    """Importance ratios of shape k = 1: a quarter of the posterior's precision too high."""
    weights = np.random.default_rng(0).exponential(size=(CHAINS, DRAWS))
    return spec_of("vi"), trace_of(iid(), log_weight=weights)


def one_chain_apart():
    return spec_of(), trace_of(iid() + np.array([[0], [0], [0], [0.8]]))


CASES = {
    "diverged": lambda: (spec_of("sgld"), trace_of(np.full((CHAINS, DRAWS), np.nan))),
    "nan chains": lambda: (spec_of("sgld"), trace_of(np.where(np.arange(CHAINS)[:, None] == 1, np.nan, iid()))),
    "divergent steps": divergent_steps,
    "negative llc": lambda: (spec_of(), trace_of(iid() - 11.0)),
    "llc above d/2": lambda: (spec_of("sgld"), trace_of(iid(llc=15.0))),
    "loss below w*": loss_below,
    "poor approximation": heavy_tailed,
    "losses disagree": losses_disagree,
    "temperature jumped": lambda: (spec_of("smc"), trace_of(iid(), is_divergent=1.0, log_normalizer=-iid())),
    "noisy gradients": lambda: (spec_of("sghmc", friction=0.1), trace_of(iid(), noise_excess=np.full((CHAINS, DRAWS), 0.3))),
    "steps too long": lambda: (spec_of("sghmc"), trace_of(iid(), acceptance_rate=0.7)),
    "rising trace": lambda: ramp(4.6, 5.4),
    "falling trace": lambda: ramp(5.4, 4.6),
    "over-localised": over_localised,
    "chains disagree": one_chain_apart,
    "too few draws": lambda: (spec_of(draws=10), trace_of(iid(shape=(CHAINS, 10)))),
    "low acceptance": lambda: (spec_of(), trace_of(iid(), acceptance_rate=0.2)),
}
#: What else is wrong with a trace.
BESIDES = {"negative llc": ["loss below w*"]}


@pytest.mark.parametrize("verdict", CASES)
def test_each_verdict(verdict):
    diagnosis = diagnose(*CASES[verdict](), METRICS)
    assert (diagnosis.verdict, diagnosis.remedy) == (verdict, diagnosis.findings[0].remedy)
    assert verdicts(diagnosis) == [verdict, *BESIDES.get(verdict, [])]


def test_the_worst_verdict_comes_first():
    llc = iid() - 11.0
    llc[1, 5:] = np.nan
    diagnosis = diagnose(spec_of(), trace_of(llc, acceptance_rate=0.1), METRICS)
    assert verdicts(diagnosis) == ["nan chains", "negative llc", "loss below w*", "low acceptance"]


def test_stretches_below_star_show_through_minibatch_noise():
    assert "loss below w*" in verdicts(diagnose(*loss_below_under_noise(), METRICS))


def test_minibatch_noise_alone_is_not_below_star():
    noisy = trace_of(5.0 + 20.0 * np.random.default_rng(0).standard_normal((CHAINS, DRAWS)))
    assert verdicts(diagnose(spec_of("sgld"), noisy, METRICS)) == []
    assert verdicts(diagnose(spec_of("hmc"), noisy, METRICS)) == ["loss below w*"]  # which has no noise to excuse it


def test_flat_directions_are_not_localisation():
    """Five directions of 2000 matter: localisation holds 99.8 % of them and the llc is right, as for a deep linear network."""
    curvatures = np.where(np.arange(2000) < 5, 10.0, 0.0)
    llc, squared_distance = gaussian(curvatures, 1.0, (CHAINS, 300))
    assert np.mean(squared_distance) / 2000 > 0.99
    diagnosis = diagnose(spec_of(draws=300), trace_of(llc, 0, squared_distance), METRICS | {"num_params": 2000})
    assert diagnosis.verdict == "ok"
    assert diagnosis.nbeta_sensitivity == pytest.approx(0, abs=4 * diagnosis.nbeta_sensitivity_mcse)


def test_a_chain_on_its_way_is_not_localised():
    """It hardly varies, which looks localised, but it is far nearer to w* than localisation would have it."""
    llc = np.linspace(1, 3, DRAWS) + 0.1 * ar1(0.5, (CHAINS, DRAWS))
    diagnosis = diagnose(spec_of(), trace_of(llc, squared_distance=0.01), METRICS)
    assert diagnosis.nbeta_sensitivity > 0.5
    assert diagnosis.verdict == "rising trace"
    assert "over-localised" not in verdicts(diagnosis)


def test_chains_that_stand_still():
    """ArviZ takes them for independent draws."""
    still = diagnose(spec_of("sgld"), trace_of(np.zeros((CHAINS, DRAWS))), METRICS)
    assert (still.llc, still.ess_bulk, still.rhat, still.mcse) == (0.0, None, None, None)
    assert verdicts(still) == ["too few draws"]
    llc = iid()
    llc[0] = 5.0
    one = diagnose(spec_of(), trace_of(llc), METRICS)
    assert one.chains[0].ess_bulk is None
    assert "chains disagree" in verdicts(one)
    apart = diagnose(spec_of(), trace_of(np.broadcast_to(np.arange(1.0, 5.0)[:, None], (CHAINS, DRAWS))), METRICS)
    assert (apart.rhat, apart.verdict) == (None, "too few draws")


@pytest.mark.parametrize("shape", [(1, 4), (1, DRAWS), (2, 4), (8, 5)])
def test_short_and_single_chains(shape):
    chains, draws = shape
    diagnosis = diagnose(spec_of(chains=chains, draws=draws), trace_of(iid(shape=shape)), METRICS)
    assert diagnosis.llc is not None
    assert (diagnosis.rhat is None) == (chains == 1)
    assert diagnosis.verdict == ("ok" if draws == DRAWS else "too few draws")


@pytest.mark.parametrize("verdict", ["diverged", "nan chains", "too few draws", "negative llc"])
def test_json_round_trip(verdict):
    diagnosis = diagnose(*CASES[verdict](), METRICS | {"init_loss": float("nan")})
    text = json.dumps(diagnosis.to_dict(), allow_nan=False)
    assert diagnosis.init_loss is None
    assert Diagnosis.model_validate_json(text) == diagnosis


def test_without_exact_value():
    metrics = {name: value for name, value in METRICS.items() if name != "true_llc"}
    diagnosis = diagnose(spec_of(), trace_of(iid()), metrics)
    assert (diagnosis.true_llc, diagnosis.true_llc_text, diagnosis.relative_error) == (None, None, None)


def test_a_target_without_a_finite_loss():
    spec = spec_of("sgld", target={"family": "mlp"})
    diagnosis = diagnose(spec, trace_of(np.full((CHAINS, DRAWS), np.nan)), METRICS | {"init_loss": None})
    assert (diagnosis.verdict, "training.learning_rate" in diagnosis.remedy) == ("diverged", True)


@pytest.mark.parametrize("sampler", get_args(get_args(AnySamplerSpec)[0]))
@pytest.mark.parametrize("target", get_args(get_args(AnyTargetSpec)[0]))
def test_remedies_name_fields_that_exist(sampler, target):
    kind, family = sampler.model_fields["kind"].default, target.model_fields["family"].default
    needed = {"custom": {"path": "package.module:function"}, "trial": {"num_steps": 100}}.get(family, {})
    chosen = {"kind": kind, "num_draws": DRAWS} | ({"batch_size": 100} if "batch_size" in sampler.model_fields else {})
    spec = RunSpec.from_dict({"target": {"family": family, **needed}, "sampler": chosen})
    cases = [case for verdict, case in CASES.items() if verdict != "poor approximation" or kind == "vi"]
    texts = [finding.remedy for case in cases for finding in diagnose(spec, case()[1], METRICS).findings]
    assert texts
    for part, field in re.findall(r"\b(sampler|posterior|training|target)\.(\w+)", " ".join(texts)):
        owner = spec.target.training if part == "training" else getattr(spec, part)
        assert field in type(owner).model_fields, f"{part}.{field}"


def with_noise(excess):
    """Some llc of 5, which minibatch noise raises by `excess`, by the trials of each draw."""
    return trace_of(iid(), noise_excess=excess + 0.1 * np.random.default_rng(1).standard_normal((CHAINS, DRAWS)))


def test_noise_that_does_not_matter():
    assert verdicts(diagnose(spec_of("sgld"), with_noise(0.2), METRICS)) == []
    assert verdicts(diagnose(spec_of("sgld"), with_noise(0.3), METRICS)) == ["noisy gradients"]
    assert verdicts(diagnose(spec_of("sgnht"), with_noise(3.0), METRICS)) == []  # its thermostat takes it back


@pytest.mark.parametrize(
    ("fields", "ways"),
    [
        ({"batch_size": 100, "gradient": "plain"}, ["batch_size", "gradient", "step_size"]),
        ({"batch_size": 100}, ["batch_size", "step_size"]),
        ({"batch_size": 1000}, ["step_size"]),
    ],
)
@pytest.mark.parametrize("step_size", [1e-4, "auto"])
def test_remedies_of_noise_are_what_is_left_to_do(fields, ways, step_size):
    found = diagnose(spec_of("sghmc", step_size=step_size, **fields), with_noise(1.0), METRICS)
    assert re.findall(r"sampler\.(\w+)", found.remedy) == ways
    assert ("the one found" in found.remedy) == (step_size == "auto")


@pytest.mark.parametrize(
    ("kind", "fields", "rate", "verdict"),
    [
        ("sgld", {}, 0.81, "ok"),
        ("sgld", {}, 0.79, "steps too long"),
        ("sgld", {"integrator": "euler"}, 0.89, "steps too long"),
        ("sgld", {"integrator": "euler"}, 0.91, "ok"),
        ("sgld", {"preconditioner": "rmsprop"}, 0.81, "ok"),
        ("sgld", {"preconditioner": "adam"}, 0.89, "steps too long"),
        ("sghmc", {}, 0.81, "ok"),
        ("sgnht", {}, 0.3, "steps too long"),
        ("mala", {}, 0.45, "ok"),
    ],
)
def test_acceptance_of_trials_has_limits_of_its_own(kind, fields, rate, verdict):
    burnin = 100 if "preconditioner" in fields else 0
    trace = trace_of(iid(shape=(CHAINS, burnin + DRAWS)), burnin, acceptance_rate=rate)
    assert verdicts(diagnose(spec_of(kind, burnin=burnin, **fields), trace, METRICS)) == [verdict] * (verdict != "ok")


def test_remedy_of_long_steps():
    given, auto = (
        diagnose(spec_of("sghmc", step_size=step_size), trace_of(iid(), acceptance_rate=0.5), METRICS).remedy
        for step_size in (1e-4, "auto")
    )
    assert "lower sampler.step_size" in given
    assert "num_burnin_steps" not in given
    assert "raise sampler.num_burnin_steps" in auto


def test_a_jump_of_the_temperature_leaves_no_free_energy():
    spec, log_z = spec_of("smc"), np.full((CHAINS, DRAWS), -10.0)
    assert diagnose(spec, trace_of(iid(), log_normalizer=log_z), METRICS).free_energy is not None
    one = np.where(np.arange(CHAINS)[:, None] == 1, 1.0, 0.0)
    jumped = diagnose(spec, trace_of(iid(), is_divergent=one, log_normalizer=log_z), METRICS)
    assert (jumped.verdict, jumped.free_energy, jumped.free_energy_mcse) == ("temperature jumped", None, None)
    assert "num_particles" in jumped.remedy
    some = diagnose(spec, trace_of(iid(), is_divergent=0.5, log_normalizer=log_z), METRICS)  # half the particles fail
    assert verdicts(some) == ["divergent steps"]


def test_losses_of_batches_and_of_all_data_agree():
    """The full-data llc is of the draws at which it was evaluated; its error is larger, their difference's is not."""
    llc = iid()
    full = full_losses(llc, 0.0)
    diagnosis = diagnose(spec_of("sgld"), trace_of(llc, full_difference=full), METRICS)
    assert diagnosis.verdict == "ok"
    assert diagnosis.full_llc == pytest.approx(NBETA * np.nanmean(full))
    assert diagnosis.full_llc_mcse == pytest.approx(diagnosis.mcse * 10**0.5, rel=0.2)
    # A sampler on all the data has nothing to compare.
    far = trace_of(llc, full_difference=full_losses(llc, 3.0))
    assert "losses disagree" not in verdicts(diagnose(spec_of("hmc"), far, METRICS))


def observed_run(**changes):
    """Losses of 40 training and 20 test samples; those of the latter move twice as far."""
    spec, rng = spec_of("sgld"), np.random.default_rng(0)
    llc = iid()
    own = 0.1 * rng.standard_normal((CHAINS, DRAWS, 60)) + (llc[:, :, None] / NBETA) * np.repeat([1.0, 2.0], [40, 20])
    return spec, trace_of(llc, observed=own.astype(np.float32), observables={"train": 40, "test": 20}, **changes), llc


def test_llc_by_dataset_and_susceptibilities():
    llc = iid()
    spec, trace, llc = observed_run(full_difference=llc / NBETA)
    diagnosis = diagnose(spec, trace, METRICS)
    assert list(diagnosis.llc_by_dataset) == ["train", "test"]
    train, test = diagnosis.llc_by_dataset.values()
    assert (train.num_samples, test.num_samples, train.susceptibility) == (40, 20, None)
    assert (train.llc, test.llc) == (
        pytest.approx(llc.mean(), abs=4 * train.mcse), pytest.approx(2 * llc.mean(), abs=4 * test.mcse)
    )  # fmt: skip
    assert train.sample_error == pytest.approx(
        NBETA * np.std(np.mean(trace.draws["observed"], axis=(0, 1))[:40], ddof=1) / 40**0.5
    )
    # L_test = 2 phi and independent noise.
    assert test.susceptibility == pytest.approx(-5.0 / NBETA**2, abs=4 * test.susceptibility_mcse)
    # Nothing beyond the samples' own noise: nbeta/2 (0.1^2 + Var[llc] / nbeta^2).
    fluctuation = NBETA / 2 * (0.01 + 5.0 / NBETA**2)
    assert diagnosis.singular_fluctuation == pytest.approx(fluctuation, abs=4 * diagnosis.singular_fluctuation_mcse)


@pytest.mark.parametrize("kind", ["sgld", "hmc"])
def test_susceptibilities_are_to_the_loss_on_all_the_data(kind):
    """Ten training samples of 60 are followed: their own variance is no part of chi, which is exact for a linear model."""
    observed, exact, _ = regression()
    of_all, of_part, of_test = np.full(60, 1 / 60), np.repeat([0.1, 0], [10, 50]), np.repeat([0, 0.05, 0], [10, 20, 30])
    phi = observed @ of_all
    fields = {"observed": observed[:, :, :30], "observables": {"train": 10, "test": 20}}
    if kind == "sgld":  # its own losses are of minibatches, averaged over steps
        evaluated = np.arange(phi.shape[1]) % 5 == 4
        trace = trace_of(NBETA * phi.mean() + iid(shape=phi.shape), full_difference=np.where(evaluated, phi, np.nan), **fields)
    else:
        trace = trace_of(NBETA * phi, **fields)
    found = diagnose(spec_of(kind, draws=phi.shape[1]), trace, METRICS).llc_by_dataset["test"]
    chi = -of_all @ exact @ (of_test - of_all)
    assert found.susceptibility == pytest.approx(chi, abs=4 * found.susceptibility_mcse)
    # What the ten samples in place of all would give.
    assert abs(-of_part @ exact @ (of_test - of_part) - chi) > 8 * found.susceptibility_mcse


def test_no_susceptibilities_without_the_loss_of_the_draw_on_all_the_data():
    _, trace, _ = observed_run()
    for spec in (spec_of("sgld"), spec_of("hmc", num_steps_bw_draws=2), spec_of("smc")):
        by_dataset = diagnose(spec, trace, METRICS).llc_by_dataset
        assert [found.susceptibility for found in by_dataset.values()] == [None, None]
    assert diagnose(spec_of("hmc"), trace, METRICS).llc_by_dataset["test"].susceptibility is not None


def test_without_training_data_among_the_observables():
    spec, trace, _ = observed_run()
    renamed = Trace(trace.draws, 0, trace.seconds, {"odd": 40, "even": 20})
    assert diagnose(spec, renamed, METRICS).singular_fluctuation is None


def test_nothing_recorded_gives_nothing():
    diagnosis = diagnose(spec_of(), trace_of(iid()), METRICS)
    assert diagnosis.llc_by_dataset == diagnosis.metrics == {}
    names = ("full_llc", "wbic", "free_energy", "singular_fluctuation", "pareto_k")
    assert [getattr(diagnosis, name) for name in names] == [None] * 5


def test_wbic_and_free_energy():
    spec = RunSpec.from_dict({"target": {"family": "quadratic"}, "sampler": {"kind": "hmc"}})
    llc = iid() * NBETA / spec.nbeta  # trace_of divides by NBETA
    log_z = np.broadcast_to(np.array([[-10.0], [-10.2], [-9.8], [-10.0]]), llc.shape)
    diagnosis = diagnose(spec, trace_of(llc, log_normalizer=log_z), METRICS)
    assert diagnosis.wbic == pytest.approx(500 + diagnosis.llc * np.log(1000))
    assert diagnosis.wbic_mcse == pytest.approx(diagnosis.mcse * np.log(1000))
    assert diagnosis.free_energy == pytest.approx(spec.nbeta * 0.5 + 10.0, abs=0.02)
    assert diagnosis.free_energy_mcse == pytest.approx(np.std([0, 0.2, -0.2, 0], ddof=1) / 2)


def test_other_numbers_of_the_target_are_kept():
    metrics = METRICS | {
        "test_accuracy": 0.96,
        "noise_loss": np.float64(0.5).item(),
        "made_with": {"jax": "1"},
        "checkpoints": [],
    }
    assert diagnose(spec_of(), trace_of(iid()), metrics).metrics == {"test_accuracy": 0.96, "noise_loss": 0.5}


def test_particles_have_no_sensitivity():
    """A draw is their mean, whose variance is not the loss's; it would look localised."""
    llc = iid(shape=(CHAINS, DRAWS, 32)).mean(axis=2)
    diagnosis = diagnose(spec_of("smc"), trace_of(llc, squared_distance=15.0), METRICS)
    assert (diagnosis.nbeta_sensitivity, diagnosis.verdict) == (None, "ok")
