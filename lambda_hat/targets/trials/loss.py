"""The losses of trials: of centred predictions, f(theta; x) - f(theta_0; x)."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from lambda_hat.targets.target import Dataset, Objective, Params
from lambda_hat.targets.trials.network import forward

Loss = Literal["mse", "cross_entropy"]


def sample_losses(loss: Loss, prediction: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """The loss of each sample, of centred predictions and y with the outputs along `axis`; see `TrialSpec`."""
    if loss == "mse":
        return jnp.mean(jnp.square(prediction - y), axis)
    return jax.nn.logsumexp(prediction, axis) - jnp.sum(y * prediction, axis)


@functools.cache
def centred_loss(loss: Loss) -> Objective:
    """The loss of samples x, y, f0, the prediction at theta_0, with the constant `scale` of the network's output."""

    def per_sample_loss(params: Params, dataset: Dataset) -> jax.Array:
        samples = dataset.samples
        prediction = dataset.constants["scale"] * forward(params, samples["x"]) - samples["f0"]
        return sample_losses(loss, prediction, samples["y"], axis=1)

    return Objective(per_sample_loss)
