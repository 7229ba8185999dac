"""The one sampling loop: vmap over chains, a device loop over draws, chunks of a few seconds for progress and resuming."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lambda_hat.chunks import Progress, compile_clock, no_progress, run_in_chunks
from lambda_hat.posterior import Posterior, PosteriorSpec, make_posterior
from lambda_hat.samplers import Info, SamplerSpec
from lambda_hat.target import Dataset, Objective, Params

#: Draws a device call can hold before they are moved to the host.
BUFFER_DRAWS = 1024

#: What is recorded of each draw; each (chain, draw).
FIELDS = ("loss_difference", "squared_distance", "acceptance_rate", "is_divergent")


@dataclass(frozen=True)
class Trace:
    """Recorded draws of a run.

    draws: FIELDS -> (num_chains, num_burnin_draws + num_draws) in the run's dtype. loss_difference is L(w) - L(w*) averaged
      over the draw's steps, which estimates the same mean as thinned values with less noise; squared_distance is |w - w*|^2 at
      the draw; acceptance_rate is averaged and is_divergent counted over the draw's steps.
    num_burnin_draws: how many of the first draws are burn-in.
    seconds: {"compile", "sampling"}; sampling includes tuning and burn-in. A resumed run adds the time of all its parts.
    """

    draws: dict[str, np.ndarray]
    num_burnin_draws: int
    seconds: dict[str, float]

    def posterior_draws(self, name: str) -> np.ndarray:
        """Draws after burn-in, (num_chains, num_draws)."""
        return self.draws[name][:, self.num_burnin_draws :]


class Checkpoint(NamedTuple):
    """A run cut short: its state's leaves, the draws so far and the seconds spent."""

    leaves: list[np.ndarray]
    draws: dict[str, np.ndarray]
    seconds: dict[str, float]


class _Inputs(NamedTuple):
    """Arguments of the compiled programs besides the state; all traced."""

    params_star: Params
    dataset: Dataset
    star_losses: jax.Array
    posterior: dict[str, jax.Array]  # nbeta, localization
    numbers: dict[str, jax.Array]  # the sampler's
    key: jax.Array


class _Program(NamedTuple):
    star_losses: Callable[[Params, Dataset], jax.Array]
    init: Callable[[_Inputs], Any]
    advance: Callable[..., tuple[Any, dict[str, jax.Array]]]


