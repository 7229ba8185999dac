"""What every target shares: a spec, parameters w*, a dataset, and the loss as pure functions of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from lambda_hat.chunks import Progress, no_progress
from lambda_hat.spec import Precision, Spec, content_id

Params = Any  # a nested dict of arrays
Arrays = dict[str, Any]


class DataSpec(Spec):
    """Fields of every dataset."""

    n_data: int = Field(1000, ge=2, description="number of training samples n")


class TargetSpec(Spec):
    """Fields of all targets. Each family adds its own and its `build` and `objective`."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of the data, the teacher, the initial weights and the training")
    precision: Precision = Field("float32", description="dtype of parameters, data and sampling")

    @property
    def target_id(self) -> str:
        return content_id("tgt", self.model_dump(mode="json"))

    @property
    def num_data(self) -> int:
        """Number of training samples n."""
        return self.data.n_data  # type: ignore[attr-defined]

    def build(self, progress: Progress = no_progress) -> Target:
        """Makes the data and finds w*."""
        raise TypeError(f"{type(self).__name__} does not build")

    def objective(self) -> Objective:
        """The loss functions; the same objects for specs whose programs are the same."""
        raise TypeError(f"{type(self).__name__} has no objective")


class Dataset(NamedTuple):
    """samples: arrays whose first axis is the sample, (n, ...); constants: arrays all samples share."""

    samples: Arrays
    constants: Arrays

    @property
    def num_data(self) -> int:
        """Number of samples n."""
        return next(iter(self.samples.values())).shape[0]

    def take(self, indices: jax.Array) -> Dataset:
        """The minibatch of the samples at `indices`, shape (B,)."""
        return Dataset({name: array[indices] for name, array in self.samples.items()}, self.constants)

    def chunks(self, size: int) -> Iterator[Dataset]:
        """The samples in order, `size` at a time."""
        for start in range(0, self.num_data, size):
            part = {name: array[start : start + size] for name, array in self.samples.items()}
            yield Dataset(part, self.constants)


class Objective(NamedTuple):
    """The loss of a target.

    per_sample_loss: (params, dataset) -> (B,), the loss of each sample of the dataset.
    loss: (params, dataset) -> (), the mean loss L_n over the whole dataset, less a constant, in closed form from its
      constants; None where only the mean of `per_sample_loss` gives it.
    """

    per_sample_loss: Callable[[Params, Dataset], jax.Array]
    loss: Callable[[Params, Dataset], jax.Array] | None = None


@dataclass(frozen=True)
class Target:
    """A trained network with its data: the common currency of all studies.

    metrics: init_loss = L_n(w*) in float64 over all the data; num_params; num_data; true_llc (exact, as text like "13/2") where
      theory gives it; and what its family measures (accuracy, ...).
    history: training curves, arrays of equal length.
    """

    spec: TargetSpec
    params_star: Params
    dataset: Dataset
    metrics: dict[str, Any]
    history: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def target_id(self) -> str:
        return self.spec.target_id


def mean_loss_float64(objective: Objective, params: Params, dataset: Dataset, chunk_size: int = 65_536) -> float:
    """L_n(params) in float64 over all the data, `chunk_size` samples at a time."""
    with jax.enable_x64(True):
        per_sample_loss = jax.jit(objective.per_sample_loss)
        params = jax.tree.map(_to_float64, params)
        total, count = 0.0, 0
        for chunk in dataset.chunks(chunk_size):
            losses = per_sample_loss(params, jax.tree.map(_to_float64, chunk))
            total += float(jnp.sum(losses))
            count += losses.shape[0]
        return total / count


def _to_float64(array: Any) -> np.ndarray:
    """Floating arrays in float64; integers (labels) as they are."""
    array = np.asarray(array)
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array


def num_params(params: Params) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))
