"""Training by empirical risk minimisation: an Optax optimizer in a device loop that can be cut anywhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field, model_validator

from lambda_hat.compute.chunks import Pace, Progress, run_in_chunks
from lambda_hat.specs.spec import Spec
from lambda_hat.targets.target import Dataset, Objective, Params, Save, Target, TargetSpec, Unfinished, num_params

#: Points of the recorded training curve; a curve is for looking, so its length is bounded.
HISTORY_POINTS = 200

#: Fields that only some optimizers have.
_FIELDS_OF = {"momentum": ("sgd",), "beta1": ("adam", "adamw"), "beta2": ("adam", "adamw"), "weight_decay": ("adamw",)}


class TrainingSpec(Spec):
    """How w* is found, and which parameters on the way there are kept."""

    rivals: ClassVar = {"num_checkpoints": ("checkpoint_steps",), "checkpoint_steps": ("num_checkpoints",)}

    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="Optax optimizer")
    learning_rate: float = Field(1e-2, gt=0, description="peak learning rate")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="learning-rate schedule; cosine ends at zero")
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises linearly from zero")
    num_steps: int = Field(5000, ge=1, le=2**30, description="optimizer steps")
    batch_size: int | None = Field(None, ge=1, description="samples per step, drawn with replacement; none = all of them")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd: gradients add up with this decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="of adam and adamw: decay of the mean of the gradients")
    beta2: float = Field(0.999, ge=0, lt=1, description="of adam and adamw: decay of the mean of their squares")
    weight_decay: float = Field(0.0, ge=0, description="of adamw: a step takes learning_rate * weight_decay * w from w")
    stop_loss: float | None = Field(
        None, description="stop after the first step whose batch has a loss below this; none = never"
    )
    num_checkpoints: int = Field(
        0, ge=0, le=1000, description="parameters kept at this many log-spaced steps, the last num_steps"
    )
    checkpoint_steps: tuple[int, ...] = Field((), description="or: kept at these steps, 0 being the initial weights")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        for name, optimizers in _FIELDS_OF.items():
            value = getattr(self, name)
            if self.optimizer not in optimizers and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is a field of {' and '.join(optimizers)}; got {value} with optimizer={self.optimizer}"
                )
        if self.num_checkpoints and self.checkpoint_steps:
            raise ValueError(
                "num_checkpoints and checkpoint_steps say the same thing in two ways: give one; "
                f"got {self.num_checkpoints} and {list(self.checkpoint_steps)}"
            )
        steps = self.checkpoint_steps
        if steps != tuple(sorted(set(steps))) or not all(0 <= step <= self.num_steps for step in steps):
            raise ValueError(
                f"checkpoint_steps must ascend, from 0 at least to num_steps, {self.num_steps}, at most; got {list(steps)}"
            )
        return self

    @property
    def saved_steps(self) -> tuple[int, ...]:
        """The steps after which parameters are kept. Where training is short, log-spaced ones that round alike are one."""
        if not self.num_checkpoints:
            return self.checkpoint_steps
        spaced = np.geomspace(1, self.num_steps, self.num_checkpoints) if self.num_checkpoints > 1 else [self.num_steps]
        return tuple(sorted({round(float(step)) for step in spaced}))


class TrainedSpec(TargetSpec):
    """Base of the families whose w* is trained."""

    training: TrainingSpec = TrainingSpec()

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        return self.training.saved_steps


class Untrained(NamedTuple):
    """A target before its training.

    params: initial weights. key: of the minibatches. measure: what is reported of w* and of every checkpoint, init_loss at
    least. metrics: what else its family knows.
    """

    params: Params
    dataset: Dataset
    key: jax.Array
    observables: dict[str, Dataset]
    measure: Callable[[Params], dict[str, float]]
    metrics: Mapping[str, Any] = {}


def train_target(
    spec: TrainedSpec, untrained: Untrained, progress: Progress, resume: Unfinished | None, save: Save | None
) -> Target:
    """Trains, measures w* and every checkpoint, and puts the target together; see `TargetSpec.build`."""
    dataset = untrained.dataset
    with jax.enable_x64(spec.precision == "float64"):
        params, history, checkpoints = train(
            spec.training, spec.objective(), untrained.params, dataset, untrained.key, progress, resume, save
        )
    metrics = untrained.measure(params) | {"num_params": num_params(params), "num_data": dataset.num_data, **untrained.metrics}
    if checkpoints:
        metrics["checkpoints"] = [{"step": step} | untrained.measure(saved) for step, saved in checkpoints.items()]
    return Target(spec, params, dataset, metrics, history, untrained.observables, checkpoints)


class _Program(NamedTuple):
    init: Callable[[Params], Any]
    advance: Callable[..., Any]


@functools.cache
def _program(spec: TrainingSpec, objective: Objective) -> _Program:
    """The compiled training loop; `spec` tells only what shapes it, and its numbers are traced."""
    optimizer = (
        optax.trace(spec.momentum) if spec.optimizer == "sgd" else optax.scale_by_adam(b1=spec.beta1, b2=spec.beta2)
    )  # fmt: skip

    def mean_loss(params: Params, batch: Dataset) -> jax.Array:
        return jnp.mean(objective.per_sample_loss(params, batch))

    @jax.jit
    def init(params: Params) -> Any:
        losses = jnp.full(HISTORY_POINTS, jnp.nan, jax.tree.leaves(params)[0].dtype)
        return params, optimizer.init(params), losses, jnp.asarray(False)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(
        carry: Any, dataset: Dataset, key: jax.Array, numbers: dict[str, jax.Array], start: jax.Array, count: jax.Array
    ) -> Any:
        num_steps = numbers["num_steps"]

        def step(carry: Any) -> Any:
            index, (params, state, losses, _) = carry
            batch = dataset
            if spec.batch_size is not None:
                batch = dataset.take(
                    jax.random.randint(jax.random.fold_in(key, index), (spec.batch_size,), 0, dataset.num_data)
                )
            loss, gradient = jax.value_and_grad(mean_loss)(params, batch)
            rate = numbers["learning_rate"] * jnp.minimum(1, (index + 1) / numbers["warmup_steps"]).astype(loss.dtype)
            if spec.schedule == "cosine":
                rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * (index / num_steps).astype(rate.dtype)))
            direction, state = optimizer.update(gradient, state, params)
            if spec.optimizer == "adamw":
                direction = jax.tree.map(lambda d, w: d + numbers["weight_decay"] * w, direction, params)
            updates = jax.tree.map(lambda d: -rate * d, direction)
            # A point holds the loss of its last step; with fewer steps than points the rest stay NaN.
            point = index * HISTORY_POINTS // jnp.maximum(num_steps, HISTORY_POINTS)
            stopped = loss < numbers["stop_loss"]
            return index + 1, (optax.apply_updates(params, updates), state, losses.at[point].set(loss), stopped)

        def goes_on(carry: Any) -> jax.Array:
            index, (*_, stopped) = carry
            return (index < start + count) & ~stopped

        return jax.lax.while_loop(goes_on, step, (start, carry))[1]

    return _Program(init, advance)


def train(
    spec: TrainingSpec,
    objective: Objective,
    params: Params,
    dataset: Dataset,
    key: jax.Array,
    progress: Progress,
    resume: Unfinished | None = None,
    save: Save | None = None,
) -> tuple[Params, dict[str, np.ndarray], dict[int, Params]]:
    """Minimises the mean loss over `dataset`, starting from `params`.

    Args:
      key: of the minibatches.
      resume, save: see `TargetSpec.build`; a state is saved as often as saving takes at most a tenth of the time.

    Returns:
      The trained parameters, the training curve {"step", "loss"} (loss of the batch, before the step), and the parameters at
      `spec.saved_steps`. After an early stop nothing changes, so later steps' checkpoints are the final parameters.

    Raises:
      FloatingPointError: the parameters are not finite at the end.
    """
    dtype = jax.tree.leaves(params)[0].dtype
    # The program depends on the optimizer, the schedule and the batch size; rates and lengths are traced.
    shape = TrainingSpec(**spec.model_dump(include={"optimizer", "schedule", "batch_size", "momentum", "beta1", "beta2"}))
    program = _program(shape, objective)
    stop_loss = -math.inf if spec.stop_loss is None else spec.stop_loss
    numbers = {
        "learning_rate": jnp.asarray(spec.learning_rate, dtype),
        "warmup_steps": jnp.asarray(max(spec.warmup_steps, 1)),
        "weight_decay": jnp.asarray(spec.weight_decay, dtype),
        "stop_loss": jnp.asarray(stop_loss, dtype),
        "num_steps": jnp.asarray(spec.num_steps),
    }
    carry = program.init(params)
    checkpoints: dict[int, Params] = {0: _to_host(params)} if 0 in spec.saved_steps else {}
    start = 0
    if resume is not None and (restored := resume.restore(carry)) is not None:
        carry, start, checkpoints = restored, resume.step, dict(resume.checkpoints)

    def advance(carry: Any, start: int, count: int) -> Any:
        """`count` steps, stopping at every checkpoint on the way."""
        for step in [*(step for step in spec.saved_steps if start < step < start + count), start + count]:
            carry = program.advance(carry, dataset, key, numbers, start, step - start)
            start = step
            if step in spec.saved_steps:
                checkpoints[step] = _to_host(carry[0])
        return carry

    pace = Pace()

    def after_chunk(carry: Any, done: int) -> None:
        if save is not None and done < spec.num_steps:
            pace(lambda: save(Unfinished(done, [np.asarray(leaf) for leaf in jax.tree.leaves(carry)], checkpoints)))
        losses = np.asarray(carry[2])
        finite = losses[np.isfinite(losses)]
        progress(done, spec.num_steps, "steps", f"loss {finite[-1]:.4g}" if finite.size else "no finite loss")

    params, _, losses, _ = run_in_chunks(advance, carry, start, spec.num_steps, after_chunk)
    params, losses = _to_host((params, losses))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise FloatingPointError(
            f"Training must end with finite parameters; it diverged with learning_rate={spec.learning_rate}. "
            "Lower training.learning_rate."
        )
    recorded = ~np.isnan(losses)
    steps = np.minimum((np.arange(HISTORY_POINTS) + 1) * max(spec.num_steps, HISTORY_POINTS) // HISTORY_POINTS, spec.num_steps)
    return params, {"step": steps[recorded], "loss": losses[recorded]}, checkpoints


def _to_host(tree: Any) -> Any:
    """A copy on the host: the device's own is donated to the next step."""
    return jax.tree.map(np.array, tree)