@functools.cache
def _program(objective: Objective, spec: SamplerSpec) -> _Program:
    """The compiled functions of a sampler on a loss; `spec` is static, so a sweep over numbers compiles once."""
    algorithm = spec.algorithm()
    chains = jnp.arange(spec.num_chains)

    def posterior_of(inputs: _Inputs) -> Posterior:
        return make_posterior(objective, inputs.params_star, inputs.dataset, inputs.star_losses, **inputs.posterior)

    def chain_key(inputs: _Inputs, chain: jax.Array, step: jax.Array | int) -> jax.Array:
        """One key per chain and step, whatever the chunks: a resumed run draws what an uninterrupted one draws."""
        return jax.random.fold_in(jax.random.fold_in(inputs.key, chain), step)

    @jax.jit
    def init(inputs: _Inputs) -> Any:
        posterior = posterior_of(inputs)
        return jax.vmap(
            # Step keys count from 0 and stay below 2**31, so this one is free.
            lambda chain: algorithm.init(
                chain_key(inputs, chain, 2**32 - 1), posterior.position_star, posterior, inputs.numbers
            )
        )(chains)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state: Any, inputs: _Inputs, start: jax.Array, count: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        posterior = posterior_of(inputs)
        dtype = posterior.position_star.dtype

        def step(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
            state, sums = carry
            keys = jax.vmap(chain_key, (None, 0, None))(inputs, chains, index)
            state, info = jax.vmap(algorithm.step, (0, 0, None, None, None))(keys, state, posterior, inputs.numbers, index)
            return (state, jax.tree.map(jnp.add, sums, info)), None

        def draw(position: jax.Array, carry: tuple) -> tuple:
            state, buffer = carry
            first = (start + position) * spec.num_steps_bw_draws
            zeros = jnp.zeros(spec.num_chains, dtype)
            (state, sums), _ = jax.lax.scan(
                step, (state, Info(zeros, zeros, zeros)), first + jnp.arange(spec.num_steps_bw_draws)
            )
            offset = jax.vmap(lambda w: w - posterior.position_star)(state.position)
            record = {
                "loss_difference": sums.loss_difference / spec.num_steps_bw_draws,
                "squared_distance": jnp.sum(jnp.square(offset), axis=1),
                "acceptance_rate": sums.acceptance_rate / spec.num_steps_bw_draws,
                "is_divergent": sums.is_divergent,
            }
            return state, {name: buffer[name].at[:, position].set(record[name]) for name in FIELDS}

        buffer = {name: jnp.zeros((spec.num_chains, BUFFER_DRAWS), dtype) for name in FIELDS}
        # A loop with a traced bound rather than a scan: one program serves every chunk length.
        return jax.lax.fori_loop(0, count, draw, (state, buffer))

    return _Program(jax.jit(objective.per_sample_loss), init, advance)


def sample(
    objective: Objective,
    params_star: Params,
    dataset: Dataset,
    posterior: PosteriorSpec,
    sampler: SamplerSpec,
    *,
    resume: Checkpoint | None = None,
    save: Callable[[Checkpoint], None] | None = None,
    progress: Progress = no_progress,
) -> Trace:
    """Draws from the local posterior around `params_star`, in the dtype of its leaves.

    Args:
      resume: where an earlier, interrupted call got to; the result is the same as without the interruption. One that does
        not fit this program is ignored.
      save: receives a checkpoint after a chunk, as often as saving takes at most a tenth of the time.

    Returns:
      The trace. A chain that diverges holds NaN from then on; it is never an error.
    """
    dtype = jnp.dtype(jax.tree.leaves(params_star)[0].dtype)
    with jax.enable_x64(dtype == jnp.float64):
        return _sample(objective, params_star, dataset, posterior, sampler, dtype, resume, save, progress)


def _sample(
    objective: Objective,
    params_star: Params,
    dataset: Dataset,
    posterior: PosteriorSpec,
    sampler: SamplerSpec,
    dtype: np.dtype,
    resume: Checkpoint | None,
    save: Callable[[Checkpoint], None] | None,
    progress: Progress,
) -> Trace:
    began, compiled = time.perf_counter(), compile_clock.seconds
    program = _program(objective, sampler.static())
    nbeta = posterior.resolve_nbeta(dataset.num_data)
    params_star, dataset = jax.device_put((params_star, dataset))
    inputs = _Inputs(
        params_star, dataset, program.star_losses(params_star, dataset),
        {"nbeta": jnp.asarray(nbeta, dtype), "localization": jnp.asarray(posterior.localization, dtype)},
        {name: jnp.asarray(value, dtype) for name, value in sampler.numbers().items()},
        jax.random.key(sampler.seed),
    )  # fmt: skip
    total = sampler.num_burnin_draws + sampler.num_draws
    structure = jax.eval_shape(program.init, inputs)
    if resume is None or not _fits(resume, structure):
        state = jax.block_until_ready(program.init(inputs))
        parts: list[dict[str, np.ndarray]] = []
        spent = {"compile": 0.0, "sampling": 0.0}
    else:
        state = jax.device_put(jax.tree.unflatten(jax.tree.structure(structure), resume.leaves))
        parts, spent = [resume.draws], resume.seconds
    start = parts[0][FIELDS[0]].shape[1] if parts else 0

    def seconds() -> dict[str, float]:
        compiling = compile_clock.seconds - compiled
        return {
            "compile": spent["compile"] + compiling,
            "sampling": spent["sampling"] + time.perf_counter() - began - compiling,
        }

    def advance(carry: Any, start: int, count: int) -> Any:
        state, buffer = program.advance(carry[0], inputs, start, count)
        return state, buffer, count

    saved = save_seconds = 0.0

    def after_chunk(carry: Any, done: int) -> None:
        state, buffer, count = carry
        parts.append({name: np.asarray(buffer[name])[:, :count] for name in FIELDS})
        nonlocal saved, save_seconds
        now = time.perf_counter()
        # A checkpoint holds all draws so far, so saving after every chunk would cost the square of their number.
        if save is not None and done < total and now - saved > 10 * save_seconds:
            save(Checkpoint([np.asarray(leaf) for leaf in jax.tree.leaves(state)], _join(parts), seconds()))
            saved = time.perf_counter()
            save_seconds = saved - now
        latest = parts[-1]["loss_difference"]
        llc = nbeta * float(np.mean(latest[np.isfinite(latest)], dtype=np.float64)) if np.isfinite(latest).any() else np.nan
        progress(done, total, "draws", f"{'burn-in' if done <= sampler.num_burnin_draws else 'sampling'}, llc {llc:.4g} lately")

    run_in_chunks(advance, (state, None, 0), start, total, after_chunk, BUFFER_DRAWS)
    return Trace(_join(parts), sampler.num_burnin_draws, seconds())


def _fits(checkpoint: Checkpoint, structure: Any) -> bool:
    """Whether a state has the shapes and dtypes of this program's; that of another version of the libraries may not."""
    expected = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(structure)]
    return expected == [(leaf.shape, leaf.dtype) for leaf in checkpoint.leaves]


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in FIELDS}
