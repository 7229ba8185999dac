"""From settings and overrides to the trials of a study, and to the networks that sweeps find in a store."""

import json
import sys
from datetime import date
from pathlib import Path

import pytest

from lambda_hat.batch_size import artifacts, plan
from lambda_hat.batch_size.plan import PREFIX, check_studies, describe, make_study, with_stored
from lambda_hat.llc.plan import check_own, make_plan
from lambda_hat.specs.settings import Settings, load_settings
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.store.manifest import target_address, trials_address
from lambda_hat.store.store import Store
from lambda_hat.targets.analytic import QuadraticSpec
from lambda_hat.targets.custom import CustomSpec
from lambda_hat.targets.trials.spec import TrialSpec

COMMITTED = Path(__file__).parents[2] / "settings.toml"

PRESETS = {
    "task": {
        "digits": {"kind": "images", "n_data": 1280},
        "few": {"description": "only some", "kind": "images", "n_data": 100, "n_test": 50},
        "cubic": {"kind": "polynomial", "n_data": 200},
    },
    "sampler": {
        "hmc": {"kind": "hmc", "num_draws": 50},
        "sgld": {"kind": "sgld", "batch_size": 64},
    },
    "target": {"bowl": {"family": "quadratic"}},
}
STUDIES = {
    "default": {"description": "the usual", "sweeps": [["task=digits", "batch_size=16,64", "eta=0.5,1", "num_steps=30"]]},
    "union": {
        "sweeps": [
            ["task=few", "task.n_test=40", "eta=1", "num_epochs=2", "batch_size=10"],
            ["task=few,cubic", "eta=1,2", "num_steps=7", "width=8"],
            ["task=few", "task.n_test=40", "eta=1,4", "num_epochs=2", "batch_size=10"],
        ]
    },
    "sampled": {"sweeps": [["task=few", "num_steps=5", "sampler=sgld", "sampler.num_draws=20", "posterior.localization=3"]]},
    "kept": {"sweeps": [["task=few", "num_steps=5"]], "keep": True, "plots": ["heatmap_batch"]},
}
SETTINGS = Settings(presets=PRESETS, studies=STUDIES)


def trials(*overrides, study=None, settings=SETTINGS):
    return make_study(settings, study, overrides).trials


def test_a_sweep_is_the_product_of_its_values():
    found = trials()
    assert [(trial.batch_size, trial.eta) for trial in found] == [(16, 0.5), (16, 1.0), (64, 0.5), (64, 1.0)]
    assert {(trial.task.n_data, trial.num_steps, trial.width) for trial in found} == {(1280, 30, 64)}
    assert found == trials(study="default")


def test_powers_and_ranges():
    found = trials("eta=2**range(-3,2)", "batch_size=2**range(0,3)", "seed=range(1,3)")
    assert [trial.eta for trial in found if (trial.batch_size, trial.seed) == (2, 1)] == [0.125, 0.25, 0.5, 1.0, 2.0]
    assert {trial.batch_size for trial in found} == {1, 2, 4}
    assert {trial.seed for trial in found} == {1, 2}
    assert len({trial.target_id for trial in found}) == len(found) == 5 * 3 * 2


def test_a_study_is_the_union_of_its_sweeps():
    """The first and the third have one trial in common, which is trained once."""
    found = trials(study="union")
    assert [(trial.task.kind, trial.task.n_test, trial.eta) for trial in found] == [
        ("images", 40, 1.0),
        ("images", 50, 1.0), ("images", 50, 2.0), ("polynomial", 512, 1.0), ("polynomial", 512, 2.0),
        ("images", 40, 4.0),
    ]  # fmt: skip
    assert [trial.total_steps for trial in found] == [20, 7, 7, 7, 7, 20]


def test_overrides_replace_the_same_key_of_every_sweep():
    found = trials("eta=8", study="union")
    assert [(trial.task.kind, trial.eta, trial.width) for trial in found] == [
        ("images", 8.0, 64), ("images", 8.0, 8), ("polynomial", 8.0, 8),
    ]  # fmt: skip
    # A new key is added to every sweep.
    assert {trial.depth for trial in trials("depth=3", study="union")} == {3}


