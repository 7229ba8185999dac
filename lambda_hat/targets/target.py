"""What every target shares: a spec, parameters w*, a dataset, and the loss as pure functions of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.specs.spec import InvalidInput, Precision, Spec, content_id

Params = Any  # a nested dict of arrays
Shapes = Any  # the same of what has a shape and a dtype alone
Arrays = dict[str, Any]

#: The observable that every target has: evenly spaced samples of its training data, unless it has one of its own.
TRAIN = "train"

#: Samples of one observable dataset: their losses are recorded at every draw.
OBSERVABLE_SIZE = 100


class DataSpec(Spec):
    """Fields of every dataset."""

    n_data: int = Field(1000, ge=2, description="number of training samples n")


class TargetSpec(Spec):
    """Fields of all targets. Each family adds its own and its `build` and `objective`.

    metric: the units of offsets that suit the family, see `samplers.posterior.PosteriorSpec`: the tensors of a trained
      network have a size of their own; exact values of the llc are stated for euclidean ones.
    """

    metric: ClassVar[Literal["euclidean", "relative"]] = "relative"

    seed: int = Field(0, ge=0, lt=2**32, description="seed of the data, the teacher, the initial weights and the training")
    precision: Precision = Field("float32", description="dtype of parameters, data and sampling")
    checkpoint: int | None = Field(None, ge=0, description="sample the parameters saved at this training step; none = w*")

    @model_validator(mode="after")
    def _checkpoint_is_saved(self) -> Self:
        if self.checkpoint is not None:
            check_checkpoint(self.checkpoint, self.checkpoint_steps)
        return self

    @property
    def target_id(self) -> str:
        """One training is one artifact, whichever of its checkpoints is sampled."""
        return content_id("tgt", self.model_dump(mode="json", exclude={"checkpoint"}))

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Training steps whose parameters the target keeps, ascending: known without building, none where it does not train."""
        return ()

    @property
    def observable_names(self) -> tuple[str, ...]:
        """Names of the target's observables besides `TRAIN`; known without building."""
        return ()

    @property
    def num_data(self) -> int:
        """Number of training samples n."""
        return self.data.n_data  # type: ignore[attr-defined]

    @property
    def sample_size(self) -> int:
        """Numbers in a sample, where that is known without building; else 0."""
        return 0

    def param_shapes(self) -> Shapes:
        """What w* is made of, without its numbers and without training.

        Raises:
          InvalidInput: see `build`.
        """
        raise TypeError(f"{type(self).__name__} does not say what w* is made of")

    def check_sources(self, built: bool) -> None:
        """Looks for what the target needs from outside, files or a function, before any work.

        Args:
          built: whether it is in the store, so that only what its loss needs is looked for.

        Raises:
          InvalidInput: something is not there, cannot be read, or is not what it must be.
        """

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        """Makes the data and finds w*.

        Args:
          resume: where an earlier, interrupted call got to; the result is the same as without the interruption. One that does
            not fit is ignored, as it is by families that do not train.
          save: receives the unfinished training now and then.
        """
        raise TypeError(f"{type(self).__name__} does not build")

    def objective(self) -> Objective:
        """The loss functions; the same objects for specs whose programs are the same."""
        raise TypeError(f"{type(self).__name__} has no objective")


def chunk_size(num_data: int, most: int) -> int:
    """Samples in a chunk where all are cut into the fewest chunks of at most `most`: nearly equal ones, so that no loss is
    called with a last few samples, on whose shape it may not work."""
    return -(-num_data // -(-num_data // most))


class Dataset(NamedTuple):
    """samples: arrays whose first axis is the sample, (n, ...); constants: arrays all samples share."""

    samples: Arrays
    constants: Arrays

    @property
    def num_data(self) -> int:
        """Number of samples n."""
        return next(iter(self.samples.values())).shape[0]

    def take(self, indices: jax.Array | np.ndarray) -> Dataset:
        """The minibatch of the samples at `indices`, shape (B,), each at least 0 and below n."""
        # Promised to be in bounds: checks would take as long as the gather.
        known: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
        samples = {name: jnp.asarray(array).at[indices].get(**known) for name, array in self.samples.items()}
        return Dataset(samples, self.constants)

    def spread(self, most: int) -> Dataset:
        """`most` samples, evenly spaced; all of them where there are no more."""
        if self.num_data <= most:
            return self
        indices = np.arange(most) * self.num_data // most
        return Dataset({name: array[indices] for name, array in self.samples.items()}, self.constants)

    def chunks(self, most: int) -> Iterator[Dataset]:
        """The samples in order, at most `most` at a time."""
        size = chunk_size(self.num_data, most)
        for start in range(0, self.num_data, size):
            part = {name: array[start : start + size] for name, array in self.samples.items()}
            yield Dataset(part, self.constants)


class Unfinished(NamedTuple):
    """Training cut short: steps done, the loop's leaves, the parameters saved so far by step."""

    step: int
    leaves: list[np.ndarray]
    checkpoints: dict[int, Params]

    def restore(self, carry: Any) -> Any:
        """The loop's state, on the device and in the structure of `carry`; None where the shapes or dtypes are not those of
        `carry`: what was saved is of other work, or of another version of the libraries."""
        expected = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(carry)]
        if expected != [(leaf.shape, leaf.dtype) for leaf in self.leaves]:
            return None
        return jax.device_put(jax.tree.unflatten(jax.tree.structure(carry), self.leaves))


