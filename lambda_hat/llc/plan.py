"""From settings and overrides to the runs they ask for."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError

from lambda_hat.llc.run import RunSpec
from lambda_hat.samplers.kinds import AnySamplerSpec
from lambda_hat.samplers.posterior import PosteriorSpec
from lambda_hat.specs.overrides import Assignment, Value, parse_sweep
from lambda_hat.specs.settings import EntropyExperiment, Preset, Settings, StudyExperiment, explain, lookup, models_in, nearest
from lambda_hat.specs.spec import InvalidInput, Spec
from lambda_hat.targets.custom import CustomSpec
from lambda_hat.targets.families import AnyTargetSpec, TargetSpec

#: A plan of more runs is a typing error.
MAX_RUNS = 100_000

DEFAULT = "default"

#: target.checkpoint=all is every checkpoint.
ALL = "all"

#: Parts of a target that have presets of their own.
COMPONENTS = ("model", "data", "training")

#: The field that says which class a table of fields is of, and the classes by its value.
TAGS = {"target": "family", "sampler": "kind"}
CLASSES: dict[str, dict[str, type[Spec]]] = {
    section: {cls.model_fields[TAGS[section]].default: cls for cls in get_args(get_args(union)[0])}
    for section, union in (("target", AnyTargetSpec), ("sampler", AnySamplerSpec))
}

AnyExperiment = TypeVar("AnyExperiment", StudyExperiment, EntropyExperiment)

KeyPath = tuple[str, ...]
Sweep = dict[KeyPath, Assignment]

#: The keys that choose the presets of a run.
CHOICES = {("target",), ("sampler",), ("posterior",)}


def make_plan(settings: Settings, experiment: str | None = None, overrides: Sequence[str] = ()) -> list[RunSpec]:
    """The runs of an experiment (the one named "default" if None) changed by overrides; each once, targets outermost.

    Keys: `target=a,b`, `sampler=`, `posterior=`, `model=`, `data=`, `training=` choose presets. `model.depth=`,
    `data.n_data=`, `training.`, `posterior.` set fields of these parts; `target.seed=` the target's own, of which
    `target.checkpoint=all` is every checkpoint of the training; `sampler.num_chains=` the sampler's. `target.NAME.seed=` and
    `sampler.NAME.step_size=` hold for the preset of that name only; if no preset of that name is selected, for every preset of
    that family or kind.

    Rules:
      - A sweep is the Cartesian product of its values; an experiment is the union of its sweeps.
      - A key applies to the selected presets that have the field and multiplies only these; one that fits nowhere is refused.
      - An override replaces the same key of the experiment, and what the experiment sets inside it (`model=` replaces
        `model.depth=`). It wins over the experiment whichever is more specific; among overrides the more specific key wins.
      - `target=` and `sampler=` choose what the experiment is run on. A target runs in the sweeps that name it (or name no
        target), one that none names with its presets alone. A sampler runs in those of its target's sweeps that name it (or
        name no sampler), or else in all of these. What the experiment sets for what is no longer there is dropped.
      - Without `posterior=` the posterior preset "default" is used if there is one. settings.runtime.precision is the
        precision of targets that state none. A field set nowhere keeps the family's or kind's default.

    Raises:
      InvalidInput: an unknown name or key, a key given twice, a value the spec refuses, or too many runs.
    """
    name = experiment or DEFAULT
    if experiment is None and name not in settings.experiments:
        sweeps: list[Sweep] = [{}]
    else:
        sweeps = [parse_sweep(texts) for texts in lookup(settings.experiments, "experiment", name).sweeps]
    user = parse_sweep(overrides)
    targets, samplers = (_chosen(section, [user]) or _chosen(section, sweeps) for section in TAGS)
    for section, names in (("target", targets), ("sampler", samplers)):
        if not names:
            raise InvalidInput(
                f"A plan needs targets and samplers; got no {section}. Choose with {section}=NAME; --list has them."
            )
    plan = _Plan(settings, user, {"target": targets, "sampler": samplers})
    runs: dict[str, RunSpec] = {}
    for target in targets:
        homes: list[Sweep] = _open_to("target", target, sweeps) or [{}]
        for sampler in _chosen("sampler", [user]) or _chosen("sampler", homes) or samplers:
            for sweep in _open_to("sampler", sampler, homes) or homes:
                runs |= {run.run_id: run for run in plan.runs(target, sampler, sweep) if run.run_id not in runs}
                _check_size(len(runs))
    # Where the user chooses, the experiment's keys may be about what is no longer there.
    plan.check_all_applied([user] if CHOICES & user.keys() else [user, *sweeps])
    order: dict[str, int] = {}
    for run in runs.values():
        order.setdefault(run.target_id, len(order))
    return sorted(runs.values(), key=lambda run: order[run.target_id])


def make_targets(settings: Settings, overrides: Sequence[str]) -> list[TargetSpec]:
    """The targets that overrides choose with `target=` and change, as `make_plan` has them.

    Raises:
      InvalidInput: as there, or an override is about something else.
    """
    sweep = parse_sweep(overrides)
    names = _chosen("target", [sweep])
    if not names:
        raise InvalidInput("A plan needs targets; got none. Choose with target=NAME; --list has them.")
    plan = _Plan(settings, sweep, {"target": names})
    found = [cast(TargetSpec, spec) for name in names for spec in plan.specs("target", name, {})]
    plan.check_all_applied([sweep])
    return found


def study_options(
    base: AnyExperiment, user: Sweep, names: Collection[str], plots: Callable[[], Collection[str]]
) -> AnyExperiment:
    """The options of a study, those of `names`, changed by overrides.

    Args:
      plots: gives the names of plots there are; called where some are chosen.

    Raises:
      InvalidInput: a value is wrong, or a plot is not known.
    """
    fields = base.model_dump()
    for name in names:
        if assignment := user.get((name,)):
            values = assignment.values
            if name == "plots" and None in values:
                raise InvalidInput(
                    f"plots= is a list of names; got {assignment.text!r}. plots=[] draws none; leave it out for all that apply."
                )
            fields[name] = values if len(values) > 1 or (name == "plots" and isinstance(values[0], str)) else values[0]
    try:
        options = type(base).model_validate(fields)
    except ValidationError as error:
        raise explain(error, type(base), lambda _: "Correct the override or the study in the settings.", "study") from None
    if options.plots:
        known = dict.fromkeys(plots())
        for plot in options.plots:
            lookup(known, "plot", plot)
    return options


def check_own(settings: Settings, spec: TargetSpec) -> None:
    """Refuses a custom target read from a store unless a preset of these settings names its function: whoever wrote the store
    would else decide what is imported here.

    Raises:
      InvalidInput: it is one.
    """
    own = {preset.fields.get("path") for preset in settings.presets.target.values()}
    if isinstance(spec, CustomSpec) and spec.path not in own:
        raise InvalidInput(
            f"The function of a custom target is imported where your own settings name it; got {spec.path!r} from the store. "
            "If you trust it, add a [presets.target.NAME] with family = 'custom' and this path."
        )


def spec_from_json(text: str) -> RunSpec:
    """The run whose spec is this JSON, as the store holds it.

    Raises:
      InvalidInput: no JSON, an unknown or missing field, or a value the spec refuses.
    """
    try:
        return RunSpec.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise explain(error, RunSpec, lambda _: "Correct the spec.", "run") from None


def check_presets(settings: Settings) -> None:
    """Validates every preset and every experiment.

    Raises:
      InvalidInput: the first that is not valid.
    """
    plan = _Plan(settings, {}, {})
    for section in ("target", "sampler", "posterior"):
        for name in getattr(settings.presets, section):
            list(plan.specs(section, name, {}))
    for component in COMPONENTS:
        for name, preset in getattr(settings.presets, component).items():
            # One family that takes it is enough; of several errors, the shortest is of the family it comes nearest to.
            fits = [_spec_or_error(cls, preset.fields, f"presets.{component}.{name}") for cls in _component_classes(component)]
            errors = [fit for fit in fits if isinstance(fit, InvalidInput)]
            if len(errors) == len(fits):
                raise min(errors, key=lambda error: len(str(error)))
    for name in settings.experiments:
        make_plan(settings, name)


def describe(settings: Settings) -> str:
    """What can be chosen by name, one line each: experiments, presets, target families and sampler kinds."""
    tables: dict[str, dict[str, str]] = {
        "Experiments": {name: experiment.description for name, experiment in settings.experiments.items()}
    }
    for section in ("target", "sampler", "posterior", *COMPONENTS):
        presets: dict[str, Preset] = getattr(settings.presets, section)
        tables[f"Presets: {section}="] = {name: preset.description for name, preset in presets.items()}
    for section, title in (("target", "Target families"), ("sampler", "Sampler kinds")):
        tables[title] = {name: (cls.__doc__ or "").split("\n")[0] for name, cls in CLASSES[section].items()}
    width = max(len(name) for table in tables.values() for name in table)
    lines = []
    for title, table in tables.items():
        lines += [title, *(f"  {name:{width}}  {text}".rstrip() for name, text in table.items()), ""]
    return "\n".join(lines[:-1])


class _Plan:
    """The runs of one preset each of target and sampler at a time, remembering which assignments applied anywhere.

    names: the selected presets of each section.
    """

    def __init__(self, settings: Settings, user: Sweep, names: dict[str, list[str]]) -> None:
        self.settings, self.user, self.names = settings, user, names
        self.applied: set[Assignment] = set()

    def runs(self, target: str, sampler: str, sweep: Sweep) -> Iterator[RunSpec]:
        posteriors = _chosen("posterior", [self.user]) or _chosen("posterior", [sweep]) or [DEFAULT]
        parts = (
            list(self.specs("target", target, sweep)),
            [spec for name in posteriors for spec in self.specs("posterior", name, sweep)],
            list(self.specs("sampler", sampler, sweep)),
        )
        _check_size(math.prod(map(len, parts)))
        remedy = f"Set one by an override, or correct [presets.target.{target}] or [presets.sampler.{sampler}]."
        for specs in itertools.product(*parts):
            try:
                yield RunSpec.model_validate(dict(zip(("target", "posterior", "sampler"), specs, strict=True)))
            except ValidationError as error:
                raise explain(error, RunSpec, lambda _: remedy, "run") from None

    def specs(self, section: str, name: str, sweep: Sweep) -> Iterator[Spec]:
        """The variants of one preset: the product of the assignments that apply to it."""
        base = self._fields(section, name)
        cls = _class(section, base, f"[presets.{section}.{name}]")
        tag = str(base.get(TAGS.get(section, ""), ""))
        values: dict[KeyPath, tuple[Value, ...]] = {}
        replaced = section == "posterior" and (section,) in self.user
        for layer in [self.user] if replaced else [sweep, self.user]:
            names = _chosen(section, [layer]) or self.names.get(section, [])
            own: dict[KeyPath, tuple[Value, ...]] = {}
            # The more specific of two keys for one field is the longer.
            for assignment in sorted(layer.values(), key=lambda assignment: len(assignment.path)):
                path = _locate(assignment.path, section, name, tag, names)
                if path in _paths(cls):
                    own[path] = assignment.values
                    self.applied.add(assignment)
            values = {path: swept for path, swept in values.items() if not any(path[: len(new)] == new for new in own)} | own
        _check_size(math.prod(map(len, values.values())))
        # A component's preset first, then the fields changed in it.
        paths = sorted(values, key=len)
        for combination in itertools.product(*(values[path] for path in paths)):
            fields = copy.deepcopy(base)
            for path, value in zip(paths, combination, strict=True):
                if section == "target" and len(path) == 1 and path[0] in COMPONENTS:
                    fields[path[0]] = self._component(path[0], value)
                else:
                    _set(fields, path, value)
            every_checkpoint = section == "target" and fields.get("checkpoint") == ALL
            if every_checkpoint:
                del fields["checkpoint"]
            spec = _spec_or_error(cls, _with_defaults(cls, fields), f"{section}.{name}")
            if isinstance(spec, InvalidInput):
                raise spec
            yield from _checkpoints(cast(TargetSpec, spec), name) if every_checkpoint else [spec]

    def check_all_applied(self, sweeps: Iterable[Sweep]) -> None:
        """Refuses assignments that are about nothing in the plan."""
        for assignment in itertools.chain.from_iterable(sweep.values() for sweep in sweeps):
            if assignment not in self.applied and assignment.path not in CHOICES:
                remedy = nearest(assignment.key, self._keys())
                if assignment.path[-1] in TAGS.values():
                    remedy = "The preset decides it: choose one with target=NAME or sampler=NAME."
                raise InvalidInput(
                    f"Override {assignment.text!r}: a key must be a field of a selected target, sampler or posterior; "
                    f"got {assignment.key!r}. {remedy}"
                )

    def _keys(self) -> set[str]:
        """Every key that would apply."""
        keys = {".".join(choice) for choice in CHOICES} | {f"posterior.{'.'.join(path)}" for path in _paths(PosteriorSpec)}
        for section, names in self.names.items():
            for name in names:
                for path in _paths(_class(section, self._fields(section, name), name)):
                    key = ".".join(path)
                    keys |= {f"{section}.{name}.{key}", key if path[0] in COMPONENTS else f"{section}.{key}"}
        return keys

    def _fields(self, section: str, name: str) -> dict[str, Any]:
        """A copy of the preset's fields with its components' presets filled in."""
        presets: dict[str, Preset] = getattr(self.settings.presets, section)
        if section == "posterior" and name == DEFAULT and name not in presets:
            return {}
        fields = copy.deepcopy(lookup(presets, f"{section} preset", name).fields)
        if section == "target":
            fields.setdefault("precision", self.settings.runtime.precision)
            fields |= {part: self._component(part, fields[part]) for part in COMPONENTS if part in fields}
        return fields

    def _component(self, component: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        return copy.deepcopy(lookup(getattr(self.settings.presets, component), f"{component} preset", value).fields)


def _chosen(section: str, sweeps: Iterable[Sweep]) -> list[Any]:
    """The presets of the section which the sweeps name, each once."""
    values = (sweep[(section,)].values for sweep in sweeps if (section,) in sweep)
    return list(dict.fromkeys(itertools.chain.from_iterable(values)))


def _open_to(section: str, name: Any, sweeps: Iterable[Sweep]) -> list[Sweep]:
    """The sweeps that name this preset, or none of the section."""
    return [sweep for sweep in sweeps if (section,) not in sweep or name in sweep[(section,)].values]


def _locate(path: KeyPath, section: str, name: str, tag: str, names: Sequence[str]) -> KeyPath:
    """Where a key points in the spec of the preset `name` of family or kind `tag`; to no field if it is not its own."""
    head, rest = path[0], path[1:]
    if section == "target" and head in COMPONENTS:
        return path
    if head != section:
        return ()
    if len(rest) > 1 and (rest[0] == name or (rest[0] == tag and tag not in names)):
        return rest[1:]
    return rest


@functools.cache
def _paths(cls: type[BaseModel]) -> frozenset[KeyPath]:
    """The paths of all fields that overrides may set, nested ones included."""
    paths: set[KeyPath] = set()
    for name, field in cls.model_fields.items():
        if name not in TAGS.values():
            paths |= {(name,)} | {(name, *path) for nested in models_in(field.annotation) for path in _paths(nested)}
    return frozenset(paths)


def _set(fields: dict[str, Any], path: KeyPath, value: Value) -> None:
    for part in path[:-1]:
        if not isinstance(fields.get(part), dict):
            fields[part] = {}
        fields = fields[part]
    fields[path[-1]] = value


def _with_defaults(cls: type[BaseModel], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, with what a component leaves out taken from the family's default rather than from the component's class."""
    defaults = {name: field.default for name, field in cls.model_fields.items() if isinstance(field.default, Spec)}
    return _merge({name: default.model_dump(mode="json") for name, default in defaults.items()}, fields)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    nested = {
        name: _merge(under[name], over[name])
        for name in under.keys() & over.keys()
        if isinstance(under[name], dict) and isinstance(over[name], dict)
        if over[name].get("kind", under[name].get("kind")) == under[name].get("kind")  # another kind has other fields
    }
    return under | over | nested


