"""Targets: trained networks with their data. A new family is one file here and one member of `AnyTargetSpec`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lambda_hat.target import Dataset, Objective, Target, TargetSpec
from lambda_hat.targets.analytic import DeepLinearSpec, QuadraticSpec
from lambda_hat.targets.classification import DigitsSpec
from lambda_hat.targets.supervised import MlpSpec

AnyTargetSpec = Annotated[MlpSpec | DigitsSpec | QuadraticSpec | DeepLinearSpec, Field(discriminator="family")]

__all__ = ["AnyTargetSpec", "Dataset", "Objective", "Target", "TargetSpec"]
