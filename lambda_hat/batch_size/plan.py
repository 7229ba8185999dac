"""From settings and overrides to the trials of a batch-size study, and to the runs that sample what they train."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from lambda_hat.batch_size.artifacts import find_target
from lambda_hat.llc.plan import check_own, make_plan, study_options
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.overrides import Assignment, parse_sweep
from lambda_hat.specs.settings import Preset, Settings, StudyExperiment, explain, lookup, nearest
from lambda_hat.specs.spec import InvalidInput, Precision
from lambda_hat.store.store import Store
from lambda_hat.targets.families import TargetSpec
from lambda_hat.targets.trials.spec import TrialSpec
from lambda_hat.targets.trials.task import AnyTask

DEFAULT = "default"

#: Before the id of a network that a study trained, where a target is named.
PREFIX = "batch-size:"

#: A study of more trials is a typing error.
MAX_TRIALS = 100_000

#: Below this richness float32 does not hold what training changes: predictions are differences of numbers ~ 1/richness.
FLOAT64_BELOW = 5e-3

Key = tuple[str, ...]
Sweep = dict[Key, Assignment]

_OPTIONS = ("plots", "keep", "curvature", "target_loss")
_SAMPLING = ("sampler", "posterior")
_LENGTHS = {("num_steps",), ("num_epochs",)}
_TASKS = {cls.model_fields["kind"].default: cls for cls in get_args(get_args(AnyTask)[0])}
_FIELDS = {name for name in TrialSpec.model_fields if name not in ("family", "task", "checkpoint")}


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
    user = parse_sweep(overrides)
    sweeps = [parse_sweep(texts) for texts in base.sweeps]
    options = study_options(base, user, _OPTIONS, _plots)
    user = {path: assignment for path, assignment in user.items() if assignment.key not in _OPTIONS}
    trials: dict[str, TrialSpec] = {}
    sampling: dict[Key, Assignment] = {}
    for sweep in sweeps:
        merged = _over(sweep, user)
        own = {path: assignment for path, assignment in merged.items() if path[0] in _SAMPLING}
        if own != sampling and sweep is not sweeps[0]:
            raise InvalidInput(
                "Every trial of a study is sampled in the same way; its sweeps set different ones: "
                f"{_texts(sampling)} and {_texts(own)}. Set the same in each, or make two studies."
            )
        sampling = own
        for trial in _trials(settings, {path: merged[path] for path in merged if path[0] not in _SAMPLING}):
            trials.setdefault(trial.target_id, trial)
            if len(trials) > MAX_TRIALS:
                _refuse_size(len(trials))
    if sampling and ("sampler",) not in sampling:
        raise InvalidInput(
            f"{next(iter(sampling.values())).key} is of sampling, which a study does with sampler=NAME; got none."
        )
    plan = StudyPlan(name, list(trials.values()), options, [assignment.text for assignment in sampling.values()])
    plan.runs(
        settings, list({trial.task: trial for trial in plan.trials}.values())
    )  # wrong ones are refused before any training
    return plan


def check_studies(settings: Settings) -> None:
    """Validates every study and every preset of a task. Raises InvalidInput: the first that is not valid."""
    for name in settings.presets.task:
        _task(settings, name)
    for name in settings.studies:
        make_study(settings, name)


def describe(settings: Settings) -> str:
    """Studies and tasks that can be chosen by name, one line each."""
    tables = {
        "Studies": {name: study.description for name, study in settings.studies.items()},
        "Presets: task=": {name: preset.description for name, preset in settings.presets.task.items()},
        "Fields of a trial": {name: TrialSpec.model_fields[name].description or "" for name in sorted(_FIELDS)},
    }
    width = max(len(name) for table in tables.values() for name in table)
    return "\n\n".join(
        "\n".join([title, *(f"  {name:{width}}  {text}".rstrip() for name, text in table.items())])
        for title, table in tables.items()
    )


def _texts(sweep: Sweep) -> str:
    return ", ".join(assignment.text for assignment in sweep.values()) or "none"


def _plots() -> list[str]:
    from lambda_hat.batch_size.plots import PLOTS

    return list(PLOTS)


def _over(sweep: Sweep, user: Sweep) -> Sweep:
    """The sweep's assignments that no override replaces, and the overrides."""
    replaced = {path for path in sweep if any(path[: len(new)] == new or {path, new} == _LENGTHS for new in user)}
    return {path: assignment for path, assignment in sweep.items() if path not in replaced} | user


