"""A run: one sampler on one target's posterior."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Self

from pydantic import model_validator

from lambda_hat.samplers.kinds import AnySamplerSpec
from lambda_hat.samplers.metric import Metric
from lambda_hat.samplers.posterior import PosteriorSpec
from lambda_hat.specs.spec import Spec, content_id, dotted
from lambda_hat.targets.families import AnyTargetSpec
from lambda_hat.targets.target import TRAIN

#: Runs of one batch at most; `llc.sampling.lane_width` bounds those that are sampled at once.
MAX_LANES = 64


class RunSpec(Spec):
    """Everything that decides the numbers of a run; its precision is the target's."""

    target: AnyTargetSpec
    posterior: PosteriorSpec = PosteriorSpec()
    sampler: AnySamplerSpec

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.sampler.kind == "smc" and self.posterior.localization == 0:
            raise ValueError("posterior.localization must be above 0 for smc, which starts from its Gaussian; got 0")
        batch_size = getattr(self.sampler, "batch_size", 0)
        if batch_size > self.target.num_data:
            raise ValueError(f"sampler.batch_size must be at most data.n_data, {self.target.num_data}; got {batch_size}")
        known = (TRAIN, *self.target.observable_names)
        unknown = [name for name in self.sampler.observables if name not in known]
        if unknown:
            raise ValueError(
                f"sampler.observables must name datasets of the target, {', '.join(known)}; got {', '.join(unknown)}"
            )
        return self

    @property
    def target_id(self) -> str:
        return self.target.target_id

    @property
    def run_id(self) -> str:
        content = {"target_id": self.target_id, "checkpoint": self.target.checkpoint}
        return content_id("run", content | self.model_dump(mode="json", exclude={"target"}))

    @property
    def nbeta(self) -> float:
        return self.posterior.resolve_nbeta(self.target.num_data)

    @property
    def metric(self) -> Metric:
        """The posterior's, or what suits the target."""
        return self.target.metric if self.posterior.metric == "auto" else self.posterior.metric

    @property
    def fge(self) -> float:
        """Work of the run in full-data gradient equivalents, as far as it is known before it starts."""
        return self.sampler.fge(self.target.num_data)


def batches(specs: Sequence[RunSpec]) -> list[list[int]]:
    """The runs one program can sample together, as indices: of one target, and different in numbers and seeds only."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, spec in enumerate(specs):
        posterior = (spec.posterior.parameters, spec.posterior.metric)
        key = (spec.target_id, spec.target.checkpoint, posterior, spec.sampler.static(), spec.sampler.num_draws)
        groups[key].append(index)
    return [group[start : start + MAX_LANES] for group in groups.values() for start in range(0, len(group), MAX_LANES)]


def labels(specs: Sequence[RunSpec]) -> list[tuple[str, str]]:
    """(target, sampler) names for people: the family and the kind, with the fields in which those of a kind differ."""
    targets = _name_apart([spec.target for spec in specs], "family")
    samplers = _name_apart([spec.sampler for spec in specs], "kind")
    posteriors = _name_apart([spec.posterior for spec in specs], "")
    return [
        (target, f"{sampler} {posterior}".strip())
        for target, sampler, posterior in zip(targets, samplers, posteriors, strict=True)
    ]


def _name_apart(specs: Sequence[Spec], kind_field: str) -> list[str]:
    flat = [dotted(spec.model_dump(mode="json")) for spec in specs]
    values: dict[tuple[str, str], set[str]] = defaultdict(set)  # of each kind's fields
    for fields in flat:
        for name, value in fields.items():
            values[fields.get(kind_field, ""), name].add(_short(value))
    names = []
    for fields in flat:
        kind = fields.get(kind_field, "")
        differing = [f"{name}={_short(value)}" for name, value in fields.items() if len(values[kind, name]) > 1]
        names.append(" ".join([kind, *differing]).strip())
    return names


def _short(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else str(value)
