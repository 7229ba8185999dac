"""The compiled programs of trials: their training, side by side over seeds, rates and richnesses, and their evaluation.

Trials of one seed see the same minibatches, so the product of the first layer's weights with the inputs, most of the work,
is one matrix product for all of them. With plain SGD that layer is updated once for a block of steps. Within the block its
outputs are

  W_t x_t = W_0 x_t + sum_{s<t} (-rate dL_s/dz_s) (x_s . x_t),

which is the same arithmetic in another order, and reads and writes the weights once a block instead of once a step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lambda_hat.compute import random
from lambda_hat.compute.chunks import Compiled
from lambda_hat.targets.trials.loss import sample_losses
from lambda_hat.targets.trials.network import upper_layers
from lambda_hat.targets.trials.task import SyntheticTask

if TYPE_CHECKING:
    from lambda_hat.targets.trials.spec import TrialSpec

#: Samples of a block of steps whose first layer is updated together, at most; so many or one step.
BLOCK_SAMPLES = 64
#: Adam's epsilon. In muP gradients of hidden weights fall as N^(-3/2): Optax's 1e-8 would slow wide networks down, and the best
#: rate would rise with the width. A gradient so small that its square is 0 in float32 still moves a weight by little.
ADAM_EPS = 1e-16


class Lanes(NamedTuple):
    """Numbers of a group of trials, (seed, lane); the seeds' initial weights, (seed, 1, out, in); the seeds, (seed,)."""

    scale: Any
    rates: tuple[Any, ...]
    initial: tuple[Any, ...]
    seed: Any


class Data(NamedTuple):
    """Training data on the device: x / sqrt(D), (n, D), y, (n, out); raw outputs at theta_0 of the seeds, (seed, n, out). Fresh
    data are drawn by the task's seed and labelled by its teacher."""

    x: Any
    y: Any
    raw: Any
    key: Any
    teacher: Any


class State(NamedTuple):
    """What the loop carries. curve: (seed, lane, point), see `Length`. diverged: (seed, lane), the step, or 0."""

    weights: tuple[jax.Array, ...]  # (seed, lane, out, in)
    optimizer: Any
    curve: jax.Array
    diverged: jax.Array


def program_key(spec: TrialSpec) -> TrialSpec:
    """What the compiled program depends on: the spec with everything at fixed values that is traced."""
    task = spec.task.model_copy(update={"n_data": 2**40, "n_test": 1} | ({"seed": 0} if hasattr(spec.task, "seed") else {}))
    fixed = {
        "task": task,
        "num_steps": 1,
        "num_epochs": None,
        "rate_rule": "raw",
        "points_per_doubling": 1,
        "parameterization": "sp",
    }
    return spec.static().model_copy(update=fixed)


class Length(NamedTuple):
    """Number of steps, and the steps at which the points of the curve end, ascending, however many of them come after the last
    step: so that a point's share of a step is the same whatever the number of steps."""

    total: Any
    points: Any


class Program(NamedTuple):
    """The compiled functions. block_steps, block_samples: of a block."""

    block_steps: int
    block_samples: int
    init: Callable[..., State]
    raw: Callable[..., jax.Array]
    evaluate: Compiled
    advance: Compiled