def _trials(settings: Settings, sweep: Sweep) -> Iterator[TrialSpec]:
    task_names = [str(name) for name in sweep[("task",)].values] if ("task",) in sweep else []
    if not task_names:
        raise InvalidInput(f"A study needs a task; got none. Choose with task=NAME. {nearest('', settings.presets.task)}")
    tasks = {name: _task(settings, name) for name in task_names}
    for path, assignment in sweep.items():
        known = path == ("task",) or (len(path) == 1 and path[0] in _FIELDS)
        if not known and not any(path[0] == "task" and len(path) == 2 and path[1] in fields for _, fields in tasks.values()):
            names = {f"task.{name}" for _, fields in tasks.values() for name in fields}
            remedy = nearest(assignment.key, _FIELDS | names | {*_OPTIONS, *_SAMPLING, "task"})
            if assignment.key in _OPTIONS:  # of a sweep in the settings
                remedy = "Set it once for the whole study, beside its sweeps."
            raise InvalidInput(
                f"Override {assignment.text!r}: a key must be a field of a trial, of its task or of the study; "
                f"got {assignment.key!r}. {remedy}"
            )
    own = {path: assignment for path, assignment in sweep.items() if len(path) == 1 and path != ("task",)}
    for base, fields in tasks.values():
        inside = {path: assignment for path, assignment in sweep.items() if path[0] == "task" and path[-1] in fields}
        chosen = [*inside.items(), *own.items()]
        size = math.prod(len(assignment.values) for _, assignment in chosen)
        if size > MAX_TRIALS:
            _refuse_size(size)
        for values in itertools.product(*(assignment.values for _, assignment in chosen)):
            trial: dict[str, Any] = {"task": dict(base)}
            for (path, _), value in zip(chosen, values, strict=True):
                (trial["task"] if len(path) == 2 else trial)[path[-1]] = value
            trial.setdefault("precision", _precision(settings, trial.get("richness")))
            try:
                yield TrialSpec.from_dict(trial)
            except ValidationError as error:
                raise explain(error, TrialSpec, lambda _: "Override it, or correct the study.", "trial") from None


def _task(settings: Settings, name: str) -> tuple[dict[str, Any], set[str]]:
    """The preset's fields, and the names of all that its kind has."""
    fields = dict(lookup(settings.presets.task, "task preset", name).fields)
    if fields.get("kind") not in _TASKS:
        raise InvalidInput(f"[presets.task.{name}] must name its kind; got {fields.get('kind')!r}. {nearest('', _TASKS)}")
    cls = _TASKS[fields["kind"]]
    try:
        cls.from_dict(fields)
    except ValidationError as error:
        raise explain(error, cls, lambda _: "Correct the preset in the settings.", f"presets.task.{name}") from None
    except TypeError as error:
        raise InvalidInput(f"[presets.task.{name}] must hold numbers, text, true and false; {error}. Correct it.") from None
    return fields, set(cls.model_fields) - {"kind"}


def _precision(settings: Settings, richness: Any) -> Precision:
    return "float64" if isinstance(richness, int | float) and richness < FLOAT64_BELOW else settings.runtime.precision


def _refuse_size(count: int) -> None:
    raise InvalidInput(f"A study has at most {MAX_TRIALS} trials; this asks for {count} or more. Sweep fewer values.")
