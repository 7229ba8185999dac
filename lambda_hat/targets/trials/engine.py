"""Training of many trials at once: one compiled loop over the steps, side by side over seeds, rates and richnesses."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lambda_hat.compute.chunks import Pace, Progress, no_progress, num_cores, run_in_chunks
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.target import Params, Save, Unfinished, num_params
from lambda_hat.targets.trials.loss import sample_losses
from lambda_hat.targets.trials.network import init_params, to_weights
from lambda_hat.targets.trials.program import Data, Lanes, Length, Program, State, make_program, program_key
from lambda_hat.targets.trials.task import SyntheticTask, TaskData

if TYPE_CHECKING:
    from lambda_hat.targets.trials.spec import TrialSpec

#: Bytes of the weights that are trained together on a core of a CPU; many more would not stay in its caches.
CACHE_BYTES = 2**22
#: Indices of minibatches that a device call holds.
MAX_INDICES = 2**20
#: Trainings of up to so many steps are one program.
MIN_STEPS = 2**16
#: Samples that are evaluated at a time.
EVALUATION_SIZE = 1024

#: How training fails, the first that holds. diverged: a loss is not finite. dead: at the end the network is off for nearly all
#: training samples: no unit of its last hidden layer is on, so that their gradients are exactly zero and f is 0 there whatever
#: the label. above start: the final loss is above that at the start, of predicting 0, by more than rounding.
Failure = Literal["diverged", "dead", "above start"]
#: The share of training samples for which a dead network may still be on: it has not learned the others.
ALIVE = 0.05
#: Rounding of a mean loss, in units of the precision's epsilon.
ROUNDING = 16


class End(NamedTuple):
    """Where a longer training of the same course goes on: after `step` steps, in whole blocks of them (`Program.block_steps`).

    curve: of the points so far, (P,). leaves: of the weights, the optimizer's state and `diverged` of one lane.
    """

    step: int
    curve: np.ndarray
    leaves: list[np.ndarray]


class TrialResult(NamedTuple):
    """A trained trial.

    params: on the host, NaN where it diverged. steps: (P,), of the points of the loss curve, ascending, the last the number of
    steps. losses: (P,), at each the mean of the minibatches' losses, each before its update, of all steps since the previous
    point; NaN from the divergence on. diverged_at_step: the first step, counted from 1, whose loss is not finite, or None.
    failure: see `Failure`; None of a trial that trained.
    metrics: final_loss and test_loss, means over all n_data and test samples; start_loss, that of predicting 0, as at theta_0,
      over the n_data samples; for images train_accuracy and test_accuracy;
      num_params, num_data; activation_change, for each layer the root mean square, over training samples and units, of the
      change of its output since theta_0 (hidden layers after the relu, last the centred prediction). NaN where it diverged.
    end: at the last block that is whole. seconds: of the call, over its trials.
    """

    spec: TrialSpec
    params: Params
    steps: np.ndarray
    losses: np.ndarray
    diverged_at_step: int | None
    failure: Failure | None
    metrics: dict[str, Any]
    end: End
    seconds: float


def train_trials(
    specs: Sequence[TrialSpec], progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None,
    ends: Sequence[End] | None = None,
) -> list[TrialResult]:  # fmt: skip
    """Trains trials that differ in eta, richness and seed only, in one program.

    Args:
      resume, save: see `TargetSpec.build`. A resumed call gives bit for bit the numbers of an uninterrupted one with the same
        specs.
      ends: for each spec, where a shorter training of its course ended, all at one step: it goes on from there, and if the same
        trials in the same order were trained together then, to the bits of a training from the start; else to its numbers but
        for rounding. Ends that do not fit are ignored.

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
        return _train_trials(specs, spec, progress, resume, save, ends)


