"""Targets: trained networks with their data. A new family is one file here and one member of `AnyTargetSpec`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lambda_hat.targets.analytic import DeepLinearSpec, QuadraticSpec, ReducedRankSpec
from lambda_hat.targets.classification import DigitsCnnSpec, DigitsSpec, FashionMnistCnnSpec, FashionMnistSpec
from lambda_hat.targets.custom import CustomSpec
from lambda_hat.targets.modular_addition import ModularAdditionSpec
from lambda_hat.targets.policies.spec import PolicySpec
from lambda_hat.targets.singular import NormalCrossingSpec, TanhSpec
from lambda_hat.targets.superposition import SuperpositionSpec
from lambda_hat.targets.supervised import MlpSpec
from lambda_hat.targets.target import Dataset, Objective, Target, TargetSpec
from lambda_hat.targets.trials.spec import TrialSpec

AnyTargetSpec = Annotated[
    MlpSpec
    | DigitsSpec
    | DigitsCnnSpec
    | FashionMnistSpec
    | FashionMnistCnnSpec
    | ModularAdditionSpec
    | SuperpositionSpec
    | CustomSpec
    | QuadraticSpec
    | NormalCrossingSpec
    | DeepLinearSpec
    | ReducedRankSpec
    | TanhSpec
    | TrialSpec
    | PolicySpec,
    Field(discriminator="family"),
]

__all__ = ["AnyTargetSpec", "Dataset", "Objective", "Target", "TargetSpec"]
