"""From settings and overrides to the updates an entropy study measures, and to the runs that sample its policies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError

from lambda_hat.entropy.spec import EntropySpec, EvaluationSpec, UpdateSpec
from lambda_hat.llc.plan import ALL, make_plan, make_targets, study_options
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.overrides import Assignment, parse_sweep
from lambda_hat.specs.settings import EntropyExperiment, Settings, explain, lookup, nearest
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.spec import PolicySpec

DEFAULT = "default"

#: Of the targets that are policies.
FAMILY = PolicySpec.model_fields["family"].default

#: A study of more measurements is a typing error.
MAX_MEASUREMENTS = 10_000

Key = tuple[str, ...]
Sweep = dict[Key, Assignment]

_OPTIONS = ("plots", "grad_chunk_size", "tf_batch_size")
_SAMPLING = ("sampler", "posterior")
#: The parts of a target that have presets of their own; a policy's are its model and its task alone.
_TARGET = ("target", "model")
_BATCHES: dict[str, type[UpdateSpec] | type[EvaluationSpec]] = {"update": UpdateSpec, "evaluation": EvaluationSpec}
_FIELDS = {name for name in EntropySpec.model_fields if name not in ("target", *_BATCHES)}
#: Fields that hold several values.
_LISTS = {("etas",), *((name, field) for name in _BATCHES for field in ("prompt_ids", "prompts", "answers", "sequences"))}


class EntropyPlan(NamedTuple):
    """name: of the experiment. specs: each measurement once. options: the experiment's, changed by overrides. runs: those that
    sample the policies at their checkpoints, if that is asked for."""

    name: str
    specs: list[EntropySpec]
    options: EntropyExperiment
    runs: list[RunSpec]


def make_entropy_plan(
    settings: Settings, experiment: str | None = None, overrides: tuple[str, ...] | list[str] = ()
) -> EntropyPlan:
    """The measurements of a study (the one named "default" if None) changed by overrides.

    Keys: `target=` chooses presets of policies and `target.*` changes them, as in sweeps, `target.checkpoint=0,150` the updates
    after which they are measured (default: all that are kept). `update.num_prompts=`, `evaluation.num_prompts=` and so on are
    of the two batches; `etas=1e-4,1e-3`, `integrand=`, `exact=`, `clip=`, `forward=`, `seed=` of the measurement.
    `plots=[...]`, `grad_chunk_size=` and `tf_batch_size=` are the study's own. With `sampler=` the policies are sampled at
    these checkpoints too, `sampler.*` and `posterior.*` as in sweeps.

    A sweep is the product of its values, a study the union of its sweeps; an override replaces the same key of every sweep, and
    `target=` what is set inside it.

    Raises:
      InvalidInput: an unknown name or key, a key given twice, a value a spec refuses, or too many measurements.
    """
    name = experiment or DEFAULT
    base = lookup(settings.entropy, "entropy study", name)
    user = parse_sweep(overrides)
    options = study_options(base, user, _OPTIONS, _plots)
    user = {path: assignment for path, assignment in user.items() if path[0] not in _OPTIONS}
    specs: dict[str, EntropySpec] = {}
    runs: dict[str, RunSpec] = {}
    for texts in base.sweeps:
        merged = _over(parse_sweep(texts), user)
        _check_policies(settings, merged)
        parts = _parts(merged)
        checkpoints = [] if ("target", "checkpoint") in merged else [f"target.checkpoint={ALL}"]
        chosen = [*parts["target"], *checkpoints]
        targets = make_targets(settings, chosen)
        for spec in _specs(targets, {path: merged[path] for path in merged if path[0] not in (*_TARGET, *_SAMPLING)}):
            specs.setdefault(spec.entropy_id, spec)
            if len(specs) > MAX_MEASUREMENTS:
                _refuse_size(len(specs))
        if parts["sampling"]:
            alone = settings.model_copy(update={"experiments": {}})
            runs |= {run.run_id: run for run in make_plan(alone, None, [*chosen, *parts["sampling"]])}
    return EntropyPlan(name, list(specs.values()), options, list(runs.values()))


def check_entropy(settings: Settings) -> None:
    """Validates every entropy study. Raises InvalidInput: the first that is not valid."""
    for name in settings.entropy:
        make_entropy_plan(settings, name)


def describe(settings: Settings) -> str:
    """Studies, policies and fields that can be chosen by name, one line each."""
    policies = {name: preset for name, preset in settings.presets.target.items() if preset.fields.get("family") == FAMILY}
    fields = {name: EntropySpec.model_fields[name].description or "" for name in sorted(_FIELDS)}
    for batch, cls in _BATCHES.items():
        fields |= {f"{batch}.{name}": field.description or "" for name, field in cls.model_fields.items()}
    tables = {
        "Entropy studies": {name: study.description for name, study in settings.entropy.items()},
        "Presets: target=": {name: preset.description for name, preset in policies.items()},
        "Fields of a measurement": fields,
    }
    width = max(len(name) for table in tables.values() for name in table)
    return "\n\n".join(
        "\n".join([title, *(f"  {name:{width}}  {text}".rstrip() for name, text in table.items())])
        for title, table in tables.items()
    )


def _plots() -> list[str]:
    from lambda_hat.entropy.plots import PLOTS

    return list(PLOTS)


def _over(sweep: Sweep, user: Sweep) -> Sweep:
    """The sweep's assignments that no override replaces, and the overrides."""
    replaced = {path for path in sweep if any(path[: len(new)] == new for new in user)}
    return {path: assignment for path, assignment in sweep.items() if path not in replaced} | user


