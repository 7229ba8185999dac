"""Training of many trials at once: one compiled loop over the steps, side by side over seeds, rates and richnesses.

Trials of one seed see the same minibatches, so the product of the first layer's weights with the inputs, most of the work,
is one matrix product for all of them. With plain SGD that layer is updated once for a block of steps. Within the block its
outputs are

  W_t x_t = W_0 x_t + sum_{s<t} (-rate dL_s/dz_s) (x_s . x_t),

which is the same arithmetic in another order, and reads and writes the weights once a block instead of once a step.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lambda_hat import random
from lambda_hat.chunks import Progress, no_progress, run_in_chunks
from lambda_hat.spec import InvalidInput
from lambda_hat.target import Params, Save, Unfinished, num_params
from lambda_hat.trials.network import init_params, to_weights, upper_layers
from lambda_hat.trials.spec import TrialSpec, sample_losses
from lambda_hat.trials.task import SyntheticTask, TaskData

#: Samples of a block of steps whose first layer is updated together, at most; so many or one step.
BLOCK_SAMPLES = 64
#: Bytes of the weights that are trained together on a core of a CPU; many more would not stay in its caches.
CACHE_BYTES = 2**22
#: Indices of minibatches that a device call holds.
MAX_INDICES = 2**20
#: Samples that are evaluated at a time.
EVALUATION_SIZE = 1024


class TrialResult(NamedTuple):
    """A trained trial.

    params: on the host, NaN where it diverged. steps: (P,), of the points of the loss curve, ascending, the last the number of
    steps. losses: (P,), at each the mean of the minibatches' losses, each before its update, of all steps since the previous
    point; NaN from the divergence on. diverged_at_step: the first step, counted from 1, whose loss is not finite, or None.
    metrics: final_loss and test_loss, means over all n_data and test samples; for images train_accuracy and test_accuracy;
      num_params, num_data; activation_change, for each layer the root mean square, over training samples and units, of the
      change of its output since theta_0 (hidden layers after the relu, last the centred prediction). NaN where it diverged.
    seconds: of the call, over its trials.
    """

    spec: TrialSpec
    params: Params
    steps: np.ndarray
    losses: np.ndarray
    diverged_at_step: int | None
    metrics: dict[str, Any]
    seconds: float


class _Lanes(NamedTuple):
    """Numbers of a group of trials, (seed, lane); the seeds' initial weights, (seed, 1, out, in); the seeds, (seed,)."""

    scale: Any
    rates: tuple[Any, ...]
    initial: tuple[Any, ...]
    seed: Any


class _Data(NamedTuple):
    """Training data on the device: x / sqrt(D), (n, D), y, (n, out); raw outputs at theta_0 of the seeds, (seed, n, out). Fresh
    data are drawn by the task's seed and labelled by its teacher."""

    x: Any
    y: Any
    raw: Any
    key: Any
    teacher: Any


class _State(NamedTuple):
    """What the loop carries. curve: (point, seed, lane). diverged: (seed, lane), the step, or 0."""

    weights: tuple[jax.Array, ...]  # (seed, lane, out, in)
    optimizer: Any
    curve: jax.Array
    diverged: jax.Array


def train_trials(
    specs: Sequence[TrialSpec], progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None
) -> list[TrialResult]:
    """Trains trials that differ in eta, richness and seed only, in one program.

    Args:
      resume, save: see `TargetSpec.build`. A resumed call gives bit for bit the numbers of an uninterrupted one with the same
        specs.

    Returns:
      One result for each spec, in order. A trial's numbers do not depend on the others but for rounding, and one that
      diverges is a result too.

    Raises:
      InvalidInput: the specs differ in something else.
    """
    if not specs:
        return []
    spec = specs[0].static()
    if different := next((other for other in specs if other.static() != spec), None):
        fields = [name for name, value in different.static() if value != getattr(spec, name)]
        raise InvalidInput(
            "Trials that are trained together may differ in eta, richness and seed only; these differ in "
            f"{', '.join(fields)}. Group them by TrialSpec.static()."
        )
    # On GPUs JAX would multiply float32 matrices in TF32, ten bits of mantissa: a small loss would be noise.
    with jax.enable_x64(spec.precision == "float64"), jax.default_matmul_precision("highest"):
        return _train_trials(specs, spec, progress, resume, save)


