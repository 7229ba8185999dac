"""The one sampling loop: vmap over runs and chains, a device loop over draws, chunks of seconds for progress and resuming."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lambda_hat import random
from lambda_hat.chunks import Progress, compile_clock, no_progress, run_in_chunks
from lambda_hat.posterior import (
    Centre,
    Metric,
    Posterior,
    PosteriorSpec,
    Selection,
    full_difference,
    make_centre,
    make_posterior,
    num_selected,
    per_sample_losses,
    select,
    to_params,
)
from lambda_hat.samplers import Info, SamplerSpec
from lambda_hat.samplers.base import CHAINS
from lambda_hat.spec import InvalidInput
from lambda_hat.target import OBSERVABLE_SIZE, Dataset, Objective, Params

#: Draws a device call can hold before they are moved to the host, and the bytes they may take.
BUFFER_DRAWS, BUFFER_BYTES = 1024, 2**26

#: What is recorded of every draw; each (chain, draw).
FIELDS = ("loss_difference", "squared_distance", "acceptance_rate", "is_divergent", "work")

#: Coordinates of u that are recorded, evenly spaced among all.
NUM_COORDINATES = 8


@dataclass(frozen=True)
class Trace:
    """Recorded draws of a run.

    draws: arrays that begin (num_chains, num_burnin_draws + num_draws, ...), in the run's dtype.
      loss_difference: L(w) - L(w*) averaged over the draw's steps, which estimates the same mean as thinned values with less
      noise. squared_distance: |u|^2 at the draw. acceptance_rate averaged, is_divergent counted and work (FGE) summed over the
      draw's steps. coordinates: up to `NUM_COORDINATES` of u, on a third axis.
      Where asked for: full_difference, L_n(w) - L_n(w*) on all the data, NaN at draws where it was not evaluated; observed,
      l_i(w) - l_i(w*) of the samples of all observables, on a third axis; and a sampler's own `extras`.
    num_burnin_draws: how many of the first draws are burn-in.
    seconds: {"compile", "sampling"}; sampling includes tuning and burn-in. A resumed run adds the time of all its parts; runs
      sampled together share theirs evenly.
    observables: the number of samples of each observable, in the order of `observed`.
    """

    draws: dict[str, np.ndarray]
    num_burnin_draws: int
    seconds: dict[str, float]
    observables: dict[str, int]

    def posterior_draws(self, name: str) -> np.ndarray:
        """Draws after burn-in, (num_chains, num_draws, ...)."""
        return self.draws[name][:, self.num_burnin_draws :]


class Checkpoint(NamedTuple):
    """A run cut short: its state's leaves, the draws so far, the seconds spent, and its lane among the runs sampled with it."""

    leaves: list[np.ndarray]
    draws: dict[str, np.ndarray]
    seconds: dict[str, float]
    lane: int
    num_lanes: int

    @property
    def num_draws(self) -> int:
        return self.draws[FIELDS[0]].shape[1]


class Run(NamedTuple):
    """One of the runs that are sampled together."""

    posterior: PosteriorSpec
    sampler: SamplerSpec


class _Lanes(NamedTuple):
    """What differs between runs sampled together; each array begins with the lane."""

    posterior: dict[str, jax.Array]  # nbeta, localization
    numbers: dict[str, jax.Array]  # the sampler's
    seed: jax.Array


class _Inputs(NamedTuple):
    """Arguments of the compiled programs besides the state; all traced."""

    centre: Centre
    lanes: _Lanes
    observed: Dataset
    observed_losses: jax.Array  # at w*


class _Program(NamedTuple):
    init: Callable[[_Inputs], Any]
    advance: Callable[..., tuple[Any, dict[str, jax.Array]]]