def test_choosing_a_task_replaces_what_is_set_inside_it():
    assert {trial.task.n_test for trial in trials("task=few", study="union")} == {50}
    assert {trial.task.n_test for trial in trials("task=few", "task.n_test=7", study="union")} == {7}
    # A field of one kind multiplies the trials of that kind alone.
    found = trials("task=few,cubic", "task.degree=2,4", "batch_size=8", "eta=1")
    assert [(trial.task.kind, getattr(trial.task, "degree", None)) for trial in found] == [
        ("images", None), ("polynomial", 2), ("polynomial", 4),
    ]  # fmt: skip


def test_the_two_ways_to_say_how_long_replace_each_other():
    (found,) = {(trial.num_steps, trial.num_epochs) for trial in trials("num_epochs=3")}
    assert found == (None, 3)
    assert [trial.total_steps for trial in trials("num_epochs=3")] == [240, 240, 60, 60]
    assert {(trial.num_steps, trial.num_epochs) for trial in trials("num_steps=4", study="union")} == {(4, None)}


def test_precision():
    """Of small richness predictions are differences of large numbers, which float32 does not hold."""
    found = {trial.richness: trial.precision for trial in trials("richness=0.001,0.005,1")}
    assert found == {0.001: "float64", 0.005: "float32", 1.0: "float32"}
    assert {trial.precision for trial in trials("richness=0.001", "precision=float32")} == {"float32"}
    exact = SETTINGS.model_copy(update={"runtime": SETTINGS.runtime.model_copy(update={"precision": "float64"})})
    assert {trial.precision for trial in trials(settings=exact)} == {"float64"}


def test_options_of_a_study():
    assert make_study(SETTINGS).options.model_dump(include={"plots", "keep", "curvature", "target_loss"}) == {
        "plots": None, "keep": False, "curvature": False, "target_loss": None,
    }  # fmt: skip
    assert make_study(SETTINGS, None, ["target_loss=1e-2"]).options.target_loss == 0.01
    kept = make_study(SETTINGS, "kept")
    assert (kept.options.keep, kept.options.plots, kept.keeps) == (True, ("heatmap_batch",), True)
    for text, plots in (
        ("plots=llc", ("llc",)), ("plots=[llc,sharpness]", ("llc", "sharpness")), ("plots=llc,sharpness", ("llc", "sharpness")),
        ("plots=[]", ()),
    ):  # fmt: skip
        changed = make_study(SETTINGS, "kept", [text, "keep=false"])
        assert (changed.options.plots, changed.options.keep, changed.keeps) == (plots, False, False)
    assert make_study(SETTINGS, None, ["curvature=true"]).keeps
    assert make_study(SETTINGS, None, ["sampler=hmc"]).keeps
    # They are no part of a trial.
    assert changed.trials == kept.trials


