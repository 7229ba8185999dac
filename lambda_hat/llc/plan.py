"""From settings and overrides to the runs they ask for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from lambda_hat.llc.run import RunSpec
from lambda_hat.samplers.kinds import AnySamplerSpec
from lambda_hat.samplers.posterior import PosteriorSpec
from lambda_hat.specs.grid import DEFAULT, Grid, Limit, Section, by_tag, check_components, validated
from lambda_hat.specs.overrides import Sweep, chosen, left, parse_sweep
from lambda_hat.specs.settings import Settings, explain, lookup
from lambda_hat.specs.spec import InvalidInput, Spec
from lambda_hat.specs.text import described, listing
from lambda_hat.targets.custom import CustomSpec
from lambda_hat.targets.families import AnyTargetSpec, TargetSpec

#: A plan of more runs is a typing error.
LIMIT = Limit(100_000, "A plan", "runs")

#: target.checkpoint=all is every checkpoint.
ALL = "all"

TARGET = Section("target", by_tag(AnyTargetSpec, "family"), "family", ("model", "data", "training"))
POSTERIOR = Section("posterior", {"": PosteriorSpec})
SAMPLER = Section("sampler", by_tag(AnySamplerSpec, "kind"), "kind")
#: The sections whose keys are about sampling, in studies that sample what they train or measure.
SAMPLING = (SAMPLER.name, POSTERIOR.name)


def make_plan(settings: Settings, experiment: str | None = None, overrides: Sequence[str] = ()) -> list[RunSpec]:
    """The runs of an experiment (the one named "default" if None) changed by overrides; each once, targets outermost.

    Keys: `target=a,b`, `sampler=`, `posterior=`, `model=`, `data=`, `training=` choose presets. `model.depth=`,
    `data.n_data=`, `training.`, `posterior.` set fields of these parts; `target.seed=`, or `seed=`, the target's own, of which
    `target.checkpoint=all` is every checkpoint of the training; `sampler.num_chains=` the sampler's. `target.NAME.seed=` and
    `sampler.NAME.step_size=` hold for the preset of that name only; if no preset of that name is selected, for every preset of
    that family or kind.

    Rules:
      - A sweep is the Cartesian product of its values; an experiment is the union of its sweeps.
      - A key applies to the selected presets that have the field and multiplies only these; one that fits nowhere is refused.
      - An override replaces the same key of the experiment, what the experiment sets inside it (`model=` replaces
        `model.depth=`), and, in presets too, what decides the same thing (`model.target_params=` replaces `model.width`). It
        wins over the experiment whichever is more specific; among overrides the more specific key wins.
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
        sweeps = [_sweep(texts) for texts in lookup(settings.experiments, "experiment", name).sweeps]
    user = _sweep(overrides)
    targets, samplers = (chosen(section, [user]) or chosen(section, sweeps) for section in ("target", "sampler"))
    for section, names in (("target", targets), ("sampler", samplers)):
        if not names:
            raise InvalidInput(
                f"A plan needs targets and samplers; got no {section}. Choose with {section}=NAME; --list has them."
            )
    grid = _grid(settings, user, {"target": targets, "sampler": samplers})
    runs: dict[str, RunSpec] = {}
    for target in targets:
        homes: list[Sweep] = _open_to("target", target, sweeps) or [{}]
        for sampler in chosen("sampler", [user]) or chosen("sampler", homes) or samplers:
            for sweep in _open_to("sampler", sampler, homes) or homes:
                runs |= {run.run_id: run for run in _runs(settings, grid, target, sampler, sweep) if run.run_id not in runs}
                LIMIT.check(len(runs))
    # Where the user chooses, the experiment's keys may be about what is no longer there.
    chooses = any((section.name,) in user for section in grid.sections)
    grid.check_applied([user] if chooses else [user, *(left(sweep, user) for sweep in sweeps)])
    order: dict[str, int] = {}
    for run in runs.values():
        order.setdefault(run.target_id, len(order))
    return sorted(runs.values(), key=lambda run: order[run.target_id])


