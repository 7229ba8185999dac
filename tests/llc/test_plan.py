"""From settings and overrides to runs: products, applicability, precedence, refusals."""

import json
from datetime import date
from pathlib import Path

import pytest

from lambda_hat.llc.plan import check_presets, describe, make_plan, spec_from_json
from lambda_hat.specs.settings import Settings, load_settings
from lambda_hat.specs.spec import InvalidInput

PRESETS = {
    "model": {"small": {"depth": 1, "width": 4}, "large": {"description": "big", "depth": 3, "width": 64}},
    "data": {"few": {"n_data": 300}},
    "posterior": {"strong": {"localization": 100.0}},
    "target": {
        "mlp": {"family": "mlp", "model": "small", "data": {"n_data": 500, "teacher": {"width": 2}}},
        "digits": {"family": "digits"},
        "dln": {"family": "dln", "rank": 1},
        "dln-10": {"family": "dln", "widths": [10, 10, 10], "precision": "float64"},
    },
    "sampler": {
        "sgld": {"kind": "sgld", "step_size": 2e-5, "batch_size": 256},
        "adam": {"kind": "sgld", "preconditioner": "adam", "step_size": 1e-5, "batch_size": 256},
        "hmc": {"kind": "hmc", "step_size": 1e-2},
    },
}
EXPERIMENTS = {
    "default": {
        "description": "the usual",
        "sweeps": [
            ["target=mlp,digits", "sampler=sgld,hmc", "training.num_steps=10"],
            ["target=dln", "sampler=sgld,hmc", "sampler.sgld.step_size=1e-6"],
        ],
    },
    "any": {"sweeps": [["sampler=hmc"], ["sampler=sgld", "sampler.step_size=1e-3,1e-4"]]},
    "deep": {"sweeps": [["target=mlp", "sampler=hmc", "model.depth=5", "posterior=strong", "posterior.nbeta=3"]]},
    "typo": {"sweeps": [["target=mlp", "sampler=hmc", "sampler.batchsize=5"]]},
}
SETTINGS = Settings(presets=PRESETS, experiments=EXPERIMENTS, runtime={"precision": "float32"})
ONE = ("target=mlp", "sampler=hmc")


def names(runs):
    """(target, sampler) of each run."""
    return [(run.target.family, run.sampler.kind) for run in runs]


def test_default_experiment_targets_outer():
    runs = make_plan(SETTINGS)
    assert names(runs) == [(t, s) for t in ("mlp", "digits", "dln") for s in ("sgld", "hmc")]
    assert [run.sampler.step_size for run in runs if run.sampler.kind == "sgld"] == [2e-5, 2e-5, 1e-6]
    assert runs == make_plan(SETTINGS, "default")


def test_presets_resolve_and_keep_the_family_defaults():
    (run,) = make_plan(SETTINGS, None, ONE)
    assert (run.target.model.depth, run.target.model.width, run.target.data.n_data) == (1, 4, 500)
    # The family's default teacher has depth 1, a model alone 2; the default data of dln have a million samples, of others 1000.
    assert (run.target.data.teacher.depth, run.target.data.teacher.width) == (1, 2)
    (run,) = make_plan(SETTINGS, None, ["target=dln", "sampler=hmc", "data.input_bound=5.0"])
    assert (run.target.data.n_data, run.target.data.input_bound, run.target.rank) == (1_000_000, 5.0, 1)


def test_product_multiplies_only_what_has_the_field():
    runs = make_plan(SETTINGS, None, ["target=mlp,dln", "sampler=sgld,hmc", "model.depth=1,2,3", "sampler.batch_size=8,16"])
    assert names(runs) == [("mlp", "sgld"), ("mlp", "sgld"), ("mlp", "hmc")] * 3 + [("dln", "sgld")] * 2 + [("dln", "hmc")]
    assert len({run.run_id for run in runs}) == len(runs)
    assert [run.target.model.depth for run in runs[:9]] == [1] * 3 + [2] * 3 + [3] * 3


def test_fields_of_every_part():
    overrides = [
        "target.seed=range(1,3)", "data.teacher.width=4", "posterior.localization=2", "posterior.nbeta=none,10",
        "training.batch_size=7", "sampler.num_chains=8", "target.model.width=9",
    ]  # fmt: skip
    runs = make_plan(SETTINGS, None, [*ONE, *overrides])
    assert [(run.target.seed, run.posterior.nbeta) for run in runs] == [(1, None), (1, 10.0), (2, None), (2, 10.0)]
    run = runs[0]
    assert (run.target.data.teacher.width, run.target.training.batch_size, run.target.model.width) == (4, 7, 9)
    assert (run.posterior.localization, run.sampler.num_chains) == (2.0, 8)