def test_runs_sample_the_trials():
    study = make_study(SETTINGS, "sampled")
    assert study.sampling == ["sampler=sgld", "sampler.num_draws=20", "posterior.localization=3"]
    (run,) = study.runs(SETTINGS, study.trials)
    assert (run.target, run.target_id) == (study.trials[0], study.trials[0].target_id)
    assert (run.sampler.kind, run.sampler.num_draws, run.sampler.batch_size) == ("sgld", 20, 64)
    assert run.posterior.localization == 3
    assert study.runs(SETTINGS, []) == []
    # A chosen sampler replaces what is set inside the study's.
    study = make_study(SETTINGS, "sampled", ["sampler=hmc", "sampler.seed=1,2", "eta=0.001,1"])
    runs = study.runs(SETTINGS, study.trials)
    assert [(run.target.eta, run.sampler.kind, run.sampler.num_draws, run.sampler.seed) for run in runs] == [
        (0.001, "hmc", 50, 1), (0.001, "hmc", 50, 2), (1.0, "hmc", 50, 1), (1.0, "hmc", 50, 2),
    ]  # fmt: skip
    assert make_study(SETTINGS, None, []).runs(SETTINGS, trials()) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["etta=1"], ["'etta=1'", "field of a trial, of its task or of the study", "Did you mean 'eta'?"]),
        (["task.n_dat=5"], ["got 'task.n_dat'", "Did you mean 'task.n_data'?"]),
        (["task.degree=2"], ["got 'task.degree'"]),
        (["task=cubic", "task.degre=2"], ["Did you mean 'task.degree'?"]),
        (["task.kind=cubic"], ["The preset decides it: choose another with task=NAME."]),
        (["task.kind=polynomial"], ["got 'task.kind'"]),
        (["task.n_data.x=5"], ["got 'task.n_data.x'"]),
        (["keep.x=true"], ["got 'keep.x'", "Did you mean 'keep'?"]),
        (["family=mlp"], ["got 'family'"]),
        (["checkpoint=5"], ["got 'checkpoint'"]),
        (["task=digit"], ["task preset must be a known name; got 'digit'. Did you mean 'digits'?"]),
        (["task=3"], ["task preset", "got 3"]),
        (["plots=[heatmap]"], ["plot must be a known name; got 'heatmap'", "Did you mean"]),
        (["plots=none"], ["plots= is a list of names; got 'plots=none'. plots=[] draws none; leave it out for all"]),
        (["plots=3"], ["study.plots", "got 3"]),
        (["target_loss=0"], ["study.target_loss must be greater than 0; got 0"]),
        (["target_loss=0.1,0.2"], ["study.target_loss must be a valid number; got (0.1, 0.2)"]),
        (["target_loss=1e999"], ["study.target_loss must be a finite number"]),
        (["keep=true,false"], ["study.keep must be a valid boolean; got (True, False)"]),
        (["sampler=sgdl"], ["sampler preset must be a known name; got 'sgdl'. Did you mean 'sgld'?"]),
        (["sampler=hmc", "sampler.num_drawz=1"], ["Did you mean 'sampler.num_draws'?"]),
        (["sampler.num_draws=5"], ["sampler.num_draws is of sampling, which a study does with sampler=NAME; got none."]),
        (["posterior.nbeta=5"], ["posterior.nbeta is of sampling"]),
        # The second task has too few samples for the sampler's minibatches, the first has not.
        (["sampler=sgld", "sampler.batch_size=150", "task=digits,few"], ["at most data.n_data, 100; got 150"]),
        (["batch_size=1e2"], ["trial.batch_size must be a valid integer; got 100.0."]),
        (["batch_size=1281"], ["batch_size must be at most task.n_data, 1280; got 1281"]),
        (["eta=-1"], ["trial.eta must be greater than 0; got -1."]),
        (["eta=1e999"], ["trial.eta must be a finite number"]),
        (["richness=true"], ["trial.richness must be a valid number; got True."]),
        (["eta=big"], ["trial.eta must be a valid number; got 'big'."]),
        (["task.n_data=2000"], ["trial.task: n_data and n_test must be at most 1797 together"]),
        (["num_steps=1", "num_epochs=1"], ["either num_steps or num_epochs; got num_steps=1 and num_epochs=1"]),
        (["task=cubic", "loss=cross_entropy"], ["loss=cross_entropy is of classes"]),
        (["eta=1", "eta=2"], ["sets a key once"]),
        (["seed=range(0,9999)", "eta=2**range(0,100)"], ["at most 100000 trials; this asks for 1999800 or more"]),
        (["eta=2**range(0,0)"], ["is empty"]),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_malformed_overrides(overrides, words):
    with pytest.raises(InvalidInput) as error:
        make_study(SETTINGS, None, overrides)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ({"sweeps": [["num_steps=1"]]}, ["A study needs a task; got none. Choose with task=NAME."]),
        ({"sweeps": [["task=few", "num_steps=1", "keep=true"]]}, ["'keep=true'", "beside its sweeps"]),
        ({"sweeps": [["task=few", "num_steps=1"]], "plots": ["map"]}, ["plot must be a known name; got 'map'"]),
        ({"sweeps": [["task=few"]]}, ["either num_steps or num_epochs"]),
        (
            {"sweeps": [["task=few", "num_steps=1", "sampler=hmc"], ["task=few", "num_steps=2"]]},
            ["sampled in the same way; its sweeps set different ones: sampler=hmc and none."],
        ),
        ({"sweeps": [["task=few", "num_steps=1", "depth=1"]]}, ["trial.depth must be greater than or equal to 2; got 1."]),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[0],
)
def test_malformed_studies(study, words):
    settings = Settings(presets=PRESETS, studies={"bad": study})
    for check in (lambda: make_study(settings, "bad"), lambda: check_studies(settings)):
        with pytest.raises(InvalidInput) as error:
            check()
        assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ({}, ["[presets.task.x] must name its kind; got None.", "Known: images, polynomial, teacher."]),
        ({"kind": ["images"]}, ["must name its kind; got ['images']"]),
        ({"kind": "image"}, ["must name its kind; got 'image'"]),
        ({"kind": "images", "n_dat": 1}, ["presets.task.x.n_dat is no field that exists. Did you mean 'n_data'?"]),
        ({"kind": "images", "n_data": 1}, ["presets.task.x.n_data must be greater than or equal to 2; got 1."]),
        ({"kind": "images", "n_data": date(2024, 1, 1)}, ["presets.task.x must hold numbers, text"]),
    ],
)
def test_malformed_tasks(preset, words):
    with pytest.raises(InvalidInput) as error:
        check_studies(Settings(presets={"task": {"x": preset}}))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_study():
    with pytest.raises(InvalidInput, match=r"The study must be a known name; got 'defualt'\. Did you mean 'default'\?"):
        make_study(SETTINGS, "defualt")


