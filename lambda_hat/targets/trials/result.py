"""The target of a trained trial, to be examined like any other."""

from __future__ import annotations

import jax
import numpy as np

from lambda_hat.targets.target import OBSERVABLE_SIZE, Dataset, Target, mean_loss_float64
from lambda_hat.targets.trials.engine import EVALUATION_SIZE, TrialResult
from lambda_hat.targets.trials.network import forward, init_params


def to_target(result: TrialResult) -> Target:
    """The target whose w* is the trained trial, without training it again.

    Its samples are x, (n, D), y, (n, out), and f0, (n, out), the prediction at theta_0; its loss is that of the training.

    Raises:
      FloatingPointError: the trial diverged.
    """
    spec = result.spec
    if result.diverged_at_step is not None:
        raise FloatingPointError(
            f"A trial must end with finite parameters to be a target; it diverged at step {result.diverged_at_step} "
            f"with eta={spec.eta}. Lower eta."
        )
    data = spec.task.load(spec.precision)
    scale = np.asarray(spec.scale, spec.precision)
    initial = init_params((spec.seed, 0), spec.widths, "float64")
    train, test = (
        Dataset({"x": x, "y": y, "f0": (spec.scale * _raw(initial, x)).astype(spec.precision)}, {"scale": scale})
        for x, y in ((data.x, data.y), (data.x_test[:OBSERVABLE_SIZE], data.y_test[:OBSERVABLE_SIZE]))
    )
    metrics = {"init_loss": mean_loss_float64(spec.objective(), result.params, train)} | result.metrics
    history = {"step": result.steps, "loss": result.losses}
    return Target(spec, result.params, train, metrics, history, {"test": test})


_forward = jax.jit(forward)


def _raw(params: dict, x: np.ndarray) -> np.ndarray:
    """The raw output, in float64."""
    with jax.enable_x64(True):
        parts = [_forward(params, x[i : i + EVALUATION_SIZE].astype(np.float64)) for i in range(0, len(x), EVALUATION_SIZE)]
        return np.concatenate(parts)
