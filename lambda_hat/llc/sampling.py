"""Sampling: runs in one program, in chunks of seconds for progress and resuming, their chains divided among the cores."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lambda_hat.compute.chunks import Pace, Progress, compile_clock, no_progress, num_cores, run_in_chunks
from lambda_hat.llc.program import Inputs, Lanes, Program, make_program
from lambda_hat.llc.trace import FIELDS, NUM_COORDINATES, Checkpoint, Trace, join
from lambda_hat.samplers.kinds import SamplerSpec
from lambda_hat.samplers.metric import Metric
from lambda_hat.samplers.posterior import PosteriorSpec, make_centre
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.full_data import compiled_losses
from lambda_hat.targets.selection import Selection, select
from lambda_hat.targets.target import OBSERVABLE_SIZE, TRAIN, Dataset, Objective, Params

#: Draws a device call can hold before they are moved to the host, and the bytes they may take.
BUFFER_DRAWS, BUFFER_BYTES = 1024, 2**26

#: Bytes of all chains' parameters that are sampled at once on CPUs: a step of a chain takes 1.4 times as long with many more.
CACHE_BYTES = 3 * 2**19

#: Vectors as long as the parameters that a step of a chain holds at most, with twice as much for data and activations; and the
#: memory of a GPU that does not tell.
STEP_VECTORS, GPU_BYTES = 64, 2**33


class Run(NamedTuple):
    """One of the runs that are sampled together."""

    posterior: PosteriorSpec
    sampler: SamplerSpec


def sample(
    objective: Objective,
    params_star: Params,
    dataset: Dataset,
    posterior: PosteriorSpec,
    sampler: SamplerSpec,
    *,
    metric: Metric = "euclidean",
    observables: Mapping[str, Dataset] | None = None,
    resume: Checkpoint | None = None,
    save: Callable[[Checkpoint], None] | None = None,
    progress: Progress = no_progress,
) -> Trace:
    """Draws from the local posterior around `params_star`: `sample_runs` for a single run."""
    return sample_runs(
        objective, params_star, dataset, [Run(posterior, sampler)], metric=metric, observables=observables,
        resume=None if resume is None else [resume],
        save=None if save is None else lambda checkpoints: save(checkpoints[0]), progress=progress,
    )[0]  # fmt: skip


def sample_runs(
    objective: Objective,
    params_star: Params,
    dataset: Dataset,
    runs: Sequence[Run],
    *,
    metric: Metric = "euclidean",
    observables: Mapping[str, Dataset] | None = None,
    resume: Sequence[Checkpoint] | None = None,
    lanes: tuple[Sequence[int], int] | None = None,
    save: Callable[[list[Checkpoint]], None] | None = None,
    progress: Progress = no_progress,
) -> list[Trace]:
    """Draws from local posteriors around `params_star`, in the dtype of its leaves, all runs in one program.

    Args:
      runs: they differ in numbers, seeds and observables only (`llc.run.batches`).
      metric: what posterior.metric = "auto" means.
      observables: the named datasets of all runs' `sampler.observables`, whose per-sample losses are recorded at every draw.
      resume: where an earlier, interrupted call got to, one for each run and with equally many draws; the result is the same as
        without the interruption. Checkpoints that do not fit this program are ignored.
      lanes: (each run's lane, number of lanes), by default one lane for each run in order. Other lanes repeat the first run. A
        device may round differently for other numbers of lanes, so a part of the runs is resumed in the lanes it had.
      save: receives the runs' checkpoints after a chunk, as often as saving takes at most a tenth of the time.

    Returns:
      The traces. A chain that diverges holds NaN from then on; it is never an error.

    Raises:
      InvalidInput: posterior.parameters do not fit the parameters, or an observable is not there.
    """
    names = sorted({name for run in runs for name in run.sampler.observables})
    found = {name: _observable(name, dataset, observables or {}) for name in names}
    places, num_lanes = lanes or (range(len(runs)), len(runs))
    dtype = jnp.dtype(jax.tree.leaves(params_star)[0].dtype)
    # On GPUs JAX would multiply float32 matrices in TF32, ten bits of mantissa: losses near zero would be noise.
    with jax.enable_x64(dtype == jnp.float64), jax.default_matmul_precision("highest"):
        clock = _Clock(len(runs))
        by_lane = [runs[list(places).index(lane)] if lane in places else runs[0] for lane in range(num_lanes)]
        selection = select(params_star, runs[0].posterior.parameters)
        inputs = _inputs(objective, params_star, dataset, by_lane, metric, found, selection)
        program = make_program(objective, runs[0].sampler.static(), selection, _buffer_draws(inputs))
        num_parts = _num_parts(runs[0].sampler.num_chains, num_lanes) if resume is None else resume[0].num_parts
        parts_of_chains = np.array_split(np.arange(len(inputs.chains)), num_parts)
        begun = _begin(program, inputs, resume, places, parts_of_chains, tuple(found))
        clock.spent |= begun.spent
        record = _Record(runs, places, num_lanes, num_parts, tuple(found), clock, begun.drawn, save, progress, inputs.lanes)
        _run(program, inputs, begun.parts, parts_of_chains, record)
        return _traces(record, {name: part.num_data for name, part in found.items()})


def _inputs(
    objective: Objective, params_star: Params, dataset: Dataset, by_lane: Sequence[Run], metric: Metric,
    observables: Mapping[str, Dataset], selection: Selection,
) -> Inputs:  # fmt: skip
    """The arguments of the compiled programs: what is computed once around w*, and the numbers of each lane."""
    posterior, sampler = by_lane[0]
    controls = getattr(sampler, "gradient", "plain") == "control_variates"
    metric = metric if posterior.metric == "auto" else posterior.metric
    centre = make_centre(objective, params_star, dataset, metric, selection, controls)
    dtype = centre.losses.dtype
    # No loss is called on no samples: not every one knows what to do with them.
    observed, observed_losses = None, jnp.zeros(0, dtype)
    if parts := [part.samples for part in observables.values()]:
        samples = jax.tree.map(lambda *x: jnp.concatenate([jnp.asarray(v) for v in x]), *parts)
        observed = Dataset(samples, centre.dataset.constants)
        observed_losses = compiled_losses(objective, centre.params_star, observed)
    tempered = {
        "nbeta": jnp.asarray([run.posterior.resolve_nbeta(dataset.num_data) for run in by_lane], dtype),
        "localization": jnp.asarray([run.posterior.localization for run in by_lane], dtype),
    }
    numbers = [run.sampler.numbers() for run in by_lane]
    lanes = Lanes(
        tempered,
        {name: jnp.asarray([number[name] for number in numbers], dtype) for name in numbers[0]},
        jnp.asarray([run.sampler.seed for run in by_lane], jnp.uint32),
    )
    return Inputs(centre, lanes, jnp.arange(sampler.num_chains), observed, observed_losses)


def _buffer_draws(inputs: Inputs) -> int:
    """Draws that a device call can hold."""
    width = len(FIELDS) + NUM_COORDINATES + len(inputs.observed_losses)
    draw_bytes = len(inputs.lanes.seed) * len(inputs.chains) * width * inputs.centre.losses.dtype.itemsize
    return int(np.clip(BUFFER_BYTES // draw_bytes, 1, BUFFER_DRAWS))


class _Clock:
    """Seconds of compiling and of sampling of each run, those before an interruption included."""

    def __init__(self, num_runs: int) -> None:
        self.num_runs, self.began, self.compiled = num_runs, time.perf_counter(), compile_clock.seconds
        self.spent = {"compile": 0.0, "sampling": 0.0}

    def seconds(self) -> dict[str, float]:
        compiling = compile_clock.seconds - self.compiled
        own = {"compile": compiling, "sampling": time.perf_counter() - self.began - compiling}
        return {name: (self.spent[name] + own[name]) / self.num_runs for name in own}


class _Begun(NamedTuple):
    """Where sampling begins: the states of the parts of the chains, the draws there are, (run, chain, draw, ...), in parts, and
    the seconds they took all runs."""

    parts: list[Any]
    drawn: list[dict[str, np.ndarray]]
    spent: dict[str, float]


def _begin(
    program: Program, inputs: Inputs, resume: Sequence[Checkpoint] | None, places: Sequence[int],
    parts_of_chains: Sequence[np.ndarray], observables: tuple[str, ...],
) -> _Begun:  # fmt: skip
    """At w*, or where an interrupted call got to if its checkpoints are of this program."""
    structure = jax.eval_shape(program.init, inputs)
    if resume is None or not all(_fits(checkpoint, structure, observables) for checkpoint in resume):
        return _Begun(_divided(jax.block_until_ready(program.init(inputs)), parts_of_chains), [], {})
    where = dict(zip(places, resume, strict=True))
    filled = [where.get(lane, resume[0]).leaves for lane in range(len(inputs.lanes.seed))]
    leaves = [np.stack(leaf) for leaf in zip(*filled, strict=True)]
    state = jax.device_put(jax.tree.unflatten(jax.tree.structure(structure), leaves))
    drawn = {name: np.stack([checkpoint.draws[name] for checkpoint in resume]) for name in resume[0].draws}
    spent = {name: sum(checkpoint.seconds[name] for checkpoint in resume) for name in ("compile", "sampling")}
    return _Begun(_divided(state, parts_of_chains), [drawn], spent)


class _Record(NamedTuple):
    """What becomes of the draws of chunks: they are kept, saved and shown. drawn: (run, chain, draw, ...), in parts."""

    runs: Sequence[Run]
    places: Sequence[int]
    num_lanes: int
    num_parts: int
    observables: tuple[str, ...]
    clock: _Clock
    drawn: list[dict[str, np.ndarray]]
    save: Callable[[list[Checkpoint]], None] | None
    progress: Progress
    lanes: Lanes

    @property
    def total(self) -> int:
        sampler = self.runs[0].sampler
        return sampler.num_burnin_draws + sampler.num_draws

    def add(self, parts: Sequence[tuple[Any, dict[str, Any]]], count: int) -> None:
        """The first `count` draws of each part's buffer."""
        mine, buffers = np.asarray(self.places), [buffer for _, buffer in parts]
        self.drawn.append({
            name: np.concatenate([np.asarray(buffer[name])[mine, :, :count] for buffer in buffers], axis=1)
            for name in buffers[0]
        })  # fmt: skip

    def checkpoints(self, states: list[Any]) -> list[Checkpoint]:
        """Of each run."""
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(_all_chains(states))]
        draws, seconds = join(self.drawn), self.clock.seconds()
        return [
            Checkpoint([leaf[place] for leaf in leaves], {name: field[run] for name, field in draws.items()}, seconds,
                       place, self.num_lanes, self.num_parts, self.observables)
            for run, place in enumerate(self.places)
        ]  # fmt: skip

    def show(self, done: int) -> None:
        """Progress, with the llc of the latest draws."""
        nbeta = np.asarray(self.lanes.posterior["nbeta"], np.float64)[np.asarray(self.places), None, None]
        latest = self.drawn[-1]["loss_difference"].astype(np.float64) * nbeta
        llc = [f"{np.mean(of[np.isfinite(of)]):.4g}" if np.isfinite(of).any() else "nan" for of in latest[:3]]
        phase = "burn-in" if done <= self.runs[0].sampler.num_burnin_draws else "sampling"
        note = f"{phase}, llc {', '.join(llc)}{', ...' if len(latest) > 3 else ''} lately"
        self.progress(done, self.total, "draws", note)