def test_a_union_of_too_many_trials(monkeypatch):
    monkeypatch.setattr(plan, "MAX_TRIALS", 5)
    with pytest.raises(InvalidInput, match="at most 5 trials; this asks for 6 or more"):
        make_study(SETTINGS, "union")


def test_an_id_stays():
    """What was trained before is found again. It changes with ALGORITHM_VERSION and where TrialSpec or a task gets a field or
    another default: then trials in stores are trained anew, which the changelog must say."""
    trial = TrialSpec.from_dict({"task": {"kind": "images"}, "num_steps": 30, "eta": 0.5, "batch_size": 16})
    assert trial.target_id == "tgt_60f2b80c291caea8"
    assert trials("task.n_data=1024", "batch_size=16", "eta=0.5") == [trial]
    # How a number is written is no part of it.
    assert trials("task.n_data=1024", "batch_size=16", "eta=2**-1", "richness=1.0")[0].target_id == trial.target_id


def test_committed_settings():
    settings = load_settings(COMMITTED)
    check_studies(settings)
    assert len(make_study(settings).trials) == 3 * 13 * 3 * 2
    text = describe(settings)
    for table in (settings.studies, settings.presets.task):
        for name, entry in table.items():
            assert entry.description
            assert any(line.split() == [name, *entry.description.split()] for line in text.splitlines())
    assert all(f"  {name} " in text for name in ("batch_size", "eta", "num_epochs", "richness"))
    assert "family" not in text


# --- Networks in a store, by id ----------------------------------------------------------------------------------------

BOWL = QuadraticSpec(dim=2)
KEPT, LOST = trials("eta=0.5", "batch_size=16"), trials("eta=1", "batch_size=16")


@pytest.fixture
def store(tmp_path):
    """A target, a trial that was kept as one, and a trial that was not; as their manifests say, without any training."""
    store = Store(str(tmp_path / "store"))
    for spec in (BOWL, *KEPT):
        store.publish(target_address(spec.target_id), {}, spec=spec.model_dump(mode="json", exclude={"checkpoint"}), summary={})
    rows = [
        {"trial_id": trial.target_id, "spec": trial.model_dump(mode="json", exclude={"checkpoint"})} for trial in KEPT + LOST
    ]
    store.publish(
        trials_address(artifacts.trials_id(KEPT + LOST)), {"results.json": json.dumps(rows).encode()},
        spec={"trial_ids": [row["trial_id"] for row in rows]}, summary={},
    )  # fmt: skip
    return store