def test_component_presets():
    runs = make_plan(SETTINGS, None, [*ONE, "model=small,large", "model.width=5", "data=few", "posterior=strong"])
    assert [(run.target.model.depth, run.target.model.width, run.target.data.n_data) for run in runs] == [
        (1, 5, 300),
        (3, 5, 300),
    ]
    assert {run.posterior.localization for run in runs} == {100.0}


def test_names_narrow_a_key():
    def steps(*overrides):
        runs = make_plan(SETTINGS, None, ["target=mlp", *overrides])
        return [run.sampler.step_size for run in runs]

    assert steps("sampler=sgld,adam", "sampler.sgld.step_size=1e-3") == [1e-3, 1e-5]
    # No selected preset is named sgld, so the key is for all of the kind.
    assert steps("sampler=adam", "sampler.sgld.step_size=1e-3") == [1e-3]
    assert steps("sampler=sgld,hmc", "sampler.hmc.step_size=1e-3", "sampler.step_size=0.5") == [0.5, 1e-3]
    runs = make_plan(SETTINGS, None, ["target=mlp,digits", "sampler=hmc", "target.digits.model.depth=7", "model.depth=2"])
    assert [run.target.model.depth for run in runs] == [2, 7]


def test_user_overrides_win_over_the_experiment():
    # An experiment's key for one preset gives way to the command line's key for all.
    runs = make_plan(SETTINGS, None, ["sampler.step_size=1e-4"])
    assert {run.sampler.step_size for run in runs} == {1e-4}
    (run,) = make_plan(SETTINGS, "deep")
    assert (run.target.model.depth, run.target.model.width, run.posterior.nbeta) == (5, 4, 3.0)
    (run,) = make_plan(SETTINGS, "deep", ["model.depth=6"])
    assert (run.target.model.depth, run.target.model.width) == (6, 4)
    # A chosen preset replaces what the experiment sets inside that part.
    (run,) = make_plan(SETTINGS, "deep", ["model=large"])
    assert run.target.model.depth == 3
    (run,) = make_plan(SETTINGS, "deep", ["posterior=strong"])
    assert (run.posterior.localization, run.posterior.nbeta) == (100.0, None)


def test_choosing_targets_and_samplers_does_not_multiply_sweeps():
    # In the sweep that names the target; in the first if none does.
    (run,) = make_plan(SETTINGS, None, ["target=dln", "sampler=sgld"])
    assert run.sampler.step_size == 1e-6
    (run,) = make_plan(SETTINGS, None, ["target=dln-10", "sampler=sgld"])
    assert run.sampler.step_size == 2e-5
    assert names(make_plan(SETTINGS, None, ["target=dln,mlp"])) == [
        ("dln", "sgld"), ("dln", "hmc"), ("mlp", "sgld"), ("mlp", "hmc"),
    ]  # fmt: skip
    # The experiment's step size is for its own preset sgld, not for the adam chosen instead.
    runs = make_plan(SETTINGS, None, ["sampler=adam"])
    assert names(runs) == [(target, "sgld") for target in ("mlp", "digits", "dln")]
    assert {run.sampler.step_size for run in runs} == {1e-5}
    # Sweeps that name no target take every target.
    runs = make_plan(SETTINGS, "any", ["target=mlp"])
    assert [run.sampler.step_size for run in runs] == [1e-2, 1e-3, 1e-4]
    assert len(make_plan(SETTINGS, "any", ["target=mlp", "sampler=sgld"])) == 2


def test_equal_runs_are_one():
    runs = make_plan(SETTINGS, None, [*ONE, "target.mlp.model.depth=1", "target.mlp.model=small", "model=small,large"])
    assert len(runs) == 1
    twice = Settings(presets=PRESETS, experiments={"default": {"sweeps": [list(ONE), list(ONE)]}})
    assert len(make_plan(twice)) == 1


def test_precision_fills_targets_that_state_none():
    settings = SETTINGS.model_copy(update={"runtime": SETTINGS.runtime.model_copy(update={"precision": "float64"})})
    assert {run.target.precision for run in make_plan(settings)} == {"float64"}
    assert {run.target.precision for run in make_plan(settings, None, ["target.precision=float32"])} == {"float32"}
    assert {run.target.precision for run in make_plan(SETTINGS, None, ["target=dln-10"])} == {"float64"}


def test_without_experiments():
    settings = Settings(presets=PRESETS)
    assert names(make_plan(settings, None, ONE)) == [("mlp", "hmc")]
    with pytest.raises(InvalidInput, match=r"got no target\. Choose with target=NAME"):
        make_plan(settings)