def _run(program: Program, inputs: Inputs, states: list[Any], parts_of_chains: Sequence[np.ndarray], record: _Record) -> None:
    """Draws to the end, in chunks, each part of the chains in a thread of its own."""
    inputs_of = [inputs._replace(chains=jnp.asarray(part)) for part in parts_of_chains]
    buffer_draws = _buffer_draws(inputs)
    pace = Pace()

    def advance(carry: Any, first: int, length: int) -> Any:
        start, count = np.int32(first), np.int32(length)
        calls = [
            functools.partial(program.advance.prepare(len(inputs_of) > 1, state, own, start, count), state, own, start, count)
            for (state, _), own in zip(carry[0], inputs_of, strict=True)
        ]
        return list(threads.map(lambda call: jax.block_until_ready(call()), calls)), length

    def after_chunk(carry: Any, done: int) -> None:
        parts, count = carry
        record.add(parts, count)
        # A checkpoint holds all draws so far, so saving after every chunk would cost the square of their number.
        if (save := record.save) is not None and done < record.total:
            pace(lambda: save(record.checkpoints([state for state, _ in parts])))
        record.show(done)

    start = record.drawn[0][FIELDS[0]].shape[2] if record.drawn else 0
    carry = [(state, None) for state in states], 0
    with ThreadPoolExecutor(len(parts_of_chains)) as threads:
        if program.pool is not None and start <= program.pool_draw < record.total:
            parts, _ = run_in_chunks(advance, carry, start, program.pool_draw, after_chunk, buffer_draws)
            pooled = program.pool(_all_chains([state for state, _ in parts]))
            carry = [(state, None) for state in _divided(pooled, parts_of_chains)], 0
            start = program.pool_draw
        run_in_chunks(advance, carry, start, record.total, after_chunk, buffer_draws)