def ids(settings, store, *overrides):
    """Of the targets that a sweep runs on."""
    return [run.target_id for run in make_plan(with_stored(settings, store, overrides), None, [*overrides, "sampler=hmc"])]


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("spec", [BOWL, *KEPT, *LOST], ids=["target", "kept", "not kept"])
def test_a_stored_target_is_named_by_its_id(store, prefix, spec):
    assert ids(SETTINGS, store, f"target={prefix}{spec.target_id}") == [spec.target_id]
    assert ids(SETTINGS, store, f"target={prefix}{spec.target_id[:10]}") == [spec.target_id]
    (run,) = make_plan(
        with_stored(SETTINGS, store, [f"target={prefix}{spec.target_id}"]), None,
        [f"target={prefix}{spec.target_id}", "sampler=hmc"],
    )  # fmt: skip
    assert run.target == spec


def test_stored_targets_beside_presets(store):
    found = ids(SETTINGS, store, f"target=bowl,{PREFIX}{KEPT[0].target_id},{LOST[0].target_id}")
    assert found[1:] == [KEPT[0].target_id, LOST[0].target_id]
    assert found[0] == QuadraticSpec(precision="float32").target_id
    # Its fields are overridden like those of a preset.
    name = f"{PREFIX}{KEPT[0].target_id}"
    assert ids(SETTINGS, store, f"target={name}", "target.eta=1") == [LOST[0].target_id]
    assert with_stored(SETTINGS, store, ["target=bowl"]) is SETTINGS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tgt_0000000000000000", ["must fit one target in", "'tgt_0000000000000000' fits none"]),
        (f"{PREFIX}tgt_", ["'tgt_' fits tgt_", BOWL.target_id, KEPT[0].target_id, LOST[0].target_id]),
        ("tgt_zz", ["'tgt_zz' fits none", "lambda-hat study latest"]),
        (f"{PREFIX}run_0123", ["named by its id, tgt_...", "got 'run_0123'"]),
        (f"{PREFIX}", ["got ''"]),
        (f"{PREFIX}../../etc", ["got '../../etc'"]),
    ],
)
def test_a_name_that_fits_no_target(store, name, words):
    with pytest.raises(InvalidInput) as error:
        with_stored(SETTINGS, store, [f"target={name}"])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_an_empty_store_has_no_targets(tmp_path):
    with pytest.raises(InvalidInput, match="fits none"):
        with_stored(SETTINGS, Store(str(tmp_path / "nothing")), ["target=tgt_12"])


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_stored_function_is_not_imported_unless_the_settings_name_it(store, tmp_path, monkeypatch, prefix):
    """Whoever can write the store must not decide what runs here."""
    (tmp_path / "from_the_store.py").write_text("raise RuntimeError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    spec = CustomSpec(path="from_the_store:target")
    store.publish(target_address(spec.target_id), {}, spec=spec.model_dump(mode="json", exclude={"checkpoint"}), summary={})
    with pytest.raises(InvalidInput, match=r"where your own settings name it; got 'from_the_store:target' from the store"):
        with_stored(SETTINGS, store, [f"target={prefix}{spec.target_id}"])
    with pytest.raises(InvalidInput, match=r"add a \[presets\.target\.NAME\]"):
        check_own(SETTINGS, spec)
    named = PRESETS | {"target": {"mine": {"family": "custom", "path": "from_the_store:target", "version": "2"}}}
    settings = Settings(presets=named)
    check_own(settings, spec)
    assert ids(settings, store, f"target={prefix}{spec.target_id}") == [spec.target_id]
    assert "from_the_store" not in sys.modules
