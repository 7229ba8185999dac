"""Trials: ReLU networks of batch-size studies, trained many at a time, and each of them a target."""

from __future__ import annotations

from lambda_hat.trials.engine import TrialResult, train_trials
from lambda_hat.trials.result import to_target
from lambda_hat.trials.spec import TrialSpec
from lambda_hat.trials.task import AnyTask, ImagesTask, PolynomialTask, TeacherTask

__all__ = [
    "AnyTask", "ImagesTask", "PolynomialTask", "TeacherTask", "TrialResult", "TrialSpec", "to_target", "train_trials",
]  # fmt: skip