def _train_trials(
    specs: Sequence[TrialSpec], spec: TrialSpec, progress: Progress, resume: Unfinished | None, save: Save | None
) -> list[TrialResult]:
    began = time.perf_counter()
    data = spec.task.load(spec.precision)
    groups = _groups(specs)
    program = _program(_shape(spec))
    lanes = [_lanes([[specs[index] for index in row] for row in group]) for group in groups]
    datas = _device_data(spec, program, lanes, data)
    steps = point_steps(spec.total_steps, spec.num_points)
    length = _Length(np.int32(spec.total_steps), np.pad(steps, (0, spec.num_points - len(steps)), mode="edge").astype(np.int32))
    states = [program.init(own, spec.num_points) for own in lanes]
    num_blocks = -(-spec.total_steps // program.block_steps)
    start = 0
    if resume is not None and _fits(resume, states):
        start = resume.step // program.block_steps
        states = jax.device_put(jax.tree.unflatten(jax.tree.structure(states), resume.leaves))
    buffer_blocks = max(1, MAX_INDICES // program.block_samples)
    threads = ThreadPoolExecutor(_num_cores())

    def advance(states: list[_State], first: int, count: int) -> list[_State]:
        indices = {seed: _block_indices(spec, program, seed, first, count, buffer_blocks) for seed in {s.seed for s in specs}}
        calls = []
        for state, own, own_data in zip(states, lanes, datas, strict=True):
            of_seeds = np.stack([indices[int(seed)] for seed in own.seed])
            arguments = (state, own, own_data, of_seeds, length, np.int32(first), np.int32(count))
            calls.append(functools.partial(program.advance.prepare(len(groups) > 1, *arguments), *arguments))
        return list(threads.map(lambda call: jax.block_until_ready(call()), calls))

    saved = save_seconds = 0.0

    def after_chunk(states: list[_State], done: int) -> None:
        nonlocal saved, save_seconds
        now = time.perf_counter()
        if save is not None and done < num_blocks and now - saved > 10 * save_seconds:
            save(Unfinished(done * program.block_steps, [np.array(leaf) for leaf in jax.tree.leaves(states)], {}))
            saved = time.perf_counter()
            save_seconds = saved - now
        diverged = sum(int(np.count_nonzero(state.diverged)) for state in states)
        total = sum(state.diverged.size for state in states)
        steps_done = min(done * program.block_steps, spec.total_steps)
        progress(steps_done, spec.total_steps, "steps", f"{diverged} of {total} diverged")

    with threads:
        states = run_in_chunks(advance, states, start, num_blocks, after_chunk, buffer_blocks)
        measured = [_measure(program, state.weights, own, data, threads) for state, own in zip(states, lanes, strict=True)]
    seconds = (time.perf_counter() - began) / len(specs)
    results: dict[int, TrialResult] = {}
    for group, state, of_group in zip(groups, states, measured, strict=True):
        host = jax.tree.map(np.asarray, state)
        for row, lane in np.ndindex(host.diverged.shape):
            index = group[row][lane]
            metrics = {name: values[row, lane].tolist() for name, values in of_group.items()}
            weights = [weight[row, lane] for weight in host.weights]
            losses, diverged = host.curve[: len(steps), row, lane], int(host.diverged[row, lane])
            results[index] = _result(specs[index], weights, steps, losses, diverged, metrics, seconds)
    return [results[index] for index in range(len(specs))]


def _result(
    spec: TrialSpec, weights: list[np.ndarray], steps: np.ndarray, losses: np.ndarray, diverged: int, metrics: dict[str, Any],
    seconds: float,
) -> TrialResult:  # fmt: skip
    """A trial's result; it also diverged if its last update did."""
    if not diverged and not np.isfinite(metrics["final_loss"]):
        diverged = spec.total_steps
    losses = np.array(losses)
    if diverged:
        weights = [np.full_like(weight, np.nan) for weight in weights]
        metrics = {name: [np.nan] * spec.depth if isinstance(value, list) else np.nan for name, value in metrics.items()}
        losses[steps >= diverged] = np.nan
    params = {f"layer_{layer}": {"w": np.ascontiguousarray(weight.T)} for layer, weight in enumerate(weights)}
    metrics |= {"num_params": num_params(params), "num_data": spec.num_data}
    return TrialResult(spec, params, steps, losses, diverged or None, metrics, seconds)


def point_steps(total_steps: int, num_points: int) -> np.ndarray:
    """Steps of the points of a loss curve, ascending, the last `total_steps`: half of them log-spaced, half evenly spaced.

    At most num_points, where those that round alike are one; all steps where there are no more.
    """
    if total_steps <= num_points:
        return np.arange(1, total_steps + 1)
    even = np.linspace(total_steps, 0, num_points - num_points // 2, endpoint=False)
    log = np.geomspace(1, total_steps, num_points // 2)
    return np.unique(np.ceil(np.concatenate([even, log]) - 1e-6).astype(np.int64))


def batch_indices(spec: TrialSpec, seed: int, start: int, count: int) -> np.ndarray:
    """Samples of the minibatches of `count` steps from `start` on, (count, B), int32.

    Each epoch is a new permutation of the data, of which the last n mod B are left out.
    """
    n, size = spec.num_data, spec.batch_size
    per_epoch = n // size
    first, last = start // per_epoch, -(-(start + count) // per_epoch)
    epochs = [
        np.random.default_rng((seed, 1, epoch)).permutation(n)[: per_epoch * size].reshape(per_epoch, size)
        for epoch in range(first, last)
    ]
    skipped = start - first * per_epoch
    return np.concatenate(epochs)[skipped : skipped + count].astype(np.int32)


def _block_indices(spec: TrialSpec, program: _Program, seed: int, first: int, count: int, buffer_blocks: int) -> np.ndarray:
    """Those of blocks, (buffer_blocks, samples of a block), the first `count` of them filled; none of fresh data."""
    if spec.task.fresh:
        return np.zeros((0, program.block_samples), np.int32)
    blocks = np.zeros((buffer_blocks, program.block_samples), np.int32)
    blocks[:count] = batch_indices(spec, seed, first * program.block_steps, count * program.block_steps).reshape(count, -1)
    return blocks


def _groups(specs: Sequence[TrialSpec]) -> list[list[list[int]]]:
    """Indices of the trials that are trained side by side: groups of rows, each of trials of one seed.

    All groups have as many rows and all rows are as long: the last trial of a shorter row, the last row, are repeated.
    """
    by_seed: dict[int, list[int]] = {}
    for index, spec in enumerate(specs):
        by_seed.setdefault(spec.seed, []).append(index)
    longest = max(map(len, by_seed.values()))
    if jax.default_backend() == "cpu":
        copies = {"sgd": 1 if specs[0].momentum == 0 else 2, "adam": 3}[specs[0].optimizer]
        size = sum(a * b for a, b in itertools.pairwise(specs[0].widths)) * np.dtype(specs[0].precision).itemsize * copies
        most = max(1, min(CACHE_BYTES // size, -(-len(specs) // _num_cores())))
    else:
        most = len(by_seed) * longest
    width = -(-longest // -(-longest // most))
    rows = [indices[i : i + width] for indices in by_seed.values() for i in range(0, len(indices), width)]
    rows = [row + row[-1:] * (width - len(row)) for row in rows]
    height = -(-len(rows) // -(-len(rows) // max(1, most // width)))
    rows += rows[-1:] * (-len(rows) % height)
    return [rows[i : i + height] for i in range(0, len(rows), height)]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lanes(group: list[list[TrialSpec]]) -> _Lanes:
    spec = group[0][0]
    dtype = np.dtype(spec.precision)
    numbers = np.asarray([[(trial.scale, *trial.rates) for trial in row] for row in group]).astype(dtype)
    initial = [to_weights(init_params((row[0].seed, 0), spec.widths, spec.precision)) for row in group]
    lanes = _Lanes(
        numbers[..., 0],
        tuple(numbers[..., 1 + layer] for layer in range(spec.depth)),
        tuple(np.stack(weights)[:, None] for weights in zip(*initial, strict=True)),
        np.asarray([row[0].seed for row in group], np.uint32),
    )
    return jax.device_put(lanes)


def _device_data(spec: TrialSpec, program: _Program, lanes: list[_Lanes], data: TaskData) -> list[_Data]:
    if isinstance(spec.task, SyntheticTask) and spec.task.fresh:
        nothing = np.zeros((0, 1), spec.precision)
        teacher = jax.device_put(jax.tree.map(lambda leaf: leaf.astype(spec.precision), spec.task.teacher()))
        return [_Data(nothing, nothing, nothing, np.uint32(spec.task.seed), teacher)] * len(lanes)
    x, datas = _scaled(data.x), []
    on_device = jax.device_put(_Data(x, data.y, None, np.uint32(0), None))
    raw: dict[tuple[int, ...], Any] = {}
    for own in lanes:
        seeds = tuple(np.asarray(own.seed).tolist())
        if seeds not in raw:
            parts = [
                np.asarray(program.raw(own.initial, x[i : i + EVALUATION_SIZE])) for i in range(0, len(x), EVALUATION_SIZE)
            ]
            raw[seeds] = jax.device_put(np.concatenate(parts, axis=1))
        datas.append(on_device._replace(raw=raw[seeds]))
    return datas


def _scaled(x: np.ndarray) -> np.ndarray:
    """x / sqrt(D), which the first layer takes."""
    return x / np.sqrt(x.shape[-1]).astype(x.dtype)


def _measure(
    program: _Program, weights: tuple[jax.Array, ...], lanes: _Lanes, data: TaskData, threads: ThreadPoolExecutor
) -> dict[str, np.ndarray]:
    """See `TrialResult.metrics`; arrays (seed, lane) or (seed, lane, layer)."""

    def sums(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        size = min(max(len(data.x), len(data.x_test)), EVALUATION_SIZE)

        def part(start: int) -> tuple:
            """A part of the samples, filled up to `size` with samples that do not count."""
            own = [np.pad(array[start : start + size], ((0, max(start + size - len(x), 0)), (0, 0))) for array in (x, y)]
            counts = (np.arange(start, start + size) < len(x)).astype(x.dtype)
            return weights, lanes, _scaled(own[0]), own[1], counts

        evaluate = program.evaluate.prepare(True, *part(0))

        def of_part(start: int) -> dict[str, np.ndarray]:
            with jax.enable_x64(x.dtype == np.float64):  # a thread has settings of its own
                return jax.device_get(evaluate(*part(start)))

        parts = threads.map(of_part, range(0, len(x), size))
        return jax.tree.map(lambda *values: np.sum(values, axis=0, dtype=np.float64) / len(x), *parts)

    train, test = sums(data.x, data.y), sums(data.x_test, data.y_test)
    measures = {"final_loss": train["loss"], "test_loss": test["loss"]}
    if "accuracy" in train:
        measures |= {"train_accuracy": train["accuracy"], "test_accuracy": test["accuracy"]}
    return measures | {"activation_change": np.sqrt(train["change"])}


def _fits(unfinished: Unfinished, states: list[_State]) -> bool:
    """Whether a saved state has the shapes and dtypes of this program's; that of other trials may not."""
    expected = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(states)]
    return expected == [(leaf.shape, leaf.dtype) for leaf in unfinished.leaves]


def _shape(spec: TrialSpec) -> TrialSpec:
    """What the compiled program depends on: the spec with everything at fixed values that is traced."""
    task = spec.task.model_copy(update={"n_data": 2**40, "n_test": 1} | ({"seed": 0} if hasattr(spec.task, "seed") else {}))
    fixed = {"task": task, "num_steps": 1, "num_epochs": None, "rate_rule": "raw", "num_points": 1, "parameterization": "sp"}
    return spec.static().model_copy(update=fixed)


class _Compiled:
    """A jitted function that worker threads may call: compiled by the main one, since threads do not share JAX's settings.

    On CPUs with the widest vectors there are, where LLVM would choose half of them.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.programs: dict[Any, Any] = {}

    def prepare(self, single: bool, *arguments: Any) -> Callable[..., Any]:
        """The program for arguments like these; `single`: its matrix products keep to the thread that calls it, on CPUs."""
        leaves, structure = jax.tree.flatten(arguments)
        key = (single, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self.programs:
            on_cpu = jax.default_backend() == "cpu"
            options = {"xla_cpu_prefer_vector_width": "512", "xla_cpu_multi_thread_eigen": not single} if on_cpu else {}
            self.programs[key] = self.function.lower(*arguments).compile(compiler_options=options)
        return self.programs[key]


class _Length(NamedTuple):
    """Number of steps, and the steps of the points of the curve, ascending, the last repeated to the length of the curve."""

    total: Any
    points: Any


class _Program(NamedTuple):
    """The compiled functions. block_steps, block_samples: of a block."""

    block_steps: int
    block_samples: int
    init: Callable[..., _State]
    raw: Callable[..., jax.Array]
    evaluate: _Compiled
    advance: _Compiled


@functools.lru_cache(maxsize=64)
def _program(spec: TrialSpec) -> _Program:
    """Of trials of this shape; all numbers are traced."""
    batch = spec.batch_size
    deferred = spec.optimizer == "sgd" and spec.momentum == 0
    block_steps = max(1, BLOCK_SAMPLES // batch) if deferred else 1
    block_samples = block_steps * batch
    if deferred:
        optimizer = optax.identity()
    else:
        optimizer = optax.trace(spec.momentum) if spec.optimizer == "sgd" else optax.scale_by_adam(b1=spec.beta1, b2=spec.beta2)
    task = spec.task

    def network(weights: Sequence[jax.Array], x: jax.Array) -> list[jax.Array]:
        """Outputs of the layers, (seed, lane, units, B), of x / sqrt(D), (B, D)."""
        z = jnp.einsum("scnd,bd->scnb", weights[0], x)
        return jax.vmap(jax.vmap(upper_layers))(list(weights[1:]), z)

    @functools.partial(jax.jit, static_argnums=1)
    def init(lanes: _Lanes, num_points: int) -> _State:
        seeds, width = lanes.scale.shape
        weights = tuple(jnp.repeat(weight, width, axis=1) for weight in lanes.initial)
        curve = jnp.zeros((num_points, seeds, width), lanes.scale.dtype)
        return _State(weights, optimizer.init(weights), curve, jnp.zeros((seeds, width), jnp.int32))

    @jax.jit
    def raw(initial: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
        """Raw outputs at theta_0, (seed, B, out)."""
        return jnp.swapaxes(network(initial, x)[-1][:, 0], -1, -2)

    @jax.jit
    def evaluate(
        weights: tuple[jax.Array, ...], lanes: _Lanes, x: jax.Array, y: jax.Array, counts: jax.Array
    ) -> dict[str, Any]:
        """Sums over the samples that count, (seed, lane); `change` of the layers' mean squares, (seed, lane, layer)."""
        changes = [now - before for now, before in zip(network(weights, x), network(lanes.initial, x), strict=True)]
        changes[-1] = changes[-1] * lanes.scale[..., None, None]
        labels = y.T[None, None]
        sums = {
            "loss": sample_losses(spec.loss, changes[-1], labels, axis=2) @ counts,
            "change": jnp.stack([jnp.mean(jnp.square(change), 2) @ counts for change in changes], -1),
        }
        if task.kind == "images":
            right = jnp.argmax(changes[-1], axis=2) == jnp.argmax(labels, axis=2)
            sums["accuracy"] = right.astype(x.dtype) @ counts
        return sums

    def mean_loss(upper: list[jax.Array], z: jax.Array, y: jax.Array, before: jax.Array, scale: jax.Array) -> jax.Array:
        """Of one trial and minibatch: z, (N, B), of the first layer; y and the raw output at theta_0, (out, B)."""
        prediction = scale * (upper_layers(upper, z)[-1] - before)
        return jnp.mean(sample_losses(spec.loss, prediction, y, axis=0))

    gradients_of_lanes = jax.vmap(jax.value_and_grad(mean_loss, (0, 1)), (0, 0, None, None, 0))
    gradients = jax.vmap(gradients_of_lanes)

    def samples(lanes: _Lanes, data: _Data, indices: jax.Array, position: jax.Array, first: jax.Array) -> tuple[jax.Array, ...]:
        """x / sqrt(D), (seed, samples, D), y and the raw output at theta_0, (seed, out, samples), of a block."""
        if not task.fresh:
            own = jax.lax.dynamic_index_in_dim(indices, position, 1, keepdims=False)
            known: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
            x, y = data.x.at[own].get(**known), data.y.at[own].get(**known)
            before = jax.vmap(lambda raw, own: raw.at[own].get(**known))(data.raw, own)
            return x, jnp.swapaxes(y, 1, 2), jnp.swapaxes(before, 1, 2)
        assert isinstance(task, SyntheticTask)
        steps = first + jnp.arange(block_steps, dtype=first.dtype)
        x = jax.vmap(lambda seed: fresh_inputs(data.key, seed, steps, batch, task.input_dim, lanes.scale.dtype))(lanes.seed)
        y = jax.vmap(lambda x: task.label(data.teacher, x).T)(x)
        x = x / math.sqrt(task.input_dim)
        before = jax.vmap(lambda weights, x: network([w[None] for w in weights], x)[-1][0, 0])(lanes.initial, x)
        return x, y, before

    def record(state: _State, losses: jax.Array, step: jax.Array, length: _Length) -> _State:
        """Adds the losses of a step, counted from 1, to their point's mean."""
        point = jnp.sum(length.points < step, dtype=jnp.int32)
        since = jnp.where(point > 0, length.points[point - 1], 0)
        curve = state.curve.at[point].add(losses / (length.points[point] - since).astype(losses.dtype))
        diverged = jnp.where((state.diverged == 0) & ~jnp.isfinite(losses), step, state.diverged)
        return state._replace(curve=curve, diverged=diverged)

    def of_lane(numbers: jax.Array) -> jax.Array:
        return numbers[..., None, None]

    def block(
        state: _State, lanes: _Lanes, data: _Data, indices: jax.Array, length: _Length, position: jax.Array, number: jax.Array
    ) -> _State:
        """The block `number`, of at most block_steps steps."""
        first = number * block_steps
        x, y, before = samples(lanes, data, indices, position, first)
        z = jnp.einsum("scnd,sbd->scnb", state.weights[0], x)
        if not deferred:
            losses, (upper, dz) = gradients(list(state.weights[1:]), z, y, before, lanes.scale)
            gradient = (jnp.einsum("scnb,sbd->scnd", dz, x), *upper)
            updates, optimizer_state = optimizer.update(gradient, state.optimizer)
            weights = tuple(
                w - of_lane(rate) * update for w, rate, update in zip(state.weights, lanes.rates, updates, strict=True)
            )
            return record(state._replace(weights=weights, optimizer=optimizer_state), losses, first + 1, length)
        gram = jnp.einsum("sad,sbd->sab", x, x) if block_steps > 1 else None

        def step(k: jax.Array, carry: tuple) -> tuple:
            # moves: -rate dL/dz of the block's samples, 0 of those to come, (seed, lane, N, samples).
            state, upper, moves = carry
            own = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=k * batch, slice_size=batch, axis=-1)
            own_z = own(z)
            if gram is not None:
                own_z = own_z + jnp.einsum("scna,sab->scnb", moves, own(gram))
            losses, (gradient, dz) = gradients(upper, own_z, own(y), own(before), lanes.scale)
            upper = [w - of_lane(rate) * g for w, rate, g in zip(upper, lanes.rates[1:], gradient, strict=True)]
            moves = jax.lax.dynamic_update_slice_in_dim(moves, -of_lane(lanes.rates[0]) * dz, k * batch, axis=-1)
            return record(state, losses, first + k + 1, length), upper, moves

        carry = (state, list(state.weights[1:]), jnp.zeros_like(z))
        if block_steps == 1:
            state, upper, moves = step(jnp.int32(0), carry)
        else:
            state, upper, moves = jax.lax.fori_loop(0, jnp.minimum(block_steps, length.total - first), step, carry)
        return state._replace(weights=(state.weights[0] + jnp.einsum("scnb,sbd->scnd", moves, x), *upper))

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(
        state: _State, lanes: _Lanes, data: _Data, indices: jax.Array, length: _Length, first: jax.Array, count: jax.Array
    ) -> _State:
        """Blocks `first` to `first + count`, until all trials have diverged."""

        def goes_on(carry: tuple) -> jax.Array:
            position, state = carry
            return (position < count) & jnp.any(state.diverged == 0)

        def body(carry: tuple) -> tuple:
            position, state = carry
            return position + 1, block(state, lanes, data, indices, length, position, first + position)

        return jax.lax.while_loop(goes_on, body, (jnp.zeros_like(count), state))[1]

    return _Program(block_steps, block_samples, init, raw, _Compiled(evaluate), _Compiled(advance))


def fresh_inputs(task_seed: Any, seed: Any, steps: jax.Array, size: int, dim: int, dtype: Any) -> jax.Array:
    """New inputs x ~ N(0, I_D) of each of the `steps`, (steps * size, dim)."""
    key = jax.random.fold_in(random.key(task_seed), seed)
    return jax.vmap(lambda step: random.normal(jax.random.fold_in(key, step), (size, dim), dtype))(steps).reshape(-1, dim)
