"""The results of an entropy study as tables: what its plots, its report and its readers start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lambda_hat.entropy.spec import EntropySpec
from lambda_hat.policies.spec import PolicySpec

if TYPE_CHECKING:
    import pandas as pd


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
    """How a policy was trained: its metrics and its curves over the updates, see `lambda_hat.policies.train.TrainedPolicy`."""

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
    sequence."""
    import pandas as pd

    parts = []
    for measured in study.measured:
        joined = measured.influence.merge(measured.update, on="sequence", validate="many_to_one")
        joined.insert(0, "entropy_id", measured.entropy_id)
        joined.insert(1, "target_id", measured.spec.target.target_id)
        joined.insert(2, "checkpoint", measured.spec.target.checkpoint)
        joined.insert(3, "seed", measured.spec.seed)
        parts.append(joined)
    return pd.concat(parts, ignore_index=True)
