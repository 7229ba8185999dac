"""From settings and overrides to the updates an entropy study measures, and to the runs that sample its policies."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from lambda_hat.entropy.spec import EntropySpec, EvaluationSpec, UpdateSpec
from lambda_hat.llc.plan import ALL, SAMPLING, TARGET, make_plan, sampling, targets_of
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.grid import DEFAULT, Grid, Limit, Section, study_plan, validated
from lambda_hat.specs.overrides import Sweep, chosen, parse_sweep, without
from lambda_hat.specs.settings import EntropyExperiment, Settings, lookup
from lambda_hat.specs.spec import InvalidInput, Spec
from lambda_hat.specs.text import described, listing
from lambda_hat.targets.policies.spec import PolicySpec

#: Of the targets that are policies.
FAMILY = PolicySpec.model_fields["family"].default

#: A study of more measurements is a typing error.
LIMIT = Limit(10_000, "A study", "measurements")

MEASUREMENT = Section("", {"": EntropySpec}, closed=("target",))

_OPTIONS = ("plots", "grad_chunk_size", "tf_batch_size")


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
    options, sweeps, user = study_plan(base, overrides, _OPTIONS, _plots)
    alone = settings.model_copy(update={"experiments": {}})
    specs: dict[str, EntropySpec] = {}
    runs: dict[str, RunSpec] = {}
    for sweep in sweeps:
        if ("target", "checkpoint") not in sweep | user:
            sweep |= parse_sweep([f"target.checkpoint={ALL}"])
        samples = sampling(sweep | user)
        for spec in _specs(settings, without(sweep, SAMPLING), without(user, SAMPLING)):
            specs.setdefault(spec.entropy_id, spec)
            LIMIT.check(len(specs))
        if samples:
            targets = [a.text for path, a in (sweep | user).items() if path[0] in (TARGET.name, *TARGET.components)]
            runs |= {run.run_id: run for run in make_plan(alone, None, [*targets, *samples])}
    return EntropyPlan(name, list(specs.values()), options, list(runs.values()))


def check_entropy(settings: Settings) -> None:
    """Validates every entropy study. Raises InvalidInput: the first that is not valid."""
    for name in settings.entropy:
        make_entropy_plan(settings, name)


def describe(settings: Settings) -> str:
    """Studies, policies and fields that can be chosen by name, one line each."""
    batches: dict[str, type[Spec]] = {"update": UpdateSpec, "evaluation": EvaluationSpec}
    fields = {name: info for name, info in sorted(EntropySpec.model_fields.items()) if name not in ("target", *batches)}
    fields |= {f"{batch}.{name}": info for batch, cls in batches.items() for name, info in cls.model_fields.items()}
    policies = {name: preset for name, preset in settings.presets.target.items() if preset.fields.get("family") == FAMILY}
    return listing({
        "Entropy studies": described(settings.entropy),
        "Presets: target=": described(policies),
        "Fields of a measurement": described(fields),
    })  # fmt: skip


def _plots() -> list[str]:
    from lambda_hat.entropy.plots import PLOTS

    return list(PLOTS)


def _specs(settings: Settings, sweep: Sweep, user: Sweep) -> list[EntropySpec]:
    """The measurements of one sweep."""
    names = chosen("target", [sweep | user])
    if not names:
        raise InvalidInput("An entropy study needs a policy; got no target. Choose with target=NAME; --list has policies.")
    for name in names:
        family = lookup(settings.presets.target, "target preset", name).fields.get("family")
        if family != FAMILY:
            raise InvalidInput(
                f"An entropy study is of policies; {name!r} is a target of family {family!r}. --list has policies."
            )
    grid = Grid(
        settings.presets, (TARGET, MEASUREMENT), LIMIT, user, names={"target": names}, once=_OPTIONS, others=SAMPLING,
        fields_of="a measurement, of its batches, of the policy or of the study",
    )  # fmt: skip
    targets = [spec for name in names for spec in targets_of(settings, grid, name, sweep)]
    tables = list(grid.tables(MEASUREMENT, DEFAULT, sweep))
    grid.check_applied([sweep, user])
    LIMIT.check(len(targets) * len(tables))
    return [
        validated(EntropySpec, fields | {"target": target.model_dump(mode="json")}, "measurement")
        for target, fields in itertools.product(targets, tables)
    ]