def _check_policies(settings: Settings, sweep: Sweep) -> None:
    for name in sweep[("target",)].values if ("target",) in sweep else []:
        family = lookup(settings.presets.target, "target preset", name).fields.get("family")
        if family != FAMILY:
            raise InvalidInput(
                f"An entropy study is of policies; {name!r} is a target of family {family!r}. --list has policies."
            )


def _parts(sweep: Sweep) -> dict[str, list[str]]:
    """The texts of the assignments that are about targets and about their sampling."""
    texts = {
        part: [assignment.text for path, assignment in sweep.items() if path[0] in heads]
        for part, heads in (("target", _TARGET), ("sampling", _SAMPLING))
    }
    if texts["sampling"] and ("sampler",) not in sweep:
        raise InvalidInput(f"{texts['sampling'][0]} is of sampling, which a study does with sampler=NAME; got none.")
    return texts


def _specs(targets: list[Any], sweep: Sweep) -> Iterator[EntropySpec]:
    for assignment in sweep.values():
        path = assignment.path
        known = path in {(name,) for name in _FIELDS} or (path[0] in _BATCHES and path[1:] in _inside(path[0]))
        if not known:
            names = _FIELDS | {f"{batch}.{field}" for batch in _BATCHES for (field,) in _inside(batch)}
            remedy = nearest(assignment.key, names | {*_OPTIONS, *_SAMPLING, "target"})
            if path[0] in _OPTIONS:  # of a sweep in the settings
                remedy = "Set it once for the whole study, beside its sweeps."
            raise InvalidInput(
                f"Override {assignment.text!r}: a key must be a field of a measurement, of its batches, of the policy or of "
                f"the study; got {assignment.key!r}. {remedy}"
            )
    for target in targets:
        if not isinstance(target, PolicySpec):
            raise InvalidInput(
                f"An entropy study is of policies; got a target of family {target.family!r}. --list has policies."
            )
    values = {path: _values(path, assignment) for path, assignment in sweep.items()}
    size = len(targets) * math.prod(map(len, values.values()))
    if size > MAX_MEASUREMENTS:
        _refuse_size(size)
    for target, *combination in itertools.product(targets, *values.values()):
        fields: dict[str, Any] = {"target": target.model_dump(mode="json")}
        for path, value in zip(values, combination, strict=True):
            (fields if len(path) == 1 else fields.setdefault(path[0], {}))[path[-1]] = value
        try:
            yield EntropySpec.from_dict(fields)
        except ValidationError as error:
            raise explain(error, EntropySpec, lambda _: "Override it, or correct the study.", "measurement") from None


def _values(path: Key, assignment: Assignment) -> list[Any]:
    """The values a key sweeps over; of a list, values that are none are together one."""
    if path in _LISTS and not any(isinstance(value, tuple) for value in assignment.values):
        return [assignment.values]
    return list(assignment.values)


def _inside(batch: str) -> set[Key]:
    return {(name,) for name in _BATCHES[batch].model_fields}


def _refuse_size(count: int) -> None:
    raise InvalidInput(
        f"A study has at most {MAX_MEASUREMENTS} measurements; this asks for {count} or more. Sweep fewer values."
    )