Save = Callable[[Unfinished], None]


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

    metrics: init_loss = L_n(w*) in float64 over all the data; num_params; num_data; true_llc (exact, as text like "13/2")
      and multiplicity where theory gives them; what its family measures (accuracy, ...); checkpoints where there are any: for
      each a dict of its step and its own values of what is measured.
    history: training curves, arrays of equal length.
    observables: named datasets with the arrays of `dataset.samples`, each of at most OBSERVABLE_SIZE samples, whose losses can
      be followed during sampling.
    checkpoints: training step -> parameters, of a target just built; from a store `load_target` gets them one by one.
    states: the same for the optimizer's state after that step, of families that keep it; `load_state` gets them.
    """

    spec: TargetSpec
    params_star: Params
    dataset: Dataset
    metrics: dict[str, Any]
    history: dict[str, np.ndarray] = field(default_factory=dict)
    observables: dict[str, Dataset] = field(default_factory=dict)
    checkpoints: dict[int, Params] = field(default_factory=dict)
    states: dict[int, Params] = field(default_factory=dict)

    @property
    def target_id(self) -> str:
        return self.spec.target_id


def check_checkpoint(step: int, saved: Sequence[int]) -> None:
    """Raises InvalidInput unless `step` is among the `saved` steps."""
    if step in saved:
        return
    known = ", ".join(map(str, sorted(saved, key=lambda known: abs(known - step))[:5])) or "none"
    raise InvalidInput(
        f"checkpoint must be a training step that the target saves; got {step}, the nearest saved: {known}; "
        "save others with training.checkpoint_steps or training.num_checkpoints"
    )


def metrics_at(summary: Mapping[str, Any], checkpoint: int | None) -> dict[str, Any]:
    """A target's metrics with what was measured at w* replaced by what was measured at the checkpoint; as they are for None.

    Raises:
      InvalidInput: there is no such checkpoint.
    """
    if checkpoint is None:
        return dict(summary)
    measured = {values["step"]: values for values in summary.get("checkpoints", [])}
    check_checkpoint(checkpoint, list(measured))
    return {**summary, **measured[checkpoint]}


def mean_loss_float64(objective: Objective, params: Params, dataset: Dataset, chunk_size: int = 4096) -> float:
    """L_n(params) in float64 over all the data, `chunk_size` samples at a time."""
    return mean_float64(objective.per_sample_loss, params, dataset, chunk_size)


def mean_float64(per_sample: Callable[[Params, Dataset], Any], params: Params, dataset: Dataset, chunk_size: int = 4096) -> Any:
    """Means over the samples in float64, `chunk_size` samples at a time.

    Args:
      per_sample: (params, dataset) -> (B,), or a dict of such; compiled once for one function object.

    Returns:
      The mean as a float, or a dict of them.
    """
    with jax.enable_x64(True):
        per_sample = jax.jit(per_sample)
        params = jax.tree.map(_to_float64, params)
        values = [per_sample(params, jax.tree.map(_to_float64, chunk)) for chunk in dataset.chunks(chunk_size)]
        return jax.tree.map(lambda *parts: float(np.mean(np.concatenate(parts), dtype=np.float64)), *values)


def _to_float64(array: Any) -> np.ndarray:
    """Floating arrays in float64; integers (labels) as they are."""
    array = np.asarray(array)
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array


def shaped(shapes: Mapping[str, Any], precision: Precision) -> Shapes:
    """Nested mappings of shapes as `Shapes`."""
    is_shape = {"is_leaf": lambda node: isinstance(node, tuple)}
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, np.dtype(precision)), dict(shapes), **is_shape)


def num_params(params: Params) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))
