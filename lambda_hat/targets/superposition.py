"""Toy model of superposition: more features than dimensions to hold them (Elhage et al. 2022, arXiv 2209.10652)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.targets import data
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
    mean_loss_float64,
    shaped,
)
from lambda_hat.targets.training import TrainedSpec, TrainingSpec, Untrained, train_target

#: Features whose own samples are observables.
OBSERVED_FEATURES = 10


class SparseData(DataSpec):
    """Sparse features: each of a sample's is 0 with probability `sparsity`, else U(0, 1)."""

    n_data: int = Field(10_000, ge=2, description="number of training samples n")
    num_features: int = Field(5, ge=1, description="dimension of the inputs")
    sparsity: float = Field(0.9, ge=0, lt=1, description="probability that a feature is 0")
    importance_decay: float = Field(0.9, gt=0, le=1, description="feature i has importance importance_decay^i")


class SuperpositionSpec(TrainedSpec):
    """Toy model of superposition: features compressed and recovered through fewer dimensions.

    f(x) = ReLU(W^T W x + b) with l(w; x) = 1/2 sum_i I_i (f(x)_i - x_i)^2 and the importances I_i.
    """

    family: Literal["superposition"] = "superposition"
    data: SparseData = SparseData()
    training: TrainingSpec = TrainingSpec()
    num_hidden: int = Field(2, ge=1, description="dimension of the hidden space, rows of W")

    @property
    def observable_names(self) -> tuple[str, ...]:
        return tuple(f"feature_{i}" for i in range(min(self.data.num_features, OBSERVED_FEATURES)))

    @property
    def sample_size(self) -> int:
        return self.data.num_features

    def param_shapes(self) -> Shapes:
        return shaped({"w": (self.num_hidden, self.data.num_features), "b": (self.data.num_features,)}, self.precision)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        rng = np.random.default_rng((self.seed, 0))
        features = self.data.num_features
        shape = (self.data.n_data, features)
        x = np.where(rng.random(shape) < self.data.sparsity, 0.0, rng.random(shape)).astype(self.precision)
        importance = self.data.importance_decay ** np.arange(features)
        dataset = Dataset({"x": x}, {"importance": importance.astype(self.precision)})
        observables = {}
        for i in range(min(features, OBSERVED_FEATURES)):
            alone = np.zeros((OBSERVABLE_SIZE, features), self.precision)
            alone[:, i] = (np.arange(OBSERVABLE_SIZE) + 0.5) / OBSERVABLE_SIZE
            observables[f"feature_{i}"] = Dataset({"x": alone}, dataset.constants)
        params = {
            "w": data.normal((self.seed, 1), (self.num_hidden, features), features**-0.5).astype(self.precision),
            "b": np.zeros(features, self.precision),
        }
        untrained = Untrained(
            params, dataset, jax.random.key(self.seed), observables,
            measure=lambda params: {"init_loss": mean_loss_float64(_OBJECTIVE, params, dataset)},
        )  # fmt: skip
        return train_target(self, untrained, progress, resume, save)

    def objective(self) -> Objective:
        return _OBJECTIVE


def _per_sample_loss(params: Params, dataset: Dataset) -> jax.Array:
    x = dataset.samples["x"]
    recovered = jax.nn.relu(x @ params["w"].T @ params["w"] + params["b"][None])
    return 0.5 * jnp.square(recovered - x) @ dataset.constants["importance"]


_OBJECTIVE = Objective(_per_sample_loss)