def test_posterior_default_is_a_preset_if_there_is_one():
    presets = PRESETS | {"posterior": {"default": {"localization": 7.0}}}
    assert make_plan(Settings(presets=presets), None, ONE)[0].posterior.localization == 7.0
    assert make_plan(SETTINGS, None, ONE)[0].posterior.localization == 1.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["target=mpl"], ["target preset", "got 'mpl'", "Did you mean 'mlp'?", "--list"]),
        (["sampler=nuts"], ["sampler preset", "got 'nuts'", "Known: adam, hmc, sgld."]),
        (["target=3"], ["target preset", "got 3"]),
        (["model=smal"], ["model preset", "Did you mean 'small'?"]),
        (["model=[1,2]"], ["model preset", "got [1, 2]"]),
        (["posterior=weak"], ["posterior preset", "got 'weak'"]),
        (["sampler.stepsize=1"], ["sampler.stepsize=1", "must be a field", "Did you mean 'sampler.step_size'?"]),
        (["sampler.sgld.stepsize=1"], ["Did you mean 'sampler.sgld.step_size'?"]),
        (["target.rank=1", *ONE], ["target.rank=1", "field of a selected target"]),
        (["sampler.sgld.step_size=1", *ONE], ["sampler.sgld.step_size", "field of a selected target"]),
        (["qqqq=1"], ["Known names begin with data, model, posterior, sampler, target, training."]),
        (["sampler.kind=hmc"], ["The preset decides it", "sampler=NAME"]),
        (["sampler.num_chains=0", *ONE], ["sampler.hmc.num_chains must be greater than or equal to 1; got 0."]),
        (["model.depth=1e3"], ["target.mlp.model.depth must be a valid integer; got 1000.0."]),
        (["posterior.nbeta=1e999"], ["posterior.default.nbeta", "finite number"]),
        (["sampler.num_chains=true"], ["sampler.sgld.num_chains must be a valid integer; got True."]),
        (["sampler.step_size=nan"], ["sampler.sgld.step_size must be a valid number; got 'nan' or must be 'auto'"]),
        (["model.activation=rleu"], ["target.mlp.model.activation must be 'relu', 'leaky_relu'", "got 'rleu'"]),
        (["data.teacher=small"], ["target.mlp.data.teacher must be a table of fields; got 'small'."]),
        (["data=few", "model.depth.x=1"], ["model.depth.x", "Did you mean 'model.depth'?"]),
        (["target.widths=[5]"], ["target.dln.widths must have at least 2 items; got [5]."]),
        (["target.rank=4"], ["target.dln: rank must be at most the smallest width, 3; got rank=4."]),
        (["data.n_data=100"], ["sampler.batch_size must be at most data.n_data, 100; got 256.", "[presets.sampler.sgld]"]),
        (["target.seed=range(0,9999)", "sampler.seed=range(0,9999)"], ["at most 100000 runs"]),
        (["model.depth=1", "model.depth=2"], ["sets a key once"]),
    ],
)
def test_malformed_overrides(overrides, words):
    with pytest.raises(InvalidInput) as error:
        make_plan(SETTINGS, None, overrides)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_malformed_experiments():
    with pytest.raises(InvalidInput, match=r"experiment must be a known name; got 'defualt'\. Did you mean 'default'\?"):
        make_plan(SETTINGS, "defualt")
    with pytest.raises(InvalidInput, match=r"sampler\.batchsize=5.*must be a field of a selected"):
        make_plan(SETTINGS, "typo")
    with pytest.raises(InvalidInput, match=r"sampler\.batchsize=5"):
        check_presets(Settings(presets=PRESETS, experiments={"typo": EXPERIMENTS["typo"]}))