@functools.cache
def _program(objective: Objective, spec: SamplerSpec, selection: Selection, buffer_draws: int) -> _Program:
    """The compiled functions of a sampler on a loss; `spec` is static, so a sweep over numbers compiles once."""
    algorithm = spec.algorithm()
    chains = jnp.arange(spec.num_chains)
    eval_every = getattr(spec, "eval_every", 0)

    def posterior_of(inputs: _Inputs, lane: _Lanes) -> Posterior:
        return make_posterior(objective, inputs.centre, selection, **lane.posterior)

    def chain_key(lane: _Lanes, chain: jax.Array, step: jax.Array | int) -> jax.Array:
        """One key per chain and step, whatever the chunks: a resumed run draws what an uninterrupted one draws."""
        return jax.random.fold_in(jax.random.fold_in(random.key(lane.seed), chain), step)

    def over_chains(function: Callable, inputs: _Inputs, *states: Any) -> Any:
        """function(lane, posterior, chain, *state) of every lane and chain."""

        def of_lane(lane: _Lanes, *states: Any) -> Any:
            posterior = posterior_of(inputs, lane)
            return jax.vmap(
                lambda chain, *state: function(lane, posterior, chain, *state), axis_name=CHAINS
            )(chains, *states)  # fmt: skip

        return jax.vmap(of_lane)(inputs.lanes, *states)

    @jax.jit
    def init(inputs: _Inputs) -> Any:
        start = jnp.zeros(num_selected(inputs.centre.params_star, selection), inputs.centre.losses.dtype)

        def of_chain(lane: _Lanes, posterior: Posterior, chain: jax.Array) -> Any:
            # Step keys count from 0 and stay below 2**31, so this one is free.
            return algorithm.init(chain_key(lane, chain, 2**32 - 1), start, posterior, lane.numbers)

        return over_chains(of_chain, inputs)

    def record(inputs: _Inputs, state: Any, sums: Info, draw: jax.Array) -> dict[str, jax.Array]:
        """A draw's fields, each (lane, chain, ...), of the state after its last step and the sums over its steps."""

        def params(position: jax.Array) -> Params:
            return to_params(position, inputs.centre.params_star, inputs.centre.scales, selection)

        position = state.position
        dim = position.shape[-1]
        count = min(dim, NUM_COORDINATES)
        fields = {
            "loss_difference": sums.loss_difference / spec.num_steps_bw_draws,
            "squared_distance": jnp.sum(jnp.square(position), axis=-1),
            "acceptance_rate": sums.acceptance_rate / spec.num_steps_bw_draws,
            "is_divergent": sums.is_divergent,
            "work": sums.work,
            "coordinates": position[..., np.arange(count) * dim // count],
        }
        fields |= {name: getattr(state, name) for name in algorithm.extras}
        if inputs.observed_losses.size:
            fields["observed"] = jax.vmap(jax.vmap(
                lambda u: objective.per_sample_loss(params(u), inputs.observed) - inputs.observed_losses
            ))(position)  # fmt: skip
        if eval_every:
            fields["full_difference"] = jax.lax.cond(
                draw % eval_every == eval_every - 1,
                jax.vmap(jax.vmap(lambda u: full_difference(objective, params(u), inputs.centre))),
                lambda position: jnp.full(position.shape[:-1], jnp.nan, position.dtype),
                position,
            )
        return fields

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state: Any, inputs: _Inputs, start: jax.Array, count: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        lanes, dtype = inputs.lanes.seed.shape[0], inputs.centre.losses.dtype
        zeros = jnp.zeros((lanes, spec.num_chains), dtype)

        def step(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
            state, sums = carry

            def of_chain(lane: _Lanes, posterior: Posterior, chain: jax.Array, state: Any) -> tuple[Any, Info]:
                return algorithm.step(chain_key(lane, chain, index), state, posterior, lane.numbers, index)

            state, info = over_chains(of_chain, inputs, state)
            return (state, jax.tree.map(jnp.add, sums, info)), None

        def steps(state: Any, draw: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            indices = draw * spec.num_steps_bw_draws + jnp.arange(spec.num_steps_bw_draws)
            (state, sums), _ = jax.lax.scan(step, (state, Info(zeros, zeros, zeros, zeros)), indices)
            return state, record(inputs, state, sums, draw)

        def draw(position: jax.Array, carry: tuple) -> tuple:
            state, buffer = carry
            state, fields = steps(state, start + position)
            return state, {name: buffer[name].at[:, :, position].set(fields[name]) for name in buffer}

        shapes = jax.eval_shape(steps, state, start)[1]
        buffer = {
            name: jnp.zeros((*field.shape[:2], buffer_draws, *field.shape[2:]), field.dtype) for name, field in shapes.items()
        }
        # A loop with a traced bound rather than a scan: one program serves every chunk length.
        return jax.lax.fori_loop(0, count, draw, (state, buffer))

    return _Program(init, advance)


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
      runs: they differ in numbers, seeds and observables only (`lambda_hat.run.batches`).
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
    names = list(dict.fromkeys(name for run in runs for name in run.sampler.observables))
    observables = {name: _observable(name, dataset, observables or {}) for name in names}
    dtype = jnp.dtype(jax.tree.leaves(params_star)[0].dtype)
    with jax.enable_x64(dtype == jnp.float64):
        return _sample_runs(
            objective, params_star, dataset, runs, metric, observables, resume,
            lanes or (range(len(runs)), len(runs)), save, progress,
        )  # fmt: skip


def _sample_runs(
    objective: Objective,
    params_star: Params,
    dataset: Dataset,
    runs: Sequence[Run],
    metric: Metric,
    observables: dict[str, Dataset],
    resume: Sequence[Checkpoint] | None,
    lanes: tuple[Sequence[int], int],
    save: Callable[[list[Checkpoint]], None] | None,
    progress: Progress,
) -> list[Trace]:
    began, compiled = time.perf_counter(), compile_clock.seconds
    posterior, sampler = runs[0]
    if posterior.metric != "auto":
        metric = posterior.metric
    selection = select(params_star, posterior.parameters)
    places, num_lanes = lanes
    by_lane = [runs[list(places).index(lane)] if lane in places else runs[0] for lane in range(num_lanes)]

    centre = make_centre(
        objective, params_star, dataset, metric, selection, getattr(sampler, "gradient", "plain") == "control_variates"
    )
    dtype = centre.losses.dtype
    nbeta = np.asarray([run.posterior.resolve_nbeta(dataset.num_data) for run in by_lane])
    numbers = [run.sampler.numbers() for run in by_lane]
    parts = [part.samples for part in observables.values()] or [{k: v[:0] for k, v in dataset.samples.items()}]
    observed = Dataset(jax.tree.map(lambda *x: jnp.concatenate([jnp.asarray(v) for v in x]), *parts), centre.dataset.constants)
    inputs = _Inputs(
        centre,
        _Lanes(
            {
                "nbeta": jnp.asarray(nbeta, dtype),
                "localization": jnp.asarray([run.posterior.localization for run in by_lane], dtype),
            },
            {name: jnp.asarray([number[name] for number in numbers], dtype) for name in numbers[0]},
            jnp.asarray([run.sampler.seed for run in by_lane], jnp.uint32),
        ),
        observed,
        jax.jit(per_sample_losses, static_argnums=0)(objective, centre.params_star, observed),
    )
    width = len(FIELDS) + NUM_COORDINATES + observed.num_data
    draw_bytes = num_lanes * sampler.num_chains * width * dtype.itemsize
    buffer_draws = int(np.clip(BUFFER_BYTES // draw_bytes, 1, BUFFER_DRAWS))
    program = _program(objective, sampler.static(), selection, buffer_draws)
    total = sampler.num_burnin_draws + sampler.num_draws
    structure = jax.eval_shape(program.init, inputs)
    spent = {"compile": 0.0, "sampling": 0.0}
    drawn: list[dict[str, np.ndarray]] = []  # (run, chain, draw, ...), in parts
    if resume is None or not all(_fits(checkpoint, structure, observed.num_data) for checkpoint in resume):
        state = jax.block_until_ready(program.init(inputs))
    else:
        where = dict(zip(places, resume, strict=True))
        filled = [where.get(lane, resume[0]).leaves for lane in range(num_lanes)]
        leaves = [np.stack(leaf) for leaf in zip(*filled, strict=True)]
        state = jax.device_put(jax.tree.unflatten(jax.tree.structure(structure), leaves))
        drawn = [{name: np.stack([checkpoint.draws[name] for checkpoint in resume]) for name in resume[0].draws}]
        spent = {name: sum(checkpoint.seconds[name] for checkpoint in resume) for name in spent}
    start = drawn[0][FIELDS[0]].shape[2] if drawn else 0

    def seconds() -> dict[str, float]:
        """Of each run."""
        compiling = compile_clock.seconds - compiled
        sampling = time.perf_counter() - began - compiling
        return {"compile": (spent["compile"] + compiling) / len(runs), "sampling": (spent["sampling"] + sampling) / len(runs)}

    def advance(carry: Any, start: int, count: int) -> Any:
        state, buffer = program.advance(carry[0], inputs, start, count)
        return state, buffer, count

    saved = save_seconds = 0.0
    mine = np.asarray(places)

    def after_chunk(carry: Any, done: int) -> None:
        state, buffer, count = carry
        drawn.append({name: np.asarray(field)[mine, :, :count] for name, field in buffer.items()})
        nonlocal saved, save_seconds
        now = time.perf_counter()
        # A checkpoint holds all draws so far, so saving after every chunk would cost the square of their number.
        if save is not None and done < total and now - saved > 10 * save_seconds:
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            draws = _join(drawn)
            save([
                Checkpoint([leaf[place] for leaf in leaves], {name: field[run] for name, field in draws.items()}, seconds(),
                           place, num_lanes)
                for run, place in enumerate(places)
            ])  # fmt: skip
            saved = time.perf_counter()
            save_seconds = saved - now
        latest = drawn[-1]["loss_difference"].astype(np.float64) * nbeta[mine, None, None]
        llc = [f"{np.mean(of[np.isfinite(of)]):.4g}" if np.isfinite(of).any() else "nan" for of in latest[:3]]
        phase = "burn-in" if done <= sampler.num_burnin_draws else "sampling"
        progress(done, total, "draws", f"{phase}, llc {', '.join(llc)}{', ...' if len(latest) > 3 else ''} lately")

    run_in_chunks(advance, (state, None, 0), start, total, after_chunk, buffer_draws)
    draws = _join(drawn)
    sizes = {name: part.num_data for name, part in observables.items()}
    return [
        Trace(
            {name: field[index] for name, field in draws.items() if name != "observed"}
            | _own_observables(draws, index, run.sampler, sizes),
            sampler.num_burnin_draws, seconds(), {name: sizes[name] for name in run.sampler.observables},
        )
        for index, run in enumerate(runs)
    ]  # fmt: skip


def _observable(name: str, dataset: Dataset, observables: Mapping[str, Dataset]) -> Dataset:
    """The target's observable, or "train": evenly spaced training samples."""
    if name in observables:
        return observables[name]
    if name != "train":
        raise InvalidInput(
            f"An observable must be one of the target's; got {name!r} in sampler.observables. "
            f"This target has: {', '.join(['train', *observables])}."
        )
    count = min(dataset.num_data, OBSERVABLE_SIZE)
    return dataset.take(np.arange(count) * dataset.num_data // count)


def _own_observables(
    draws: dict[str, np.ndarray], index: int, spec: SamplerSpec, sizes: dict[str, int]
) -> dict[str, np.ndarray]:
    """A run's part of what all runs observed, in the order it names."""
    if not spec.observables:
        return {}
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())), strict=True))
    columns = np.concatenate([np.arange(ends[name] - sizes[name], ends[name]) for name in spec.observables])
    return {"observed": draws["observed"][index][..., columns]}


def _fits(checkpoint: Checkpoint, structure: Any, num_observed: int) -> bool:
    """Whether a state has the shapes and dtypes of this program's; that of another version of the libraries may not."""
    expected = [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(structure)]
    observed = checkpoint.draws["observed"].shape[-1] if "observed" in checkpoint.draws else 0
    return observed == num_observed and expected == [(leaf.shape, leaf.dtype) for leaf in checkpoint.leaves]


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}
