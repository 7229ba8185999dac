"""Trials: ReLU networks of batch-size studies, trained many at a time, and each of them a target."""

from __future__ import annotations

from lambda_hat.targets.trials.engine import TrialResult, train_trials
from lambda_hat.targets.trials.result import to_target
from lambda_hat.targets.trials.spec import TrialSpec
from lambda_hat.targets.trials.task import AnyTask, ImagesTask, PolynomialTask, TeacherTask

__all__ = [
    "AnyTask", "ImagesTask", "PolynomialTask", "TeacherTask", "TrialResult", "TrialSpec", "to_target", "train_trials",
]  # fmt: skip
