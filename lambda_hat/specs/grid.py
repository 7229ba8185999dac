"""One grid for every plan: from presets and sweeps of overrides to the fields of specs. A wing declares its sections."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lambda_hat.specs.overrides import Assignment, KeyPath, Sweep, Value, chosen, left, parse_sweep, plain, without
from lambda_hat.specs.settings import EntropyExperiment, Preset, Presets, StudyExperiment, explain, lookup, models_in, nearest
from lambda_hat.specs.spec import InvalidInput, Spec

AnySpec = TypeVar("AnySpec", bound=Spec)
AnyExperiment = TypeVar("AnyExperiment", StudyExperiment, EntropyExperiment)

#: The experiment that is meant where none is named, and the preset where one need not be.
DEFAULT = "default"

#: The fields that say which class a table of fields is of. Presets set them, keys do not.
TAGS = ("family", "kind")


class Section(NamedTuple):
    """A part of what is planned.

    name: of its presets and the first part of its keys; "" where there are no presets and keys are fields themselves.
    classes: by the value of the field `tag`; one class alone has neither.
    components: fields that have presets of their own; their keys go without the section's name.
    closed: fields that no key sets.
    """

    name: str
    classes: Mapping[str, type[Spec]]
    tag: str = ""
    components: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()


def by_tag(union: Any, tag: str) -> dict[str, type[Spec]]:
    """The members of an annotated union, by the value of their tag."""
    return {cls.model_fields[tag].default: cls for cls in get_args(get_args(union)[0])}


class Limit(NamedTuple):
    """So many `what` of a `whole` are meant; more are a typing error."""

    most: int
    whole: str
    what: str

    def check(self, count: int) -> None:
        if count > self.most:
            raise InvalidInput(
                f"{self.whole} has at most {self.most} {self.what}; this asks for {count} or more. Sweep fewer values."
            )


@dataclass
class Grid:
    """The variants of presets that sweeps and overrides ask for; it remembers which assignments applied anywhere.

    user: the overrides, which win over every sweep. names: the selected presets of each section. fields_of: what a key must be
    a field of, in words. once: the keys of the whole plan, which its sweeps do not set. others: further keys there are.
    """

    presets: Presets
    sections: tuple[Section, ...]
    limit: Limit
    user: Sweep
    names: dict[str, list[str]]
    fields_of: str
    once: Collection[str] = ()
    others: Collection[str] = ()
    applied: set[Assignment] = field(default_factory=set)

    def tables(self, section: Section, name: str, sweep: Sweep) -> Iterator[dict[str, Any]]:
        """The fields of each variant of one preset: the product of the assignments that apply to it.

        A key that is set replaces, in the preset and in the sweep below it, what is inside it and what decides the same thing.
        """
        base = _fields(self.presets, section, name)
        cls = _class(section, base, name)
        set_here = self._set_here(section, name, cls, str(base.get(section.tag, "")), sweep)
        parts = {(part,): set_here[(part,)] for part in section.components if part in cls.model_fields and (part,) in set_here}
        count = 0
        for names in itertools.product(*(assignment.values for assignment in parts.values())):
            presets = {part: _component(self.presets, part, plain(value)) for (part,), value in zip(parts, names, strict=True)}
            known = _keys(cls, base | presets, section.closed)
            own = {path: set_here[path] for path in sorted(set_here, key=len) if path in known and path not in parts}
            self.applied |= {*parts.values(), *own.values()}
            values = [swept(known[path], assignment.values) for path, assignment in own.items()]
            count += math.prod(map(len, values))
            self.limit.check(count)
            rivals = [_rivals(cls, path) - own.keys() for path in own]
            for combination in itertools.product(*values):
                fields = copy.deepcopy(base | presets)
                for path, value, decided in zip(own, combination, rivals, strict=True):
                    _set(fields, path, value, decided if value is not None else ())
                yield _with_defaults(cls, fields)

    def check_applied(self, sweeps: Sequence[Sweep]) -> None:
        """Refuses assignments that are about nothing in the plan."""
        choices = {section.name for section in self.sections if section.name}
        for assignment in itertools.chain.from_iterable(sweep.values() for sweep in sweeps):
            path = assignment.path
            if assignment in self.applied or assignment.key in choices:
                continue
            remedy = nearest(assignment.key, {*self._all_keys(sweeps), *choices, *self.once, *self.others})
            if path[-1] in TAGS and len(path) > 1:
                remedy = f"The preset decides it: choose another with {path[0]}=NAME."
            elif assignment.key in self.once:
                remedy = "Set it once for the whole study, beside its sweeps."
            raise InvalidInput(
                f"Override {assignment.text!r}: a key must be a field of {self.fields_of}; got {assignment.key!r}. {remedy}"
            )

    def _set_here(self, section: Section, name: str, cls: type[Spec], tag: str, sweep: Sweep) -> Sweep:
        """The assignments by where they point in the spec of this preset: the user's, and the sweep's that these leave."""
        found: Sweep = {}
        for layer in (sweep, self.user):
            names = chosen(section.name, [layer]) or self.names.get(section.name, [])
            # The more specific of two keys for one field is the longer.
            ordered = sorted(layer.values(), key=lambda assignment: len(assignment.path))
            located = [(_locate(assignment.path, section, name, tag, names), assignment) for assignment in ordered]
            own = dict(located)
            decided = {rival for path, a in own.items() if a.values != (None,) for rival in _rivals(cls, path)}
            replaced = {path for path in found if path in decided or any(path[: len(new)] == new for new in own if new)}
            self.applied |= {found[path] for path in replaced} | {a for path, a in located if path and own[path] is not a}
            found = {path: found[path] for path in found if path not in replaced} | own
        return found

    def _all_keys(self, sweeps: Sequence[Sweep]) -> Iterator[str]:
        """Every key that would apply beside those of the sweeps."""
        for section in self.sections:
            for name in self.names.get(section.name, [DEFAULT]):
                base = _fields(self.presets, section, name)
                parts = [(part, plain(value)) for part in section.components for value in chosen(part, sweeps)]
                for fields in [base, *(base | {part: _component(self.presets, part, value)} for part, value in parts)]:
                    for path in _keys(_class(section, base, name), fields, section.closed):
                        alone = path[0] in section.components or not section.name
                        yield ".".join(path if alone else (section.name, *path))
                        if section.tag:
                            yield ".".join((section.name, name, *path))


def validated(cls: type[AnySpec], fields: dict[str, Any], where: str) -> AnySpec:
    """The spec of these fields.

    Raises:
      InvalidInput: a field, named with `where` before it, is wrong.
    """
    remedy = "Set it by an override, or correct the preset in the settings."
    try:
        return cls.from_dict(fields)
    except ValidationError as error:
        raise explain(error, cls, lambda _: remedy, where) from None
    except TypeError as error:
        raise InvalidInput(f"{where} must hold numbers, text, true, false and lists; {error}. {remedy}") from None


def swept(annotation: Any, values: tuple[Value, ...]) -> tuple[Value, ...]:
    """The values of a field that a key sweeps over, each once; of a list, values without brackets are together one."""
    is_list = any(get_origin(member) is tuple for member in (annotation, *get_args(annotation)))
    if is_list and not any(value is None or isinstance(value, tuple) for value in values):
        return (values,)
    # 1, 1.0 and True are equal in Python but not the same value of a field.
    return tuple({repr(value): value for value in values}.values())


def study_plan(
    base: AnyExperiment, overrides: Iterable[str], options: Collection[str], plots: Callable[[], Collection[str]]
) -> tuple[AnyExperiment, list[Sweep], Sweep]:
    """A study changed by overrides: its options; its sweeps, less what the overrides replace; and the overrides of these.

    Args:
      options: the keys of the study itself. plots: gives the names of plots there are; called where some are chosen.

    Raises:
      InvalidInput: a text is not of the grammar, a value of an option is wrong, or a plot is not known.
    """
    user = parse_sweep(overrides)
    sweeps = [left(parse_sweep(texts), user) for texts in base.sweeps]
    changed = _study_options(base, user, options, plots)
    return changed, sweeps, without(user, [option for option in options if (option,) in user])


def _study_options(
    base: AnyExperiment, user: Sweep, names: Collection[str], plots: Callable[[], Collection[str]]
) -> AnyExperiment:
    """The options of a study, those of `names`, changed by overrides."""
    fields = base.model_dump()
    for name in names:
        if assignment := user.get((name,)):
            if name == "plots" and None in assignment.values:
                raise InvalidInput(
                    f"plots= is a list of names; got {assignment.text!r}. plots=[] draws none; leave it out for all that apply."
                )
            values = swept(type(base).model_fields[name].annotation, assignment.values)
            fields[name] = values if len(values) > 1 else values[0]
    try:
        options = type(base).model_validate(fields)
    except ValidationError as error:
        raise explain(error, type(base), lambda _: "Correct the override or the study in the settings.", "study") from None
    if options.plots:
        known = dict.fromkeys(plots())
        for plot in options.plots:
            lookup(known, "plot", plot)
    return options


def check_components(presets: Presets, section: Section) -> None:
    """Validates the presets of a section's components.

    Raises:
      InvalidInput: the first that is not valid.
    """
    for part in section.components:
        annotations = [cls.model_fields[part].annotation for cls in section.classes.values() if part in cls.model_fields]
        models = dict.fromkeys(cast(type[Spec], model) for annotation in annotations for model in models_in(annotation))
        tags = [model.model_fields[tag].default for model in models for tag in TAGS if tag in model.model_fields]
        for name, preset in getattr(presets, part).items():
            where = f"presets.{part}.{name}"
            if len(tags) == len(models) and preset.fields.get("kind") not in tags:
                raise InvalidInput(f"[{where}] must name its kind; got {preset.fields.get('kind')!r}. {nearest('', tags)}")
            # One class that takes it is enough; of several errors, the shortest is of the class it comes nearest to.
            errors = []
            for model in models:
                try:
                    validated(model, preset.fields, where)
                    break
                except InvalidInput as error:
                    errors.append(error)
            else:
                raise min(errors, key=lambda error: len(str(error)))


def _fields(presets: Presets, section: Section, name: str) -> dict[str, Any]:
    """A copy of the preset's fields, its components' presets filled in; none where "default" is no preset and needs none."""
    table: dict[str, Preset] = getattr(presets, section.name, {})
    if name == DEFAULT and name not in table and not section.tag:
        return {}
    fields = copy.deepcopy(lookup(table, f"{section.name} preset", name).fields)
    return fields | {part: _component(presets, part, fields[part]) for part in section.components if part in fields}


def _component(presets: Presets, part: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return copy.deepcopy(lookup(getattr(presets, part), f"{part} preset", value).fields)


def _class(section: Section, fields: Mapping[str, Any], name: str) -> type[Spec]:
    value = fields.get(section.tag, "")
    if not isinstance(value, str) or value not in section.classes:
        raise InvalidInput(
            f"[presets.{section.name}.{name}] must name its {section.tag}; got {value!r}. "
            + nearest(str(value), section.classes)
        )
    return section.classes[value]


def _locate(path: KeyPath, section: Section, name: str, tag: str, names: Collection[Any]) -> KeyPath:
    """Where a key points in the spec of the preset `name` of family or kind `tag`; to no field if it is not its own."""
    head, rest = path[0], path[1:]
    if not section.name or head in section.components:
        return path
    if head != section.name:
        return ()
    narrowed = len(rest) > 1 and (rest[0] == name or (rest[0] == tag and tag not in names))
    return rest[1:] if narrowed else rest


def _keys(cls: type[BaseModel], fields: Mapping[str, Any], closed: Collection[str] = ()) -> dict[KeyPath, Any]:
    """The paths of all fields that keys may set where these fields are given, nested ones included, with their annotations."""
    keys: dict[KeyPath, Any] = {}
    for name, info in cls.model_fields.items():
        if name in TAGS or name in closed:
            continue
        keys[(name,)] = info.annotation
        given = fields.get(name, info.default)
        given = given.model_dump() if isinstance(given, Spec) else given if isinstance(given, dict) else {}
        for nested in models_in(info.annotation):
            kind = nested.model_fields.get("kind")
            if kind is None or given.get("kind", kind.default) == kind.default:
                keys |= {(name, *path): annotation for path, annotation in _keys(nested, given).items()}
    return keys


def _rivals(cls: type[BaseModel], path: KeyPath) -> set[KeyPath]:
    """The fields that decide the same thing as the one at `path`."""
    models = [cls]
    for part in path[:-1]:
        models = [
            nested
            for model in models
            if part in model.model_fields
            for nested in models_in(model.model_fields[part].annotation)
        ]
    return {(*path[:-1], rival) for model in models if path for rival in cast(type[Spec], model).rivals.get(path[-1], ())}


def _set(fields: dict[str, Any], path: KeyPath, value: Value, rivals: Iterable[KeyPath]) -> None:
    for part in path[:-1]:
        if not isinstance(fields.get(part), dict):
            fields[part] = {}
        fields = fields[part]
    fields[path[-1]] = plain(value)
    for rival in rivals:
        fields.pop(rival[-1], None)


def _with_defaults(cls: type[BaseModel], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, with what a component leaves out taken from the family's default rather than from the component's class."""
    defaults = {name: info.default for name, info in cls.model_fields.items() if isinstance(info.default, Spec)}
    return fields | {name: _over(default, fields.get(name, {})) for name, default in defaults.items()}


def _over(default: Spec, fields: Any) -> Any:
    """The fields over those of the default; of another kind alone, since it has other fields."""
    under = default.model_dump(mode="json")
    if not isinstance(fields, dict) or fields.get("kind", under.get("kind")) != under.get("kind"):
        return fields
    nested = {name: getattr(default, name, None) for name in fields}
    decided = {rival for name, value in fields.items() if value is not None for rival in default.rivals.get(name, ())}
    return (
        {name: value for name, value in under.items() if name not in decided}
        | fields
        | {name: _over(spec, fields[name]) for name, spec in nested.items() if isinstance(spec, Spec)}
    )