def _class(section: str, fields: Mapping[str, Any], where: str) -> type[Spec]:
    if section == "posterior":
        return PosteriorSpec
    tag = TAGS[section]
    if tag not in fields:
        raise InvalidInput(f"{where} must name its {tag}. {nearest('', CLASSES[section])}")
    return lookup(CLASSES[section], tag, fields[tag])


def _component_classes(component: str) -> list[type[Spec]]:
    """The classes of this component in the target families."""
    fields = (cls.model_fields.get(component) for cls in CLASSES["target"].values())
    return list(dict.fromkeys(cast(type[Spec], model) for field in fields if field for model in models_in(field.annotation)))


def _checkpoints(spec: TargetSpec, name: str) -> list[TargetSpec]:
    """The target at each checkpoint of its training."""
    if not spec.checkpoint_steps:
        raise InvalidInput(
            f"target.checkpoint={ALL} needs a target that saves checkpoints while it is trained; {name!r} saves none. "
            "Set training.num_checkpoints, or choose another target."
        )
    return [spec.model_copy(update={"checkpoint": step}) for step in spec.checkpoint_steps]


def _spec_or_error(cls: type[Spec], fields: dict[str, Any], where: str) -> Spec | InvalidInput:
    remedy = "Set it by an override, or correct the preset in the settings."
    try:
        return cls.from_dict(fields)
    except ValidationError as error:
        return explain(error, cls, lambda _: remedy, where)
    except TypeError as error:
        return InvalidInput(f"{where} must hold numbers, text, true, false and lists; got another type: {error}. {remedy}")


def _check_size(count: int) -> None:
    if count > MAX_RUNS:
        raise InvalidInput(f"A plan has at most {MAX_RUNS} runs; this asks for {count} or more. Sweep fewer values.")