@pytest.mark.parametrize(
    ("presets", "words"),
    [
        ({"target": {"x": {"rank": 1}}}, ["[presets.target.x] must name its family", "Known: custom, digits"]),
        ({"target": {"x": {"family": ["mlp"]}}}, ["[presets.target.x] must name its family; got ['mlp']"]),
        ({"target": {"x": {"family": "mpl"}}}, ["family", "got 'mpl'", "Did you mean 'mlp'?"]),
        ({"target": {"x": {"family": "mlp", "sed": 1}}}, ["target.x.sed is no field that exists. Did you mean 'seed'?"]),
        ({"target": {"x": {"family": "mlp", "model": {"widht": 1}}}}, ["target.x.model.widht", "Did you mean 'width'?"]),
        ({"target": {"x": {"family": "mlp", "model": 3}}}, ["model preset", "got 3"]),
        ({"sampler": {"x": {"kind": "sgld", "step_size": "1e-5"}}}, ["sampler.x.step_size must be a valid number", "'1e-5'"]),
        ({"sampler": {"x": {}}}, ["[presets.sampler.x] must name its kind"]),
        ({"posterior": {"x": {"gamma": 1.0}}}, ["posterior.x.gamma is no field"]),
        ({"model": {"x": {"layers": 1}}}, ["presets.model.x.layers is no field"]),
        ({"data": {"x": {"n_data": 1}}}, ["presets.data.x.n_data must be greater than or equal to 2; got 1."]),
        (
            {"training": {"x": {"start": date(2024, 1, 1)}}},
            ["presets.training.x must hold numbers, text"],
        ),
    ],
)
def test_malformed_presets(presets, words):
    with pytest.raises(InvalidInput) as error:
        check_presets(Settings(presets=presets))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_spec_from_json_inverts_the_store():
    for run in make_plan(SETTINGS):
        again = spec_from_json(json.dumps(run.model_dump(mode="json")))
        assert again == run
        assert again.run_id == run.run_id


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["run must be JSON", "line 1 column 1"]),
        ("[]", ["run must be a table of fields; got []."]),
        ("{}", ["run.target must be given", "run.sampler must be given"]),
        (
            '{"target": {"family": "mpl"}, "sampler": {}}',
            ["'family' one of 'mlp'", "got 'mpl'", "sampler must name its 'kind'"],
        ),
        (
            '{"target": {"family": "mlp", "model": {"widht": 3}}}',
            ["run.target.model.widht is no field", "Did you mean 'width'?"],
        ),
        (
            '{"target": {"family": "mlp"}, "sampler": {"kind": "hmc", "seed": "1"}}',
            ["run.sampler.seed must be a valid integer"],
        ),
        ('{"target": {"family": "mlp"}, "sampler": {"kind": "hmc"}, "postrior": {}}', ["Did you mean 'posterior'?"]),
        (
            '{"target": {"family": "mlp"}, "sampler": {"kind": "sgld", "batch_size": 2000}}',
            ["at most data.n_data, 1000; got 2000"],
        ),
    ],
)
def test_malformed_spec(text, words):
    with pytest.raises(InvalidInput) as error:
        spec_from_json(text)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_committed_settings():
    settings = load_settings(Path(__file__).parents[2] / "settings.toml")
    check_presets(settings)
    runs = make_plan(settings)
    assert names(runs) == [(target, sampler) for target in ("mlp", "digits", "dln") for sampler in ("sgld", "hmc", "mclmc")]
    text = describe(settings)
    presets = settings.presets
    sections = set(type(presets).model_fields) - {"task"}  # of studies, which list it themselves
    described = [settings.experiments, *(getattr(presets, section) for section in sections)]
    for name, entry in ((name, entry) for table in described for name, entry in table.items()):
        assert entry.description
        assert any(line.split() == [name, *entry.description.split()] for line in text.splitlines())


def test_keys_apply_to_the_kind_a_preset_names():
    """The two models of policies have other fields."""
    files = {"kind": "pretrained", "path": "files", "sha256": "0" * 64}
    targets = {
        "small": {"family": "policy"},
        "large": {"family": "policy", "task": {"kind": "few_shot_addition"}, "model": files, "warm_start": {"max_steps": 0}},
    }
    settings = Settings(presets=PRESETS | {"target": targets})
    runs = make_plan(settings, None, ["target=small,large", "sampler=hmc", "model.width=8,16"])
    assert [getattr(run.target.model, "width", None) for run in runs] == [8, 16, None]
    with pytest.raises(InvalidInput, match=r"got 'model\.width'"):
        make_plan(settings, None, ["target=large", "sampler=hmc", "model.width=8"])


def test_a_list_needs_no_brackets():
    def widths(text):
        return [run.target.widths for run in make_plan(SETTINGS, None, ["target=dln", "sampler=hmc", text])]

    assert widths("target.widths=6,3,6") == widths("target.widths=[6,3,6]") == [(6, 3, 6)]
    assert widths("target.widths=[6,3],[3,6]") == [(6, 3), (3, 6)]


def test_a_value_given_twice_counts_once():
    runs = make_plan(
        SETTINGS, None, ["target=mlp,mlp", "sampler=hmc", "posterior=strong,strong", "target.seed=1,1,2", "model=small,small"]
    )
    assert [run.target.seed for run in runs] == [1, 2]


