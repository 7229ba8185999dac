"""Classification targets: handwritten digits and Fashion-MNIST, by an MLP or a small CNN."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar, Literal, Self

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field, model_validator

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.targets import data
from lambda_hat.targets.networks import CnnSpec, ModelSpec, cnn, input_shapes, mlp
from lambda_hat.targets.target import (
    OBSERVABLE_SIZE,
    Dataset,
    DataSpec,
    Objective,
    Params,
    Save,
    Shapes,
    Target,
    Unfinished,
    mean_float64,
)
from lambda_hat.targets.training import TrainedSpec, TrainingSpec, Untrained, train_target

NUM_CLASSES = 10

#: (params, dataset) -> (B, classes).
Logits = Callable[[Params, Dataset], jax.Array]


class DigitsData(DataSpec):
    """scikit-learn's 1797 images of 8x8 pixels, shuffled: the first n_data train, the next n_test test."""

    n_data: int = Field(1500, ge=2, description="number of training images n")
    n_test: int = Field(297, ge=1, description="number of test images")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.n_data + self.n_test > 1797:
            raise ValueError(f"n_data and n_test must be at most 1797 together; got {self.n_data} and {self.n_test}: lower one")
        return self


class FashionMnistData(DataSpec):
    """The first images of Fashion-MNIST's training and test sets, 28x28 pixels."""

    n_data: int = Field(10_000, ge=2, le=60_000, description="number of training images n")
    n_test: int = Field(2000, ge=1, le=10_000, description="number of test images")


class _ClassificationSpec(TrainedSpec):
    """Cross-entropy l(w; x, y) = -log softmax(f(x; w))_y, in nats. A family names its images and its network."""

    side: ClassVar[int]

    def images(self) -> tuple[Dataset, Dataset]:
        """Training and test images: x (n, side * side) in the target's precision, y (n,) int32."""
        raise TypeError(f"{type(self).__name__} has no images")

    def network(self) -> hk.Transformed:
        """(batch, side * side) -> (batch, NUM_CLASSES), the same object for equal networks."""
        raise TypeError(f"{type(self).__name__} has no network")

    @property
    def observable_names(self) -> tuple[str, ...]:
        return ("test", *(f"class_{label}" for label in range(NUM_CLASSES)))

    @property
    def sample_size(self) -> int:
        return self.side**2 + 1

    def param_shapes(self) -> Shapes:
        return input_shapes(self.network(), self.side**2, self.precision)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        dataset, test = self.images()
        init_key, training_key = jax.random.split(jax.random.key(self.seed))
        with jax.enable_x64(self.precision == "float64"):
            params = jax.jit(self.network().init)(init_key, dataset.samples["x"][:1])
        labels = dataset.samples["y"]
        groups = {f"class_{label}": np.flatnonzero(labels == label) for label in range(NUM_CLASSES)}
        observables = {"test": test.take(np.arange(test.num_data)[:OBSERVABLE_SIZE])} | {
            name: dataset.take(indices[:OBSERVABLE_SIZE]) for name, indices in groups.items() if len(indices)
        }
        measure = classification_measure(_logits(self.network()), dataset, test)
        return train_target(self, Untrained(params, dataset, training_key, observables, measure), progress, resume, save)

    def objective(self) -> Objective:
        return cross_entropy(_logits(self.network()))


class _DigitsImages(_ClassificationSpec):
    data: DigitsData = DigitsData()
    training: TrainingSpec = TrainingSpec()
    side = 8

    def images(self) -> tuple[Dataset, Dataset]:
        x, y = data.digits(self.seed)
        x = x.astype(self.precision)
        end = self.data.n_data
        train, test = slice(end), slice(end, end + self.data.n_test)
        return Dataset({"x": x[train], "y": y[train]}, {}), Dataset({"x": x[test], "y": y[test]}, {})


class _FashionMnistImages(_ClassificationSpec):
    data: FashionMnistData = FashionMnistData()
    training: TrainingSpec = TrainingSpec(learning_rate=1e-3, batch_size=256)
    side = 28

    def check_sources(self, built: bool) -> None:
        if not built:
            data.check_fashion_mnist()

    def images(self) -> tuple[Dataset, Dataset]:
        (x, y), (x_test, y_test) = (data.fashion_mnist(part) for part in ("train", "t10k"))
        n, n_test = self.data.n_data, self.data.n_test
        return (
            Dataset({"x": x[:n].astype(self.precision), "y": y[:n]}, {}),
            Dataset({"x": x_test[:n_test].astype(self.precision), "y": y_test[:n_test]}, {}),
        )


class DigitsSpec(_DigitsImages):
    """scikit-learn's handwritten digits classified by a multilayer perceptron."""

    family: Literal["digits"] = "digits"
    model: ModelSpec = ModelSpec()

    def network(self) -> hk.Transformed:
        return mlp(self.model, NUM_CLASSES)


class DigitsCnnSpec(_DigitsImages):
    """scikit-learn's handwritten digits classified by a small convolutional network."""

    family: Literal["digits_cnn"] = "digits_cnn"
    model: CnnSpec = CnnSpec()

    def network(self) -> hk.Transformed:
        return cnn(self.model, self.side, NUM_CLASSES)


class FashionMnistSpec(_FashionMnistImages):
    """Fashion-MNIST classified by a multilayer perceptron."""

    family: Literal["fashion_mnist"] = "fashion_mnist"
    model: ModelSpec = ModelSpec()

    def network(self) -> hk.Transformed:
        return mlp(self.model, NUM_CLASSES)


class FashionMnistCnnSpec(_FashionMnistImages):
    """Fashion-MNIST classified by a small convolutional network."""

    family: Literal["fashion_mnist_cnn"] = "fashion_mnist_cnn"
    model: CnnSpec = CnnSpec()

    def network(self) -> hk.Transformed:
        return cnn(self.model, self.side, NUM_CLASSES)


@functools.cache
def _logits(network: hk.Transformed) -> Logits:
    return lambda params, dataset: network.apply(params, dataset.samples["x"])


@functools.cache
def cross_entropy(logits: Logits) -> Objective:
    """-log softmax(logits)_y with the labels y, in nats."""

    def per_sample_loss(params: Params, dataset: Dataset) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, dataset), dataset.samples["y"])

    return Objective(per_sample_loss)


def classification_measure(logits: Logits, dataset: Dataset, test: Dataset) -> Callable[[Params], dict[str, float]]:
    """Loss and accuracy on the training and the test data, as functions of the parameters."""

    def measure(params: Params) -> dict[str, float]:
        train_values, test_values = (mean_float64(_loss_and_accuracy(logits), params, part) for part in (dataset, test))
        return {
            "init_loss": train_values["loss"], "train_accuracy": train_values["accuracy"],
            "test_loss": test_values["loss"], "test_accuracy": test_values["accuracy"],
        }  # fmt: skip

    return measure


@functools.cache
def _loss_and_accuracy(logits: Logits) -> Callable[[Params, Dataset], dict[str, jax.Array]]:
    def values(params: Params, dataset: Dataset) -> dict[str, jax.Array]:
        predicted, labels = logits(params, dataset), dataset.samples["y"]
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(predicted, labels)
        return {"loss": loss, "accuracy": jnp.argmax(predicted, axis=1) == labels}

    return values
