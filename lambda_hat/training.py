"""Training by empirical risk minimisation: an Optax optimizer, scanned on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field

from lambda_hat.chunks import Progress, run_in_chunks
from lambda_hat.spec import Spec
from lambda_hat.target import Dataset, Objective, Params

#: Points of the recorded training curve; a curve is for looking, so its length is bounded.
HISTORY_POINTS = 200


class TrainingSpec(Spec):
    """How w* is found."""

    optimizer: Literal["adam", "sgd"] = Field("adam", description="Optax optimizer")
    learning_rate: float = Field(1e-2, gt=0, description="peak learning rate")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="learning-rate schedule; cosine ends at zero")
    num_steps: int = Field(5000, ge=1, description="optimizer steps")
    batch_size: int | None = Field(None, ge=1, description="samples per step, drawn with replacement; none = all of them")


@functools.cache
def _program(spec: TrainingSpec, objective: Objective) -> tuple[Callable, Callable]:
    """(init, advance) of the training loop; the learning rate is traced."""
    optimizer = {"adam": optax.scale_by_adam, "sgd": optax.identity}[spec.optimizer]()

    def mean_loss(params: Params, batch: Dataset) -> jax.Array:
        return jnp.mean(objective.per_sample_loss(params, batch))

    @jax.jit
    def init(params: Params) -> Any:
        return params, optimizer.init(params), jnp.full(HISTORY_POINTS, jnp.nan, jax.tree.leaves(params)[0].dtype)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(
        carry: Any,
        dataset: Dataset,
        key: jax.Array,
        learning_rate: jax.Array,
        num_steps: jax.Array,
        start: jax.Array,
        count: jax.Array,
    ) -> Any:
        def step(index: jax.Array, carry: Any) -> Any:
            params, state, losses = carry
            batch = dataset
            if spec.batch_size is not None:
                batch = dataset.take(
                    jax.random.randint(jax.random.fold_in(key, index), (spec.batch_size,), 0, dataset.num_data)
                )
            loss, gradient = jax.value_and_grad(mean_loss)(params, batch)
            rate = learning_rate
            if spec.schedule == "cosine":
                rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * (index / num_steps).astype(rate.dtype)))
            direction, state = optimizer.update(gradient, state, params)
            updates = jax.tree.map(lambda d: -rate * d, direction)
            # A point holds the loss of its last step; with fewer steps than points the rest stay NaN.
            point = index * HISTORY_POINTS // jnp.maximum(num_steps, HISTORY_POINTS)
            return optax.apply_updates(params, updates), state, losses.at[point].set(loss)

        return jax.lax.fori_loop(start, start + count, step, carry)

    return init, advance


def train(
    spec: TrainingSpec, objective: Objective, params: Params, dataset: Dataset, key: jax.Array, progress: Progress
) -> tuple[Params, dict[str, np.ndarray]]:
    """Minimises the mean loss over `dataset`, starting from `params`.

    Args:
      key: of the minibatches.

    Returns:
      The trained parameters and the training curve {"step", "loss"} (loss of the batch, before the step).

    Raises:
      FloatingPointError: the loss is not finite at the end.
    """
    dtype = jax.tree.leaves(params)[0].dtype
    # The program depends on the optimizer, the schedule and the batch size; rate and length are traced.
    init, advance = _program(spec.model_copy(update={"learning_rate": 1.0, "num_steps": 1}), objective)
    rate = jnp.asarray(spec.learning_rate, dtype)

    def report(carry: Any, done: int) -> None:
        progress(done, spec.num_steps, "steps", f"loss {np.nanmin(np.asarray(carry[2])):.4g}")

    carry = run_in_chunks(
        lambda carry, start, count: advance(carry, dataset, key, rate, spec.num_steps, start, count),
        init(params), 0, spec.num_steps, report,
    )  # fmt: skip
    params, _, losses = carry
    losses = np.asarray(losses)
    recorded = ~np.isnan(losses)
    steps = np.minimum((np.arange(HISTORY_POINTS) + 1) * max(spec.num_steps, HISTORY_POINTS) // HISTORY_POINTS, spec.num_steps)
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params)):
        raise FloatingPointError(
            f"Training must end with finite parameters; it diverged with learning_rate={spec.learning_rate}. "
            "Lower training.learning_rate."
        )
    return params, {"step": steps[recorded], "loss": losses[recorded]}
