"""How the entropy changes along directions in parameter space, estimated from sequences that the policy itself has drawn.

With x ~ pi_theta and h the integrand whose mean is sought, H(theta + eta d) is estimated
- at a finite eta by importance sampling (`entropy.importance.snis`, of what `evaluate` computes);
- by its first and second derivative with respect to eta at 0 (`orders`), from one function of eta for each sequence,
    psi(eta) = sum_t [w_t h_t - b_t w_<t (r_t - 1)],   r_t = pi_eta(x_t | x_<t) / pi_theta(x_t | x_<t),   w_<t = prod_{s<t} r_s,
  whose mean is H(theta + eta d) for every eta. With h_t the token entropy H_t, a function of x_<t, w_t is w_<t, and
    psi'(0) = sum_t (G_t - b_t) dlog p_t + sum_t dH_t
  with the entropy to go G_t = sum_{s>t} H_s. A baseline b_t may depend on anything but x_t and what follows; it leaves the mean
  as it is.
Weights and entropies are in nats; sums over sequences are in float64 on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lambda_hat.entropy.importance import Evaluation
from lambda_hat.entropy.sequences import Batch, TokenStats, as_partial, check_sequences, in_chunks, moved, token_stats
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.decoder import Apply
from lambda_hat.targets.target import Params, chunk_size

#: h of a sequence: the sum of the exact entropies of its tokens' distributions; the sum of its tokens' surprisals, of the same
#: mean; the mean of the entropies over its tokens.
Integrand = Literal["entropy", "surprisal", "entropy_per_token"]


class Orders(NamedTuple):
    """Estimates of dH/deta and d2H/deta2 at 0 along K directions.

    first_KN, second_KN: each sequence's contribution; they sum to the derivative. The errors are standard errors over the
    sequences, (K,). second is None where it was not asked for.
    """

    first_KN: np.ndarray
    second_KN: np.ndarray | None

    @property
    def first(self) -> np.ndarray:
        return np.sum(self.first_KN, axis=1)

    @property
    def second(self) -> np.ndarray:
        return np.sum(self._second, axis=1)

    @property
    def first_error(self) -> np.ndarray:
        return standard_error(self.first_KN, axis=1)

    @property
    def second_error(self) -> np.ndarray:
        return standard_error(self._second, axis=1)

    @property
    def _second(self) -> np.ndarray:
        if self.second_KN is None:
            raise InvalidInput("The second derivative is known where it was computed; got only the first. Use second=True.")
        return self.second_KN

    def change(self, eta: float) -> np.ndarray:
        """eta H' + eta^2 H'' / 2, (K,)."""
        return eta * self.first + eta**2 * self.second / 2

    def ratio(self, eta: float) -> np.ndarray:
        """The change to second order over that to first, 1 + eta H'' / (2 H'), (K,)."""
        return self.change(eta) / (eta * self.first)

    def linear_until(self, share: float = 0.1) -> np.ndarray:
        """eta* at which the second order is `share` of the first, 2 share |H'| / |H''|, (K,)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return 2 * share * np.abs(self.first) / np.abs(self.second)


def standard_error(contributions: np.ndarray, axis: int) -> np.ndarray:
    """Of sums over an axis of independent contributions."""
    return np.sqrt(contributions.shape[axis]) * np.std(contributions, axis=axis, ddof=1)


def token_terms(stats: TokenStats, mask_BT: Any, integrand: Integrand) -> Any:
    """h_t, (B, T): they sum to h."""
    if integrand == "surprisal":
        return -stats.logp_BT
    if integrand == "entropy":
        return stats.entropies_BT
    # Sequences that pad a chunk have no tokens.
    return stats.entropies_BT / jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1).astype(stats.entropies_BT.dtype)


# --- Many policies at once -----------------------------------------------------------------------------------------------


def evaluate(
    apply: Apply,
    params: Params,
    directions: Params,
    etas_K: np.ndarray,
    batch: Batch,
    integrand: Integrand = "entropy",
    direction_chunk: int = 8,
    sequence_chunk: int = 64,
    which_K: np.ndarray | None = None,
) -> Evaluation:
    """Log-probabilities and integrands under theta + eta_k d_k for K policies, in the parameters' dtype.

    Equal policies give equal numbers to the last bit, whatever the others are, if the chunks' sizes are the same: with an eta
    of 0 it gives the base that `snis` compares with, and rounding cancels. Small changes drown in float32's rounding all the
    same (some 1e-6 of h); there the derivatives serve.

    Args:
      directions: trees like `params` with a leading axis of directions.
      direction_chunk, sequence_chunk: policies, and sequences under each, that are evaluated together at most, in chunks of
        nearly equal sizes.
      which_K: of the directions, each policy's; none = one after the other.
    """
    batch = check_sequences(apply, params, batch)
    etas_K = np.asarray(etas_K, np.float64)
    which_K = np.arange(len(etas_K)) if which_K is None else which_K
    chunks = in_chunks(batch, sequence_chunk)

    def of_chunk(part: Params, rows: np.ndarray) -> tuple[jax.Array, ...]:
        return evaluate_chunk(as_partial(apply), params, part, etas_K[rows], chunks, integrand)

    return Evaluation(*_by_directions(directions, which_K, direction_chunk, of_chunk, len(batch.tokens_BT)))


def _by_directions(
    directions: Params,
    which_K: np.ndarray,
    direction_chunk: int,
    of_chunk: Callable[[Params, np.ndarray], tuple[jax.Array, ...]],
    num_sequences: int,
) -> list[np.ndarray]:
    """What `of_chunk` gives for policies, each along one of the directions, each array as (K, N) in float64.

    Args:
      of_chunk: (directions, the policies' indices) -> arrays (policies, chunks, sequences); the last is filled up with the
        first.
    """
    count = len(which_K)
    size = chunk_size(count, direction_chunk)
    rows = np.pad(np.arange(count), (0, -count % size))
    parts = [of_chunk(_select(directions, which_K[chosen]), chosen) for chosen in rows.reshape(-1, size)]
    arrays = (np.concatenate([np.asarray(part, np.float64) for part in arrays]) for arrays in zip(*parts, strict=True))
    return [array.reshape(len(rows), -1)[:count, :num_sequences] for array in arrays]


@jax.jit
def _select(directions: Params, rows: np.ndarray) -> Params:
    return jax.tree.map(lambda leaf: leaf[rows], directions)


@functools.partial(jax.jit, static_argnums=5)
@jax.default_matmul_precision("highest")
def evaluate_chunk(
    apply: Partial, params: Params, directions: Params, etas: Any, chunks: Batch, integrand: Integrand
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and h of a batch in chunks, under all the directions at once; (directions, chunks, sequences) each."""

    def of_policy(direction: Params, eta: jax.Array) -> tuple[jax.Array, jax.Array]:
        there = moved(params, direction, eta)

        def of_chunk(chunk: Batch) -> tuple[jax.Array, jax.Array]:
            stats = token_stats(apply, there, chunk)
            return jnp.sum(stats.logp_BT, axis=1), jnp.sum(token_terms(stats, chunk.mask_BT, integrand), axis=1)

        return jax.lax.map(of_chunk, chunks)

    return jax.vmap(of_policy)(directions, etas)


# --- Derivatives -----------------------------------------------------------------------------------------------------------


def baselines(stats: TokenStats, mask_BT: np.ndarray, integrand: Integrand, weights_B: np.ndarray | None = None) -> np.ndarray:
    """b_t for every token, (B, T) in float64: the mean of what is to go over the sequences that get as far.

    For a sample it is the mean over the other sequences (a sequence's own would bias the estimate by 1/N), 0 where there is no
    other; with weights, over all of them.

    Args:
      stats: at the base policy. weights_B: the sequences' probabilities where they are an enumeration; none = a sample.
    """
    mask = np.asarray(mask_BT)
    position = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
    togo = np.where(mask, to_go(stats, mask, integrand), 0)
    weight = mask.astype(np.float64) if weights_B is None else mask * np.asarray(weights_B, np.float64)[:, None]
    length = mask.shape[1]
    total = np.bincount(position.ravel(), (weight * togo).ravel(), length)[position]
    count = np.bincount(position.ravel(), weight.ravel(), length)[position]
    if weights_B is None:
        total, count = total - togo, count - 1
    return np.where(mask & (count > 0), total / np.where(count > 0, count, 1), 0)


def to_go(stats: TokenStats, mask_BT: np.ndarray, integrand: Integrand) -> np.ndarray:
    """G_t, the terms of the integrand that the token at t has a say in, (B, T) in float64.

    The entropies after it; the surprisals from it on; the whole of a mean over tokens, whose number it may change.
    """
    if integrand == "entropy_per_token":
        entropies = np.asarray(stats.entropies_BT, np.float64)
        whole = np.sum(entropies, axis=1, keepdims=True) / np.sum(mask_BT, axis=1, keepdims=True)
        return np.broadcast_to(whole, entropies.shape)
    terms = np.asarray(token_terms(stats, mask_BT, integrand), np.float64)
    from_here = np.cumsum(terms[:, ::-1], axis=1)[:, ::-1]
    return from_here - terms if integrand == "entropy" else from_here


def weighted_integrand(apply: Apply, params: Params, batch: Batch, baselines_BT: jax.Array, integrand: Integrand) -> jax.Array:
    """psi of each sequence, (B,), to be differentiated with respect to the parameters; at them it is h."""
    stats = token_stats(apply, params, batch)
    log_ratios = stats.logp_BT - jax.lax.stop_gradient(stats.logp_BT)
    up_to = jnp.cumsum(log_ratios, axis=1)
    before = jnp.exp(up_to - log_ratios)
    if integrand == "entropy":
        weights_BT = before
    elif integrand == "surprisal":
        weights_BT = jnp.exp(up_to)
    else:
        weights_BT = jnp.exp(up_to[:, -1:])
    controls = baselines_BT * before * jnp.expm1(log_ratios)
    return jnp.sum(weights_BT * token_terms(stats, batch.mask_BT, integrand) - controls, axis=1)


def with_baselines(params: Params, batch: Batch, baselines_BT: np.ndarray, sequence_chunk: int) -> tuple[Batch, np.ndarray]:
    """The batch in chunks, and its baselines in the parameters' dtype."""
    dtype = np.promote_types(jax.tree.leaves(params)[0].dtype, np.float32)
    return in_chunks((batch, np.asarray(baselines_BT, dtype)), sequence_chunk)


def orders(
    apply: Apply,
    params: Params,
    directions: Params,
    batch: Batch,
    baselines_BT: np.ndarray,
    integrand: Integrand = "entropy",
    second: bool = True,
    weights_B: np.ndarray | None = None,
    direction_chunk: int = 8,
    sequence_chunk: int = 64,
) -> Orders:
    """dH/deta and d2H/deta2 at 0 along K directions by forward-mode derivatives, in the parameters' dtype.

    Args:
      directions: trees like `params` with a leading axis of K. baselines_BT: of `baselines`.
      weights_B: the sequences' probabilities where they are an enumeration; none = an independent sample, 1/N each.
    """
    size = len(batch.tokens_BT)
    batch = check_sequences(apply, params, batch, weights_B, baselines_BT, "weights_B")
    chunks = with_baselines(params, batch, baselines_BT, sequence_chunk)
    count = len(jax.tree.leaves(directions)[0])

    def of_chunk(part: Params, _: np.ndarray) -> tuple[jax.Array, ...]:
        return _orders(as_partial(apply), params, part, chunks, integrand, second)

    found = _by_directions(directions, np.arange(count), direction_chunk, of_chunk, size)
    weights = np.full(size, 1 / size) if weights_B is None else np.asarray(weights_B, np.float64)
    first, *rest = (part * weights[None] for part in found)
    return Orders(first, rest[0] if rest else None)


@functools.partial(jax.jit, static_argnums=(4, 5))
@jax.default_matmul_precision("highest")
def _orders(
    apply: Partial,
    params: Params,
    directions: Params,
    chunks: tuple[Batch, jax.Array],
    integrand: Integrand,
    second: bool,
) -> tuple[jax.Array, ...]:
    """One or two arrays (directions, chunks, sequences) of derivatives."""

    def of_direction(direction: Params) -> tuple[jax.Array, ...]:
        along = jax.tree.map(lambda p, d: d.astype(p.dtype), params, direction)

        def of_chunk(chunk: tuple[Batch, jax.Array]) -> tuple[jax.Array, ...]:
            def value(params: Params) -> jax.Array:
                return weighted_integrand(apply, params, *chunk, integrand)

            def slope(params: Params) -> jax.Array:
                return jax.jvp(value, (params,), (along,))[1]

            # Along theta itself, not eta: the pass at theta is then the same for all directions, and done once.
            return jax.jvp(slope, (params,), (along,)) if second else (slope(params),)

        return jax.lax.map(of_chunk, chunks)

    return jax.vmap(of_direction)(directions)