@functools.lru_cache(maxsize=64)
def make_program(spec: TrialSpec) -> Program:
    """Of trials of this shape; all numbers are traced."""
    deferred = spec.optimizer == "sgd" and spec.momentum == 0
    block_steps = max(1, BLOCK_SAMPLES // spec.batch_size) if deferred else 1
    if deferred:
        optimizer = optax.identity()
    elif spec.optimizer == "sgd":
        optimizer = optax.trace(spec.momentum)
    else:
        optimizer = optax.scale_by_adam(spec.beta1, spec.beta2, ADAM_EPS)
    trials = _Trials(spec, optimizer, deferred, block_steps)
    return Program(
        block_steps, block_steps * spec.batch_size, jax.jit(trials.init, static_argnums=1), jax.jit(trials.raw),
        Compiled(jax.jit(trials.evaluate)), Compiled(jax.jit(trials.advance, donate_argnums=0)),
    )  # fmt: skip


class _Trials(NamedTuple):
    """Trials of one shape, as functions to be compiled. deferred: whether the first layer is updated once for a block."""

    spec: TrialSpec
    optimizer: optax.GradientTransformation
    deferred: bool
    block_steps: int

    def init(self, lanes: Lanes, num_points: int) -> State:
        seeds, width = lanes.scale.shape
        weights = tuple(jnp.repeat(weight, width, axis=1) for weight in lanes.initial)
        curve = jnp.zeros((seeds, width, num_points), lanes.scale.dtype)
        return State(weights, self.optimizer.init(weights), curve, jnp.zeros((seeds, width), jnp.int32))

    def raw(self, initial: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
        """Raw outputs at theta_0, (seed, B, out)."""
        return jnp.swapaxes(self._network(initial, x)[-1][:, 0], -1, -2)

    def evaluate(
        self, weights: tuple[jax.Array, ...], lanes: Lanes, x: jax.Array, y: jax.Array, counts: jax.Array
    ) -> dict[str, Any]:
        """Sums over the samples that count, (seed, lane); `alive` of those for which some unit of the last hidden layer is on,
        `change` of the layers' mean squares, (seed, lane, layer)."""
        outputs = self._network(weights, x)
        changes = [now - before for now, before in zip(outputs, self._network(lanes.initial, x), strict=True)]
        changes[-1] = changes[-1] * lanes.scale[..., None, None]
        labels = y.T[None, None]
        sums = {
            "loss": sample_losses(self.spec.loss, changes[-1], labels, axis=2) @ counts,
            "alive": jnp.any(outputs[-2] > 0, axis=2).astype(x.dtype) @ counts,
            "change": jnp.stack([jnp.mean(jnp.square(change), 2) @ counts for change in changes], -1),
        }
        if self.spec.task.kind == "images":
            right = jnp.argmax(changes[-1], axis=2) == jnp.argmax(labels, axis=2)
            sums["accuracy"] = right.astype(x.dtype) @ counts
        return sums

    def advance(
        self, state: State, lanes: Lanes, data: Data, indices: jax.Array, length: Length, first: jax.Array, count: jax.Array
    ) -> State:
        """Blocks `first` to `first + count`, until all trials have diverged."""

        def goes_on(carry: tuple) -> jax.Array:
            position, state = carry
            return (position < count) & jnp.any(state.diverged == 0)

        def body(carry: tuple) -> tuple:
            position, state = carry
            return position + 1, self._block(state, lanes, data, indices, length, position, first + position)

        return jax.lax.while_loop(goes_on, body, (jnp.zeros_like(count), state))[1]

    def _block(
        self, state: State, lanes: Lanes, data: Data, indices: jax.Array, length: Length, position: jax.Array, number: jax.Array
    ) -> State:
        """The block `number`, of at most block_steps steps."""
        first = number * self.block_steps
        x, y, before = self._samples(lanes, data, indices, position, first)
        z = jnp.einsum("scnd,sbd->scnb", state.weights[0], x)
        if self.deferred:
            return self._deferred(state, lanes, length, first, x, y, before, z)
        losses, (upper, dz) = self._gradients(list(state.weights[1:]), z, y, before, lanes.scale)
        gradient = (jnp.einsum("scnb,sbd->scnd", dz, x), *upper)
        updates, optimizer_state = self.optimizer.update(gradient, state.optimizer)
        weights = tuple(
            w - _of_lane(rate) * update for w, rate, update in zip(state.weights, lanes.rates, updates, strict=True)
        )
        return _record(state._replace(weights=weights, optimizer=optimizer_state), losses, first + 1, length)

    def _deferred(
        self, state: State, lanes: Lanes, length: Length, first: jax.Array, x: jax.Array, y: jax.Array, before: jax.Array,
        z: jax.Array,
    ) -> State:  # fmt: skip
        """The steps from `first` on of a block whose first layer, with the outputs z at its start, is updated at its end."""
        batch = self.spec.batch_size
        gram = jnp.einsum("sad,sbd->sab", x, x) if self.block_steps > 1 else None

        def step(k: jax.Array, carry: tuple) -> tuple:
            # moves: -rate dL/dz of the block's samples, 0 of those to come, (seed, lane, N, samples).
            state, upper, moves = carry
            own = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=k * batch, slice_size=batch, axis=-1)
            own_z = own(z)
            if gram is not None:
                own_z = own_z + jnp.einsum("scna,sab->scnb", moves, own(gram))
            losses, (gradient, dz) = self._gradients(upper, own_z, own(y), own(before), lanes.scale)
            upper = [w - _of_lane(rate) * g for w, rate, g in zip(upper, lanes.rates[1:], gradient, strict=True)]
            moves = jax.lax.dynamic_update_slice_in_dim(moves, -_of_lane(lanes.rates[0]) * dz, k * batch, axis=-1)
            return _record(state, losses, first + k + 1, length), upper, moves

        carry = (state, list(state.weights[1:]), jnp.zeros_like(z))
        if self.block_steps == 1:
            state, upper, moves = step(jnp.int32(0), carry)
        else:
            state, upper, moves = jax.lax.fori_loop(0, jnp.minimum(self.block_steps, length.total - first), step, carry)
        return state._replace(weights=(state.weights[0] + jnp.einsum("scnb,sbd->scnd", moves, x), *upper))

    def _samples(
        self, lanes: Lanes, data: Data, indices: jax.Array, position: jax.Array, first: jax.Array
    ) -> tuple[jax.Array, ...]:
        """x / sqrt(D), (seed, samples, D), y and the raw output at theta_0, (seed, out, samples), of a block."""
        if not self.spec.task.fresh:
            own = jax.lax.dynamic_index_in_dim(indices, position, 1, keepdims=False)
            known: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
            x, y = data.x.at[own].get(**known), data.y.at[own].get(**known)
            before = jax.vmap(lambda raw, own: raw.at[own].get(**known))(data.raw, own)
            return x, jnp.swapaxes(y, 1, 2), jnp.swapaxes(before, 1, 2)
        task, batch = self.spec.task, self.spec.batch_size
        assert isinstance(task, SyntheticTask)
        steps = first + jnp.arange(self.block_steps, dtype=first.dtype)
        x = jax.vmap(lambda seed: fresh_inputs(data.key, seed, steps, batch, task.input_dim, lanes.scale.dtype))(lanes.seed)
        y = jax.vmap(lambda x: task.label(data.teacher, x).T)(x)
        x = x / math.sqrt(task.input_dim)
        before = jax.vmap(lambda weights, x: self._network([w[None] for w in weights], x)[-1][0, 0])(lanes.initial, x)
        return x, y, before

    def _network(self, weights: Sequence[jax.Array], x: jax.Array) -> list[jax.Array]:
        """Outputs of the layers, (seed, lane, units, B), of x / sqrt(D), (B, D)."""
        z = jnp.einsum("scnd,bd->scnb", weights[0], x)
        return jax.vmap(jax.vmap(upper_layers))(list(weights[1:]), z)

    def _mean_loss(self, upper: list[jax.Array], z: jax.Array, y: jax.Array, before: jax.Array, scale: jax.Array) -> jax.Array:
        """Of one trial and minibatch: z, (N, B), of the first layer; y and the raw output at theta_0, (out, B)."""
        prediction = scale * (upper_layers(upper, z)[-1] - before)
        return jnp.mean(sample_losses(self.spec.loss, prediction, y, axis=0))

    def _gradients(
        self, upper: list[jax.Array], z: jax.Array, y: jax.Array, before: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, tuple[list[jax.Array], jax.Array]]:
        """Losses, (seed, lane), and their gradients in the upper layers' weights and in z; y and before are of each seed."""
        of_lanes = jax.vmap(jax.value_and_grad(self._mean_loss, (0, 1)), (0, 0, None, None, 0))
        return jax.vmap(of_lanes)(upper, z, y, before, scale)


def _record(state: State, losses: jax.Array, step: jax.Array, length: Length) -> State:
    """Adds the losses of a step, counted from 1, to their point's mean."""
    point = jnp.sum(length.points < step, dtype=jnp.int32)
    since = jnp.where(point > 0, length.points[point - 1], 0)
    curve = state.curve.at[..., point].add(losses / (length.points[point] - since).astype(losses.dtype))
    diverged = jnp.where((state.diverged == 0) & ~jnp.isfinite(losses), step, state.diverged)
    return state._replace(curve=curve, diverged=diverged)


def _of_lane(numbers: jax.Array) -> jax.Array:
    """Numbers of lanes in a form that multiplies weights."""
    return numbers[..., None, None]


def fresh_inputs(task_seed: Any, seed: Any, steps: jax.Array, size: int, dim: int, dtype: Any) -> jax.Array:
    """New inputs x ~ N(0, I_D) of each of the `steps`, (steps * size, dim)."""
    key = jax.random.fold_in(random.key(task_seed), seed)
    return jax.vmap(lambda step: random.normal(jax.random.fold_in(key, step), (size, dim), dtype))(steps).reshape(-1, dim)
