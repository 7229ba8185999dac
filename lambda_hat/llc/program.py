"""The compiled programs of a run: a sampler on a posterior, vmapped over runs and chains, looping over draws on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lambda_hat.compute import random
from lambda_hat.compute.chunks import Compiled
from lambda_hat.llc.trace import NUM_COORDINATES
from lambda_hat.samplers.kinds import Info, Sampler, SamplerSpec
from lambda_hat.samplers.posterior import Posterior, make_posterior
from lambda_hat.targets.full_data import Centre, full_difference
from lambda_hat.targets.selection import Selection, num_selected
from lambda_hat.targets.target import Dataset, Objective


class Lanes(NamedTuple):
    """What differs between runs sampled together; each array begins with the lane."""

    posterior: dict[str, jax.Array]  # nbeta, localization
    numbers: dict[str, jax.Array]  # the sampler's
    seed: jax.Array


class Inputs(NamedTuple):
    """Arguments of the compiled programs besides the state; all traced. chains: the numbers of the chains in this part."""

    centre: Centre
    lanes: Lanes
    chains: jax.Array
    observed: Dataset | None
    observed_losses: jax.Array  # at w*


class Program(NamedTuple):
    """init: inputs -> state, each leaf (lane, chain, ...). advance: (state, inputs, start, count) -> (state, the draws from
    `start` on, of which `count` are made). pool: the states of all chains -> the same, before the draw `pool_draw`, or None.
    """

    init: Callable[[Inputs], Any]
    advance: Compiled
    pool: Callable[[Any], Any] | None
    pool_draw: int


@functools.lru_cache(maxsize=64)  # a user's loss may hold on to data
def make_program(objective: Objective, spec: SamplerSpec, selection: Selection, buffer_draws: int) -> Program:
    """The compiled functions of a sampler on a loss; `spec` is static, so a sweep over numbers compiles once."""
    algorithm = spec.algorithm()
    chains = _Chains(objective, spec, algorithm, selection, buffer_draws)
    pool_step, pool = algorithm.pool or (0, None)
    pooled = None if pool is None else jax.jit(jax.vmap(pool))
    advance = Compiled(jax.jit(chains.advance, donate_argnums=0))
    return Program(jax.jit(chains.init), advance, pooled, -(-pool_step // spec.num_steps_bw_draws))


class _Chains(NamedTuple):
    """All chains of all lanes, as functions to be compiled; states have leaves (lane, chain, ...)."""

    objective: Objective
    spec: SamplerSpec
    algorithm: Sampler
    selection: Selection
    buffer_draws: int

    def init(self, inputs: Inputs) -> Any:
        """The state of chains that start at w*."""
        start = jnp.zeros(num_selected(inputs.centre.params_star, self.selection), inputs.centre.losses.dtype)

        def of_chain(lane: Lanes, posterior: Posterior, chain: jax.Array) -> Any:
            # Step keys count from 0 and stay below 2**31, so this one is free.
            return self.algorithm.init(_chain_key(lane, chain, 2**32 - 1), start, posterior, lane.numbers)

        return self._each(of_chain, inputs)

    def advance(self, state: Any, inputs: Inputs, start: jax.Array, count: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        """`count` draws from `start` on."""

        def draw(position: jax.Array, carry: tuple) -> tuple:
            state, buffer = carry
            state, fields = self._draw(inputs, state, start + position)
            return state, {name: buffer[name].at[:, :, position].set(fields[name]) for name in buffer}

        shapes = jax.eval_shape(self._draw, inputs, state, start)[1]
        buffer = {
            name: jnp.zeros((*field.shape[:2], self.buffer_draws, *field.shape[2:]), field.dtype)
            for name, field in shapes.items()
        }
        # A loop with a traced bound rather than a scan: one program serves every chunk length.
        return jax.lax.fori_loop(jnp.zeros_like(count), count, draw, (state, buffer))

    def _draw(self, inputs: Inputs, state: Any, draw: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        """The steps of one draw, and its fields."""
        zeros = jnp.zeros((inputs.lanes.seed.shape[0], inputs.chains.shape[0]), inputs.centre.losses.dtype)

        def step(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
            state, sums, squares = carry

            def of_chain(lane: Lanes, posterior: Posterior, chain: jax.Array, state: Any) -> tuple[Any, Info]:
                return self.algorithm.step(_chain_key(lane, chain, index), state, posterior, lane.numbers, index)

            state, info = self._each(of_chain, inputs, state)
            return (state, jax.tree.map(jnp.add, sums, info), squares + jnp.square(info.loss_difference)), None

        num_steps = self.spec.num_steps_bw_draws
        indices = draw * num_steps + jnp.arange(num_steps, dtype=draw.dtype)
        (state, sums, squares), _ = jax.lax.scan(step, (state, Info(zeros, zeros, zeros, zeros), zeros), indices)
        return state, self._record(inputs, state, sums, squares, draw)

    def _record(self, inputs: Inputs, state: Any, sums: Info, squares: jax.Array, draw: jax.Array) -> dict[str, jax.Array]:
        """A draw's fields, each (lane, chain, ...), of the state after its last step and the sums over its steps."""
        position, centre, num_steps = state.position, inputs.centre, self.spec.num_steps_bw_draws
        dim = position.shape[-1]
        count = min(dim, NUM_COORDINATES)
        fields = {
            "loss_difference": sums.loss_difference / num_steps,
            "loss_square": squares / num_steps,
            "squared_distance": jnp.sum(jnp.square(position), axis=-1),
            "acceptance_rate": sums.acceptance_rate / num_steps,
            "is_divergent": sums.is_divergent,
            "work": sums.work,
            "coordinates": position[..., np.arange(count) * dim // count],
        }
        fields |= {name: getattr(state, name) for name in self.algorithm.extras}
        if inputs.observed is not None:
            fields["observed"] = jax.vmap(jax.vmap(lambda u: self._observed(inputs, u)))(position)
        if eval_every := getattr(self.spec, "eval_every", 0):
            fields["full_difference"] = jax.lax.cond(
                draw % eval_every == eval_every - 1,
                jax.vmap(jax.vmap(lambda u: full_difference(self.objective, centre.params(u, self.selection), centre))),
                lambda position: jnp.full(position.shape[:-1], jnp.nan, position.dtype),
                position,
            )
        return fields

    def _observed(self, inputs: Inputs, position: jax.Array) -> jax.Array:
        """Of each sample that is observed, by how much its loss is above that at w*."""
        assert inputs.observed is not None
        params = inputs.centre.params(position, self.selection)
        return self.objective.per_sample_loss(params, inputs.observed) - inputs.observed_losses

    def _each(self, function: Callable, inputs: Inputs, *states: Any) -> Any:
        """function(lane, posterior, chain, *state) of every lane and chain."""
        lanes, chains = inputs.lanes.seed.shape[0], inputs.chains.shape[0]

        def of_chain(lane: Lanes, chain: jax.Array, *states: Any) -> Any:
            posterior = make_posterior(self.objective, inputs.centre, self.selection, **lane.posterior)
            return function(lane, posterior, chain, *states)

        # One axis for both: of two, XLA would transpose the operands of matrix products, a quarter of a small network's step.
        flat = jax.tree.map(lambda leaf: leaf.reshape(lanes * chains, *leaf.shape[2:]), states)
        each_lane = jax.tree.map(lambda leaf: jnp.repeat(leaf, chains, axis=0), inputs.lanes)
        results = jax.vmap(of_chain)(each_lane, jnp.tile(inputs.chains, lanes), *flat)
        return jax.tree.map(lambda leaf: leaf.reshape(lanes, chains, *leaf.shape[1:]), results)


def _chain_key(lane: Lanes, chain: jax.Array, step: jax.Array | int) -> jax.Array:
    """One key per chain and step, whatever the chunks: a resumed run draws what an uninterrupted one draws."""
    return jax.random.fold_in(jax.random.fold_in(random.key(lane.seed), chain), step)