def test_tables_are_values():
    def teachers(*texts):
        runs = make_plan(SETTINGS, None, [*ONE, *texts])
        return [(run.target.data.teacher.depth, run.target.data.teacher.width) for run in runs]

    assert teachers("data.teacher={depth=3, width=1}", "data.teacher.width=5") == [(3, 5)]
    assert teachers("data.teacher={width=1},{depth=2,width=7}") == [(1, 1), (2, 7)]
    # In place of a preset.
    runs = make_plan(SETTINGS, None, [*ONE, "model={depth=3},small"])
    assert [run.target.model.depth for run in runs] == [3, 1]
    with pytest.raises(InvalidInput, match=r"model\.widht is no field that exists\. Did you mean 'width'\?"):
        make_plan(SETTINGS, None, [*ONE, "model={widht=3}"])


def test_keys_that_decide_the_same_thing_replace_each_other():
    def models(*overrides, experiment=None, targets="mlp"):
        runs = make_plan(SETTINGS, experiment, [f"target={targets}", "sampler=hmc", *overrides])
        return [
            (run.target.model.depth, run.target.model.width, run.target.model.widths, run.target.model.target_params)
            for run in runs
        ]

    # The preset's width, and the depth of the experiment.
    assert models("model.depth=5", "model.target_params=20000") == [(5, None, None, 20_000)]
    assert models("model.target_params=1000,5000", targets="digits") == [(None, None, None, 1000), (None, None, None, 5000)]
    assert models("model.widths=[7,5]", experiment="deep") == [(None, None, (7, 5), None)]
    assert models("model={target_params=900}") == [(None, None, None, 900)]
    assert models("model.target_params=none,900") == [(1, 4, None, None), (1, None, None, 900)]
    with pytest.raises(InvalidInput, match="target_params decides the width; got width=3 too"):
        models("model.width=3", "model.target_params=900")
    (run,) = make_plan(SETTINGS, None, [*ONE, "training={checkpoint_steps=[1,2]}", "training.num_checkpoints=2"])
    assert run.target.training.checkpoint_steps == ()


def test_seed_alone_is_the_targets():
    runs = make_plan(SETTINGS, None, [*ONE, "seed=1,2"])
    assert [(run.target.seed, run.sampler.seed) for run in runs] == [(1, 0), (2, 0)]
    with pytest.raises(InvalidInput, match="sets a key once"):
        make_plan(SETTINGS, None, [*ONE, "seed=1", "target.seed=2"])


def test_a_target_that_does_not_fit_is_named():
    with pytest.raises(
        InvalidInput, match=r"target\.digits\.data: .* got 5000 and 297.* leave this target out: target=mlp,dln\."
    ):
        make_plan(SETTINGS, None, ["target=mlp,digits,dln", "sampler=hmc", "data.n_data=5000"])


@pytest.mark.parametrize(
    ("key", "ours"),
    [("draws", "num_draws"), ("warmup", "num_burnin_steps"), ("chains", "num_chains"), ("thin", "num_steps_bw_draws")],
)
def test_names_of_other_programs_lead_to_ours(key, ours):
    for sampler in ("", ".hmc"):
        with pytest.raises(InvalidInput, match=rf"Did you mean 'sampler{sampler}\.{ours}'"):
            make_plan(SETTINGS, None, [*ONE, f"sampler{sampler}.{key}=7"])


@pytest.mark.parametrize(
    ("key", "ours"),
    [("target_id=tgt_1", "target"), ("data.x_dist=mixture", "data.inputs"), ("data.noise_model=hetero", "data.noise"),
     ("model.skip_connections=true", "model.skip"), ("sampler.sgld.precond=adam", "sampler.sgld.preconditioner")],
)  # fmt: skip
def test_names_of_earlier_versions_lead_to_ours(key, ours):
    with pytest.raises(InvalidInput, match=f"Did you mean '{ours}'"):
        make_plan(SETTINGS, None, [*ONE[:1], "sampler=sgld", key])


def test_the_limit_holds_over_presets_of_a_part():
    with pytest.raises(InvalidInput, match="at most 100000 runs; this asks for 120000 or more"):
        make_plan(SETTINGS, None, [*ONE, "model=small,large", "target.seed=range(0,6000)", "model.width=range(1,11)"])


def test_committed_presets_fit_the_default_targets():
    settings = load_settings(Path(__file__).parents[2] / "settings.toml")
    runs = make_plan(settings, None, ["model=small,base", "data=small,base", "sampler=base,fast"])
    assert len(runs) == (2 * 2 + 2 * 2 + 2) * 2
    assert {run.target.num_data for run in runs} == {300, 1000}
    small = make_plan(settings, None, ["model=small", "data=small", "sampler=fast"])
    assert names(small) == [("mlp", "hmc"), ("digits", "hmc"), ("dln", "hmc")]