def _traces(record: _Record, sizes: dict[str, int]) -> list[Trace]:
    """Each run's own of what was drawn; sizes: samples of each observable."""
    draws, seconds = join(record.drawn), record.clock.seconds()
    return [
        Trace(
            {name: field[index] for name, field in draws.items() if name != "observed"}
            | _own_observables(draws, index, run.sampler, sizes),
            run.sampler.num_burnin_draws, seconds, {name: sizes[name] for name in run.sampler.observables},
        )
        for index, run in enumerate(record.runs)
    ]  # fmt: skip


def lane_width(num_runs: int, params_star: Params, num_chains: int) -> int:
    """Runs of a batch to sample at once, the rest after them in the same program: as many as fit the device.

    On CPUs, whose caches the chains of a step must fit to be read at their speed, few; more would also need more memory. Groups
    are of equal width, so that all have one program.
    """
    chains = num_chains * sum(leaf.nbytes for leaf in jax.tree.leaves(params_star))
    if jax.default_backend() == "cpu":
        most = max(1, CACHE_BYTES // chains)
    else:
        free = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", GPU_BYTES)
        most = max(1, int(free) // (STEP_VECTORS * chains))
    return -(-num_runs // -(-num_runs // most))


def _num_parts(num_chains: int, num_lanes: int) -> int:
    """Parts of equal size into which chains are divided on CPUs, each with a thread of its own: as many as there are cores, but
    two or more chains in each, since XLA makes matrix products of single ones badly."""
    if jax.default_backend() != "cpu":
        return 1
    most = max(1, min(num_cores(), num_chains, num_chains * num_lanes // 2))
    return max(parts for parts in range(1, most + 1) if num_chains % parts == 0)


def _divided(state: Any, parts_of_chains: Sequence[np.ndarray]) -> list[Any]:
    """The state of each part of the chains."""
    return [jax.tree.map(lambda leaf, part=part: leaf[:, part], state) for part in parts_of_chains]


def _all_chains(states: list[Any]) -> Any:
    """The states of the parts as one; leaves (lane, chain, ...)."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *states)


def _observable(name: str, dataset: Dataset, observables: Mapping[str, Dataset]) -> Dataset:
    """The target's observable, or `TRAIN`, of its training samples."""
    if name in observables:
        return observables[name]
    if name != TRAIN:
        raise InvalidInput(
            f"An observable must be one of the target's; got {name!r} in sampler.observables. "
            f"This target has: {', '.join([TRAIN, *observables])}."
        )
    return dataset.spread(OBSERVABLE_SIZE)


def _own_observables(
    draws: dict[str, np.ndarray], index: int, spec: SamplerSpec, sizes: dict[str, int]
) -> dict[str, np.ndarray]:
    """A run's part of what all runs observed, in the order it names."""
    if not spec.observables:
        return {}
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())), strict=True))
    columns = np.concatenate([np.arange(ends[name] - sizes[name], ends[name]) for name in spec.observables])
    return {"observed": draws["observed"][index][..., columns]}


def _fits(checkpoint: Checkpoint, structure: Any, observables: tuple[str, ...]) -> bool:
    """Whether a state is of this program: observes the same, with the shapes and dtypes that other libraries may not have."""
    expected = [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(structure)]
    return observables == checkpoint.observables and expected == [(leaf.shape, leaf.dtype) for leaf in checkpoint.leaves]
