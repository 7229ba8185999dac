"""Regression targets: an MLP student trained on the noisy outputs of an MLP teacher."""

from __future__ import annotations

import functools
from typing import Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from lambda_hat import data
from lambda_hat.chunks import Progress, no_progress
from lambda_hat.networks import ModelSpec, mlp
from lambda_hat.target import (
    Dataset,
    DataSpec,
    Objective,
    Params,
    Target,
    TargetSpec,
    mean_loss_float64,
    num_params,
)
from lambda_hat.training import TrainingSpec, train


class TeacherData(DataSpec):
    """x ~ N(0, I), y = teacher(x) + N(0, noise_scale^2 I); the teacher's outputs are scaled to unit variance."""

    input_dim: int = Field(8, ge=1, description="dimension of the inputs")
    output_dim: int = Field(1, ge=1, description="dimension of the outputs")
    noise_scale: float = Field(0.1, ge=0, description="standard deviation of the label noise")
    teacher: ModelSpec = Field(ModelSpec(depth=1, width=4), description="the teacher network")


class MlpSpec(TargetSpec):
    """Teacher-student regression by a multilayer perceptron.

    l(w; x, y) = 1/2 |f(x; w) - y|^2."""

    family: Literal["mlp"] = "mlp"
    model: ModelSpec = ModelSpec()
    data: TeacherData = TeacherData()
    training: TrainingSpec = TrainingSpec()

    def build(self, progress: Progress = no_progress) -> Target:
        keys = jax.random.split(jax.random.key(self.seed), 3)
        with jax.enable_x64(self.precision == "float64"):
            x = data.normal((self.seed, 0), (self.data.n_data, self.data.input_dim)).astype(self.precision)
            teacher = mlp(self.data.teacher, self.data.output_dim)
            clean = np.asarray(teacher.apply(_init(teacher, keys[0], x), x))
            noise = data.normal((self.seed, 1), clean.shape, self.data.noise_scale)
            y = (clean / np.maximum(clean.std(), 1e-6) + noise).astype(self.precision)
            dataset = Dataset({"x": x, "y": y}, {})
            params = _init(mlp(self.model, self.data.output_dim), keys[1], x)
            params, history = train(self.training, self.objective(), params, dataset, keys[2], progress)
        params = jax.tree.map(np.asarray, params)
        metrics = {
            "init_loss": mean_loss_float64(self.objective(), params, dataset),
            "noise_loss": 0.5 * float(np.mean(np.sum(np.square(noise), axis=1))),  # what the teacher itself would have
            "num_params": num_params(params),
            "num_data": self.data.n_data,
        }
        return Target(self, params, dataset, metrics, history)

    def objective(self) -> Objective:
        return squared_error(self.model, self.data.output_dim)


def _init(network: hk.Transformed, key: jax.Array, x: np.ndarray) -> Params:
    return network.init(key, x[:1])


@functools.cache
def squared_error(model: ModelSpec, output_dim: int) -> Objective:
    """1/2 |f(x) - y|^2, summed over the outputs: the negative log likelihood of unit-variance noise, less a constant."""
    network = mlp(model, output_dim)

    def per_sample_loss(params: Params, dataset: Dataset) -> jax.Array:
        residual = network.apply(params, dataset.samples["x"]) - dataset.samples["y"]
        return 0.5 * jnp.sum(jnp.square(residual), axis=1)

    return Objective(per_sample_loss)