def _train_trials(
    specs: Sequence[TrialSpec], spec: TrialSpec, progress: Progress, resume: Unfinished | None, save: Save | None,
    ends: Sequence[End] | None,
) -> list[TrialResult]:  # fmt: skip
    began = time.perf_counter()
    data = spec.task.load(spec.precision)
    groups = _groups(specs)
    program = make_program(program_key(spec))
    lanes = [_lanes([[specs[index] for index in row] for row in group]) for group in groups]
    datas = _device_data(spec, program, lanes, data)
    points = whole_points(max(spec.total_steps, MIN_STEPS), spec.points_per_doubling)
    length = Length(np.int32(spec.total_steps), points.astype(np.int32))
    states = [program.init(own, len(points)) for own in lanes]
    num_blocks, num_whole = -(-spec.total_steps // program.block_steps), spec.total_steps // program.block_steps
    start = 0
    if ends is not None and (restored := _from_ends(states, groups, ends)) is not None:
        known, rest = divmod(ends[0].step, program.block_steps)
        if rest == 0 and known <= num_whole:
            states, start = restored, known
    if resume is not None and resume.step > start * program.block_steps and (saved := resume.restore(states)) is not None:
        states, start = saved, resume.step // program.block_steps
    buffer_blocks = max(1, MAX_INDICES // program.block_samples)
    threads = ThreadPoolExecutor(num_cores())

    def advance(states: list[State], first: int, count: int) -> list[State]:
        indices = {seed: _block_indices(spec, program, seed, first, count, buffer_blocks) for seed in {s.seed for s in specs}}
        calls = []
        for state, own, own_data in zip(states, lanes, datas, strict=True):
            of_seeds = np.stack([indices[int(seed)] for seed in own.seed])
            arguments = (state, own, own_data, of_seeds, length, np.int32(first), np.int32(count))
            calls.append(functools.partial(program.advance.prepare(len(groups) > 1, *arguments), *arguments))
        return list(threads.map(lambda call: jax.block_until_ready(call()), calls))

    pace = Pace()

    def after_chunk(states: list[State], done: int) -> None:
        if save is not None and done < num_blocks:
            leaves = jax.tree.leaves(states)
            pace(lambda: save(Unfinished(done * program.block_steps, [np.array(leaf) for leaf in leaves], {})))
        diverged = sum(int(np.count_nonzero(state.diverged)) for state in states)
        total = sum(state.diverged.size for state in states)
        steps_done = min(done * program.block_steps, spec.total_steps)
        progress(steps_done, spec.total_steps, "steps", f"{diverged} of {total} diverged")

    with threads:
        states = run_in_chunks(advance, states, start, num_whole, after_chunk, buffer_blocks)
        whole = jax.tree.map(np.array, states)  # copies: `advance` takes the states themselves
        states = run_in_chunks(advance, states, num_whole, num_blocks, after_chunk, buffer_blocks)
        measured = [_measure(program, state.weights, own, data, threads) for state, own in zip(states, lanes, strict=True)]
    start_loss = _start_loss(spec, data)
    seconds = (time.perf_counter() - began) / len(specs)
    results: dict[int, TrialResult] = {}
    for group, state, at_end, of_group in zip(groups, states, whole, measured, strict=True):
        host = jax.tree.map(np.asarray, state)
        for row, lane in np.ndindex(host.diverged.shape):
            index = group[row][lane]
            metrics = {name: values[row, lane].tolist() for name, values in of_group.items()}
            weights = [weight[row, lane] for weight in host.weights]
            end = _end(at_end, row, lane, num_whole * program.block_steps)
            losses, diverged = host.curve[row, lane], int(host.diverged[row, lane])
            results[index] = _result(specs[index], weights, points, losses, diverged, metrics, start_loss, end, seconds)
    return [results[index] for index in range(len(specs))]


def _carried(state: State) -> Any:
    """What a training carries on besides its curve."""
    return state.weights, state.optimizer, state.diverged


def _end(state: State, row: int, lane: int, step: int) -> End:
    """Of one lane of a state on the host."""
    leaves = [leaf[row, lane] if leaf.ndim else leaf for leaf in jax.tree.leaves(_carried(state))]
    return End(step, np.asarray(state.curve[row, lane]), leaves)


def _from_ends(states: list[State], groups: list[list[list[int]]], ends: Sequence[End]) -> list[State] | None:
    """States like these, of groups of trials, at the step at which all trials ended; None where they do not fit."""
    expected = [(leaf.shape[2:], leaf.dtype) for leaf in jax.tree.leaves(_carried(states[0]))]
    for end in ends:
        fits = [(leaf.shape, leaf.dtype) for leaf in end.leaves] == expected and len(end.curve) <= states[0].curve.shape[-1]
        if not fits or end.step != ends[0].step:
            return None
    restored = []
    for state, group in zip(states, groups, strict=True):
        leaves, structure = jax.tree.flatten(_carried(state))
        for place, leaf in enumerate(leaves):
            own = np.array([[ends[index].leaves[place] for index in row] for row in group])
            # A count of updates, of which groups that diverged as a whole did fewer.
            leaves[place] = own if leaf.ndim else own.max()
        curve = np.zeros(state.curve.shape, state.curve.dtype)
        for row, lane in np.ndindex(curve.shape[:2]):
            end = ends[group[row][lane]]
            curve[row, lane, : len(end.curve)] = end.curve
        weights, optimizer, diverged = jax.tree.unflatten(structure, jax.device_put(leaves))
        restored.append(State(weights, optimizer, jax.device_put(curve), diverged))
    return restored


def _result(
    spec: TrialSpec, weights: list[np.ndarray], points: np.ndarray, curve: np.ndarray, diverged: int, metrics: dict[str, Any],
    start_loss: float, end: End, seconds: float,
) -> TrialResult:  # fmt: skip
    """A trial's result; it also diverged if its last update did."""
    if not diverged and not np.isfinite(metrics["final_loss"]):
        diverged = spec.total_steps
    failure = _failure(spec, bool(diverged), metrics.pop("alive"), start_loss, metrics["final_loss"])
    steps = point_steps(spec.total_steps, spec.points_per_doubling)
    losses = np.array(curve[: len(steps)])
    # The last point may end before it would in a longer training.
    before = steps[-2] if len(steps) > 1 else 0
    losses[-1] *= (points[len(steps) - 1] - before) / (steps[-1] - before)
    if diverged:
        weights = [np.full_like(weight, np.nan) for weight in weights]
        metrics = {name: [np.nan] * spec.depth if isinstance(value, list) else np.nan for name, value in metrics.items()}
        losses[steps >= diverged] = np.nan
    params = {f"layer_{layer}": {"w": np.ascontiguousarray(weight.T)} for layer, weight in enumerate(weights)}
    metrics |= {"start_loss": start_loss, "num_params": num_params(params), "num_data": spec.num_data}
    end = end._replace(curve=end.curve[: np.searchsorted(points, end.step) + 1])
    return TrialResult(spec, params, steps, losses, diverged or None, failure, metrics, end, seconds)


def _start_loss(spec: TrialSpec, data: TaskData) -> float:
    """The mean loss of predicting 0 for all training samples, in float64."""
    with jax.enable_x64(True):
        y = jnp.asarray(data.y, jnp.float64)
        return float(jnp.mean(sample_losses(spec.loss, jnp.zeros_like(y), y, axis=1)))


def _failure(spec: TrialSpec, diverged: bool, alive: float, start: float, final: float) -> Failure | None:
    """See `Failure`; `alive`: the share of the training samples for which some unit of the last hidden layer is on."""
    if diverged:
        return "diverged"
    if alive <= ALIVE and final > 0:
        return "dead"
    return "above start" if final > start * (1 + ROUNDING * np.finfo(spec.precision).eps) else None


def point_steps(total_steps: int, per_doubling: int) -> np.ndarray:
    """Steps of the points of a loss curve, ascending, the last `total_steps`; the others are those of a longer training too."""
    steps = whole_points(total_steps, per_doubling)
    return np.append(steps[steps < total_steps], total_steps)


def whole_points(total_steps: int, per_doubling: int) -> np.ndarray:
    """Steps 1, 2, ... 2 `per_doubling`, and from each 2^k `per_doubling` to the next as many evenly spaced ones, until the last
    is `total_steps` or more."""
    parts, end, every = [np.arange(1, 2 * per_doubling + 1)], 2 * per_doubling, 1
    while end < total_steps:
        every *= 2
        parts.append(end + every * np.arange(1, per_doubling + 1))
        end *= 2
    return np.concatenate(parts)


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


def _block_indices(spec: TrialSpec, program: Program, seed: int, first: int, count: int, buffer_blocks: int) -> np.ndarray:
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
        most = max(1, min(CACHE_BYTES // size, -(-len(specs) // num_cores())))
    else:
        most = len(by_seed) * longest
    width = -(-longest // -(-longest // most))
    rows = [indices[i : i + width] for indices in by_seed.values() for i in range(0, len(indices), width)]
    rows = [row + row[-1:] * (width - len(row)) for row in rows]
    height = -(-len(rows) // -(-len(rows) // max(1, most // width)))
    rows += rows[-1:] * (-len(rows) % height)
    return [rows[i : i + height] for i in range(0, len(rows), height)]


def _lanes(group: list[list[TrialSpec]]) -> Lanes:
    spec = group[0][0]
    dtype = np.dtype(spec.precision)
    numbers = np.asarray([[(trial.scale, *trial.rates) for trial in row] for row in group]).astype(dtype)
    initial = [to_weights(init_params((row[0].seed, 0), spec.widths, spec.precision)) for row in group]
    lanes = Lanes(
        numbers[..., 0],
        tuple(numbers[..., 1 + layer] for layer in range(spec.depth)),
        tuple(np.stack(weights)[:, None] for weights in zip(*initial, strict=True)),
        np.asarray([row[0].seed for row in group], np.uint32),
    )
    return jax.device_put(lanes)


def _device_data(spec: TrialSpec, program: Program, lanes: list[Lanes], data: TaskData) -> list[Data]:
    if isinstance(spec.task, SyntheticTask) and spec.task.fresh:
        nothing = np.zeros((0, 1), spec.precision)
        teacher = jax.device_put(jax.tree.map(lambda leaf: leaf.astype(spec.precision), spec.task.teacher()))
        return [Data(nothing, nothing, nothing, np.uint32(spec.task.seed), teacher)] * len(lanes)
    x, datas = _scaled(data.x), []
    on_device = jax.device_put(Data(x, data.y, None, np.uint32(0), None))
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
    program: Program, weights: tuple[jax.Array, ...], lanes: Lanes, data: TaskData, threads: ThreadPoolExecutor
) -> dict[str, np.ndarray]:
    """See `TrialResult.metrics`, and `alive` of `_failure`; arrays (seed, lane) or (seed, lane, layer)."""

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
    measures = {"final_loss": train["loss"], "test_loss": test["loss"], "alive": train["alive"]}
    if "accuracy" in train:
        measures |= {"train_accuracy": train["accuracy"], "test_accuracy": test["accuracy"]}
    return measures | {"activation_change": np.sqrt(train["change"])}
