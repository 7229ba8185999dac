"""Classification targets: scikit-learn's handwritten digits by an MLP."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import numpy as np
import optax
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

NUM_CLASSES = 10


class DigitsData(DataSpec):
    """The first n_data of the 1797 shuffled 8x8 images; the others are the test set."""

    n_data: int = Field(1500, ge=2, le=1796, description="number of training images n; the rest of 1797 test")


class DigitsSpec(TargetSpec):
    """Handwritten digits classified by a multilayer perceptron.

    Cross-entropy l(w; x, y) = -log softmax(f(x; w))_y, in nats.
    """

    family: Literal["digits"] = "digits"
    model: ModelSpec = ModelSpec()
    data: DigitsData = DigitsData()
    training: TrainingSpec = TrainingSpec()

    def build(self, progress: Progress = no_progress) -> Target:
        x, y, x_test, y_test = data.digits(self.data.n_data, self.seed)
        x, x_test = x.astype(self.precision), x_test.astype(self.precision)
        dataset = Dataset({"x": x, "y": y}, {})
        network = mlp(self.model, NUM_CLASSES)
        with jax.enable_x64(self.precision == "float64"):
            init_key, training_key = jax.random.split(jax.random.key(self.seed))
            params = network.init(init_key, x[:1])
            params, history = train(self.training, self.objective(), params, dataset, training_key, progress)
            accuracy = [
                float(np.mean(np.argmax(network.apply(params, inputs), axis=1) == labels))
                for inputs, labels in ((x, y), (x_test, y_test))
            ]
        params = jax.tree.map(np.asarray, params)
        metrics = {
            "init_loss": mean_loss_float64(self.objective(), params, dataset),
            "num_params": num_params(params), "num_data": self.data.n_data,
            "train_accuracy": accuracy[0], "test_accuracy": accuracy[1],
        }  # fmt: skip
        return Target(self, params, dataset, metrics, history)

    def objective(self) -> Objective:
        return cross_entropy(self.model)


@functools.cache
def cross_entropy(model: ModelSpec) -> Objective:
    """-log softmax(f(x))_y, in nats."""
    network = mlp(model, NUM_CLASSES)

    def per_sample_loss(params: Params, dataset: Dataset) -> jax.Array:
        logits = network.apply(params, dataset.samples["x"])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, dataset.samples["y"])

    return Objective(per_sample_loss)
