"""From settings and overrides to the trials of a batch-size study, and to the runs that sample what they train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lambda_hat.batch_size.artifacts import find_target
from lambda_hat.llc.plan import SAMPLING, check_own, make_plan, sampling
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.grid import DEFAULT, TAGS, Grid, Limit, Section, check_components, study_plan, validated
from lambda_hat.specs.overrides import Sweep, parse_sweep, without
from lambda_hat.specs.settings import Preset, Settings, StudyExperiment, lookup, nearest
from lambda_hat.specs.spec import InvalidInput, Precision
from lambda_hat.specs.text import described, listing
from lambda_hat.store.store import Store
from lambda_hat.targets.families import TargetSpec
from lambda_hat.targets.trials.spec import TrialSpec

#: Before the id of a network that a study trained, where a target is named.
PREFIX = "batch-size:"

#: A study of more trials is a typing error.
MAX_TRIALS = 100_000

#: Below this richness float32 does not hold what training changes: predictions are differences of numbers ~ 1/richness.
FLOAT64_BELOW = 5e-3

TRIAL = Section("", {"": TrialSpec}, components=("task",), closed=("checkpoint",))

_OPTIONS = ("plots", "keep", "curvature", "target_loss")


class StudyPlan(NamedTuple):
    """name: of the experiment. trials: each once. options: the experiment's, changed by overrides. sampling: overrides of the
    sweep over the trained networks, none for no sampling.
    """

    name: str
    trials: list[TrialSpec]
    options: StudyExperiment
    sampling: list[str]

    @property
    def keeps(self) -> bool:
        """Whether trained networks are kept as targets."""
        return self.options.keep or self.options.curvature or bool(self.sampling)

    def runs(self, settings: Settings, trials: Sequence[TrialSpec]) -> list[RunSpec]:
        """The runs that sample these trials' networks."""
        if not self.sampling:
            return []
        named = {f"{PREFIX}{trial.target_id}": trial for trial in trials}
        alone = _with_targets(settings, named).model_copy(update={"experiments": {}})
        return make_plan(alone, None, [f"target={','.join(named)}", *self.sampling]) if named else []


def with_stored(settings: Settings, store: Store, overrides: Sequence[str]) -> Settings:
    """Settings in which networks that are in the store have names: those that `target=` names batch-size:ID, or ID alone.

    ID is a target's or a trial's, tgt_..., or its beginning.

    Raises:
      InvalidInput: it is of nothing in the store, or of several things.
    """
    names = (str(value) for a in parse_sweep(overrides).values() if a.path == ("target",) for value in a.values)
    stored = {name: find_target(store, name.removeprefix(PREFIX)) for name in names if name.startswith((PREFIX, "tgt_"))}
    for spec in stored.values():
        check_own(settings, spec)
    return _with_targets(settings, stored) if stored else settings


def _with_targets(settings: Settings, targets: Mapping[str, TargetSpec]) -> Settings:
    """Settings in which these targets have names."""
    presets = {name: Preset(**spec.model_dump(mode="json", exclude={"checkpoint"})) for name, spec in targets.items()}
    changed = settings.presets.model_copy(update={"target": settings.presets.target | presets})
    return settings.model_copy(update={"presets": changed})


def make_study(settings: Settings, experiment: str | None = None, overrides: Sequence[str] = ()) -> StudyPlan:
    """The trials of a study (the one named "default" if None) changed by overrides.

    Keys: `task=a,b` chooses presets, `task.n_data=` sets a field of those that have it; `eta=`, `batch_size=`, `richness=`,
    `width=` and so on are the fields of `TrialSpec`. `plots=[...]`, `keep=true`, `curvature=true` and `target_loss=` are the
    study's own. With `sampler=` every trained network is sampled too, `sampler.*` and `posterior.*` as in sweeps.

    Rules: a sweep is the product of its values, a study the union of its sweeps; an override replaces the same key of every
    sweep, `task=` what is set inside it, and `num_epochs=` and `num_steps=` each other. Where no precision is given it is the
    settings', and float64 for a richness below FLOAT64_BELOW.

    Raises:
      InvalidInput: an unknown name or key, a key given twice, a value a trial refuses, or too many trials.
    """
    name = experiment or DEFAULT
    base = lookup(settings.studies, "study", name)
    options, sweeps, user = study_plan(base, overrides, _OPTIONS, _plots)
    limit = Limit(MAX_TRIALS, "A study", "trials")
    grid = Grid(
        settings.presets, (TRIAL,), limit, without(user, SAMPLING), names={}, once=_OPTIONS, others=SAMPLING,
        fields_of="a trial, of its task or of the study",
    )  # fmt: skip
    trials: dict[str, TrialSpec] = {}
    ways: list[list[str]] = []
    for sweep in sweeps:
        ways.append(sampling(sweep | user))
        if ways[-1] != ways[0]:
            raise InvalidInput(
                "Every trial of a study is sampled in the same way; its sweeps set different ones: "
                f"{' and '.join(', '.join(way) or 'none' for way in (ways[0], ways[-1]))}. "
                "Set the same in each, or make two studies."
            )
        if ("task",) not in sweep | user:
            raise InvalidInput(f"A study needs a task; got none. Choose with task=NAME. {nearest('', settings.presets.task)}")
        own = without(sweep, SAMPLING)
        for trial in _trials(settings, grid, own):
            trials.setdefault(trial.target_id, trial)
            limit.check(len(trials))
        grid.check_applied([own, grid.user])
    plan = StudyPlan(name, list(trials.values()), options, ways[0])
    # Wrong ones are refused before any training.
    plan.runs(settings, list({trial.task: trial for trial in plan.trials}.values()))
    return plan


def check_studies(settings: Settings) -> None:
    """Validates every study and every preset of a task. Raises InvalidInput: the first that is not valid."""
    check_components(settings.presets, TRIAL)
    for name in settings.studies:
        make_study(settings, name)


def describe(settings: Settings) -> str:
    """Studies and tasks that can be chosen by name, one line each."""
    fields = {name: TrialSpec.model_fields[name] for name in sorted(TrialSpec.model_fields)}
    return listing({
        "Studies": described(settings.studies),
        "Presets: task=": described(settings.presets.task),
        "Fields of a trial": described({name: fields[name] for name in fields if name not in (*TAGS, "task", *TRIAL.closed)}),
    })  # fmt: skip


def _plots() -> list[str]:
    from lambda_hat.batch_size.plots import PLOTS

    return list(PLOTS)


def _trials(settings: Settings, grid: Grid, sweep: Sweep) -> Iterator[TrialSpec]:
    for fields in grid.tables(TRIAL, DEFAULT, sweep):
        yield validated(TrialSpec, {"precision": _precision(settings, fields.get("richness"))} | fields, "trial")


def _precision(settings: Settings, richness: Any) -> Precision:
    return "float64" if isinstance(richness, int | float) and richness < FLOAT64_BELOW else settings.runtime.precision
