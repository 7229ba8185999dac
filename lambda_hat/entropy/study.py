"""The results of an entropy study as tables: what its plots, its report and its readers start from."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lambda_hat.entropy.spec import EntropySpec
from lambda_hat.specs.spec import dotted
from lambda_hat.targets.policies.spec import PolicySpec

if TYPE_CHECKING:
    import pandas as pd


#: Settings of a measurement that do not set it apart: its evaluation batches are named by number.
NOT_NAMED = ("evaluation.num_batches", "exact")


class Measured(NamedTuple):
    """One update of one policy at one checkpoint, taken apart.

    summary: see docs/entropy.md. update: a row for each training sequence, with its features. evaluations: the same for each
    evaluation batch. matrices: of each, M[e, i] of the first-order change per unit eta, (N_E, N_U). influence: a row for each
    evaluation batch, eta and training sequence. changes: a row for each evaluation batch and eta.
    """

    entropy_id: str
    spec: EntropySpec
    summary: dict[str, Any]
    update: pd.DataFrame
    evaluations: list[pd.DataFrame]
    matrices: list[np.ndarray]
    influence: pd.DataFrame
    changes: pd.DataFrame


class PolicyTraining(NamedTuple):
    """How a policy was trained: its metrics and its curves over the updates, see `targets.policies.train.TrainedPolicy`."""

    target_id: str
    spec: PolicySpec
    metrics: dict[str, Any]
    history: dict[str, np.ndarray]


class EntropyStudy(NamedTuple):
    """measured: by policy, then by checkpoint. policies: by target_id. llcs: a row for each checkpoint that was sampled:
    target_id, checkpoint, llc, mcse, verdict."""

    name: str
    measured: list[Measured]
    policies: dict[str, PolicyTraining]
    llcs: pd.DataFrame | None = None


def influence_table(study: EntropyStudy) -> pd.DataFrame:
    """The features of every training sequence joined to its influence: a row for each measurement, evaluation batch, eta and
    sequence, with the settings in which measurements differ."""
    import pandas as pd

    parts = []
    for measured in study.measured:
        joined = measured.influence.merge(measured.update, on="sequence", validate="many_to_one")
        for place, (name, value) in enumerate(names_of(study, measured).items()):
            joined.insert(place, name, value)
        parts.append(joined)
    return pd.concat(parts, ignore_index=True)


def names_of(study: EntropyStudy, measured: Measured) -> dict[str, Any]:
    """What tells the rows of a measurement from those of the study's others: ids, checkpoint, seed, and the settings in which
    any differ."""
    names = differing(measurement_settings(one.spec) for one in study.measured)
    target, own = measured.spec.target, measurement_settings(measured.spec)
    known = {
        "entropy_id": measured.entropy_id, "target_id": target.target_id, "checkpoint": target.checkpoint,
        "seed": measured.spec.seed,
    }  # fmt: skip
    return known | {name: own.get(name) for name in names if name != "seed"}


def differing(fields: Iterable[Mapping[str, Any]]) -> list[str]:
    """The settings, single values all, in which some differ."""
    every = list(fields)
    names = list(dict.fromkeys(name for of in every for name in of))
    return [name for name in names if len({repr(of.get(name)) for of in every}) > 1]


@functools.lru_cache(maxsize=4096)
def policy_settings(spec: PolicySpec) -> dict[str, Any]:
    """Settings of a policy that are single values, by name; its checkpoint left out."""
    fields = dotted(spec.model_dump(mode="json", exclude={"checkpoint"}))
    return {"policy seed" if key == "seed" else key.removeprefix("rl."): of for key, of in fields.items() if _single(of)}


@functools.lru_cache(maxsize=4096)
def measurement_settings(spec: EntropySpec) -> dict[str, Any]:
    """The same of a measurement and its policy."""
    own = dotted(spec.model_dump(mode="json", exclude={"target"}))
    return policy_settings(spec.target) | {key: value for key, value in own.items() if _single(value) and key not in NOT_NAMED}


def _single(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