def targets_of(settings: Settings, grid: Grid, name: str, sweep: Sweep) -> Iterator[TargetSpec]:
    """The variants of one target preset; of precision none the settings', of checkpoint=all each of its training's."""
    for fields in grid.tables(TARGET, name, sweep):
        every = fields.get("checkpoint") == ALL
        fields = {"precision": settings.runtime.precision} | {
            key: fields[key] for key in fields if not (every and key == "checkpoint")
        }
        try:
            spec = validated(TARGET.classes[fields["family"]], fields, f"target.{name}")
        except InvalidInput as error:
            others = [other for other in grid.names.get("target", []) if other != name]
            raise InvalidInput(
                f"{error} Or leave this target out: target={','.join(others)}." if others else str(error)
            ) from None
        assert isinstance(spec, TargetSpec)
        if every and not spec.checkpoint_steps:
            raise InvalidInput(
                f"target.checkpoint={ALL} needs a target that saves checkpoints while it is trained; {name!r} saves none. "
                "Set training.num_checkpoints, or choose another target."
            )
        yield from (spec.model_copy(update={"checkpoint": step}) for step in spec.checkpoint_steps) if every else [spec]


def sampling(sweep: Sweep) -> list[str]:
    """The overrides of a study's sweep that are about sampling, which it does with `sampler=`.

    Raises:
      InvalidInput: there are some, but no `sampler=`.
    """
    own = [assignment for path, assignment in sweep.items() if path[0] in SAMPLING]
    if own and ("sampler",) not in sweep:
        raise InvalidInput(f"{own[0].key} is of sampling, which a study does with sampler=NAME; got none.")
    return [assignment.text for assignment in own]


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
    presets = settings.presets
    grid = _grid(settings, {}, {})
    for name in presets.target:
        list(targets_of(settings, grid, name, {}))
    for section in (SAMPLER, POSTERIOR):
        for name in getattr(presets, section.name):
            list(_specs(grid, section, name, {}))
    check_components(presets, TARGET)
    for name in settings.experiments:
        make_plan(settings, name)


def describe(settings: Settings) -> str:
    """What can be chosen by name, one line each: experiments, presets, target families and sampler kinds."""
    sections = ("target", "sampler", "posterior", *TARGET.components)
    kinds = {"Target families": TARGET.classes, "Sampler kinds": SAMPLER.classes}
    return listing(
        {"Experiments": described(settings.experiments)}
        | {f"Presets: {section}=": described(getattr(settings.presets, section)) for section in sections}
        | {title: {name: (cls.__doc__ or "").split("\n")[0] for name, cls in kinds[title].items()} for title in kinds}
    )


def _sweep(texts: Iterable[str]) -> Sweep:
    """The sweep of these texts, in which `seed=` alone is the targets'."""
    return parse_sweep(f"{TARGET.name}.{text}" if text.partition("=")[0].strip() == "seed" else text for text in texts)


def _grid(settings: Settings, user: Sweep, names: dict[str, list[str]]) -> Grid:
    return Grid(settings.presets, (TARGET, POSTERIOR, SAMPLER), LIMIT, user, names, "a selected target, sampler or posterior")


def _runs(settings: Settings, grid: Grid, target: str, sampler: str, sweep: Sweep) -> Iterator[RunSpec]:
    """The runs of one preset each of target and sampler."""
    under = left(sweep, grid.user)
    names = chosen("posterior", [grid.user]) or chosen("posterior", [sweep]) or [DEFAULT]
    parts: dict[str, list[Any]] = {
        "target": list(targets_of(settings, grid, target, sweep)),
        "posterior": [spec for name in names for spec in _specs(grid, POSTERIOR, name, under)],
        "sampler": list(_specs(grid, SAMPLER, sampler, sweep)),
    }
    LIMIT.check(math.prod(map(len, parts.values())))
    remedy = f"Set one by an override, or correct [presets.target.{target}] or [presets.sampler.{sampler}]."
    for specs in itertools.product(*parts.values()):
        try:
            yield RunSpec.model_validate(dict(zip(parts, specs, strict=True)))
        except ValidationError as error:
            raise explain(error, RunSpec, lambda _: remedy, "run") from None


def _specs(grid: Grid, section: Section, name: str, sweep: Sweep) -> Iterator[Spec]:
    for fields in grid.tables(section, name, sweep):
        yield validated(section.classes[fields.get(section.tag, "")], fields, f"{section.name}.{name}")


def _open_to(section: str, name: Any, sweeps: Iterable[Sweep]) -> list[Sweep]:
    """The sweeps that name this preset, or none of the section."""
    return [sweep for sweep in sweeps if (section,) not in sweep or name in sweep[(section,)].values]
