"""How the entropy changes along directions in parameter space, estimated from sequences that the policy itself has drawn.

With x ~ pi_theta and h the integrand whose mean is sought, H(theta + eta d) is estimated
- at a finite eta by self-normalised importance sampling (`snis`, of what `evaluate` computes);
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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lambda_hat.entropy.sequences import Apply, Batch, TokenStats, as_partial, in_chunks, moved, token_stats
from lambda_hat.spec import InvalidInput
from lambda_hat.target import Params

#: h of a sequence: the sum of the exact entropies of its tokens' distributions; the sum of its tokens' surprisals, of the same
#: mean; the mean of the entropies over its tokens.
Integrand = Literal["entropy", "surprisal", "entropy_per_token"]

#: Quantiles of log-weights that are reported.
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
#: Resamples of the bootstrap.
NUM_BOOTSTRAP = 200


class Evaluation(NamedTuple):
    """Of each sequence under each of K policies: the log-probability of its completion, and h; (K, N) in float64."""

    logp_KN: np.ndarray
    h_KN: np.ndarray


class Snis(NamedTuple):
    """Estimates of K changes of the entropy, each (K,), and how far to trust them.

    contributions_KN: w_i h'_i - h_i / N with normalised weights: they sum to `change`. jackknife_error, bootstrap_error:
    standard errors over the sequences. ess: 1 / sum w^2, of N. clip_fraction: sequences whose log-weight was clipped.
    log_weight_quantiles: (K, 5), before clipping, at `QUANTILES`.
    """

    change: np.ndarray
    jackknife_error: np.ndarray
    bootstrap_error: np.ndarray
    ess: np.ndarray
    clip_fraction: np.ndarray
    log_weight_quantiles: np.ndarray
    contributions_KN: np.ndarray


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
        return _standard_error(self.first_KN)

    @property
    def second_error(self) -> np.ndarray:
        return _standard_error(self._second)

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


def _standard_error(contributions_KN: np.ndarray) -> np.ndarray:
    """Of the sum over N independent contributions."""
    return np.sqrt(contributions_KN.shape[1]) * np.std(contributions_KN, axis=1, ddof=1)


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
) -> Evaluation:
    """Log-probabilities and integrands under theta + eta_k d_k for K directions, in the parameters' dtype.

    Equal policies give equal numbers to the last bit, whatever the others are, if the chunks' sizes are the same: with an eta
    of 0 it gives the base that `snis` compares with, and rounding cancels. Small changes drown in float32's rounding all the
    same (some 1e-6 of h); there the derivatives serve.

    Args:
      directions: trees like `params` with a leading axis of K.
      direction_chunk, sequence_chunk: policies, and sequences under each, that are evaluated together.
    """
    etas_K = np.asarray(etas_K, np.float64)
    rest = -len(etas_K) % direction_chunk
    directions = jax.tree.map(lambda d: jnp.pad(jnp.asarray(d), ((0, rest), *[(0, 0)] * (d.ndim - 1))), directions)
    chunks = in_chunks(batch, sequence_chunk)
    parts = []
    for start in range(0, len(etas_K) + rest, direction_chunk):
        chosen = slice(start, start + direction_chunk)
        etas = jnp.asarray(np.pad(etas_K, (0, rest))[chosen])
        part = jax.tree.map(lambda d, chosen=chosen: d[chosen], directions)
        parts += [evaluate_chunk(as_partial(apply), params, part, etas, chunks, integrand)]
    shape = (len(etas_K) + rest, -1)
    found = (np.concatenate([np.asarray(part, np.float64) for part in arrays]) for arrays in zip(*parts, strict=True))
    return Evaluation(*(array.reshape(shape)[: len(etas_K), : len(batch.tokens_BT)] for array in found))


@functools.partial(jax.jit, static_argnums=5)
@jax.default_matmul_precision("highest")
def evaluate_chunk(
    apply: Partial, params: Params, directions: Params, etas: jax.Array, chunks: Batch, integrand: Integrand
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and h of a batch in chunks, under all the directions at once; (directions, chunks, sequences) each."""

    def of_policy(direction: Params, eta: jax.Array) -> tuple[jax.Array, jax.Array]:
        there = moved(params, direction, eta)

        def of_chunk(chunk: Batch) -> tuple[jax.Array, jax.Array]:
            stats = token_stats(apply, there, chunk)
            return jnp.sum(stats.logp_BT, axis=1), jnp.sum(token_terms(stats, chunk.mask_BT, integrand), axis=1)

        return jax.lax.map(of_chunk, chunks)

    return jax.vmap(of_policy)(directions, etas)


# --- Importance sampling ---------------------------------------------------------------------------------------------------


def snis(base: Evaluation, there: Evaluation, clip: float | None = None, seed: int = 0) -> Snis:
    """H(there) - H(base) by self-normalised importance sampling, sum_i w_i h'_i - mean_i h_i with w_i ~ pi'(x_i) / pi(x_i).

    The sequences are independent draws from the base policy. The estimate is biased by O(1/ESS). Both standard errors are of
    the whole estimate, the difference included: errors scale with eta like the change itself, so that a straight line over eta
    says nothing of them.

    Args:
      base: of one policy, the first of what is given. there: of K policies, on the same sequences.
      clip: log-weights are cut to +- this; it biases the estimate. none = none.
      seed: of the bootstrap.
    """
    h0 = base.h_KN[0]
    size = len(h0)
    raw = there.logp_KN - base.logp_KN[0][None]
    log_weights = raw if clip is None else np.clip(raw, -clip, clip)
    weights = np.exp(log_weights - np.max(log_weights, axis=1, keepdims=True))
    sums = np.sum(weights, axis=1, keepdims=True)
    normalized = weights / sums
    # Written with differences, so that the same policy gives exactly 0.
    contributions = normalized * (there.h_KN - h0[None]) + (normalized - 1 / np.float64(size)) * h0[None]
    weighted = weights * there.h_KN
    with np.errstate(divide="ignore", invalid="ignore"):  # of one sequence that has all the weight, nothing is known
        left_out = (np.sum(weighted, axis=1, keepdims=True) - weighted) / (sums - weights)
    left_out = left_out - ((np.sum(h0) - h0) / (size - 1))[None]
    spread = left_out - np.mean(left_out, axis=1, keepdims=True)
    counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=NUM_BOOTSTRAP).astype(np.float64)
    resampled = (weighted @ counts.T) / (weights @ counts.T) - (counts @ h0 / size)[None]
    return Snis(
        np.sum(contributions, axis=1),
        np.sqrt((size - 1) / size * np.sum(np.square(spread), axis=1)),
        np.std(resampled, axis=1, ddof=1),
        1 / np.sum(np.square(normalized), axis=1),
        np.mean(raw != log_weights, axis=1),
        np.quantile(raw, QUANTILES, axis=1).T,
        contributions,
    )


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
    dtype = np.promote_types(jax.tree.leaves(params)[0].dtype, np.float32)
    padded = jnp.pad(jnp.asarray(baselines_BT, dtype), ((0, -size % sequence_chunk), (0, 0)))
    chunks = (in_chunks(batch, sequence_chunk), padded.reshape(-1, sequence_chunk, padded.shape[1]))
    directions = jax.tree.map(lambda p, d: jnp.asarray(d, p.dtype), params, directions)
    found = _orders(as_partial(apply), params, directions, chunks, integrand, second, direction_chunk)
    weights = np.full(size, 1 / size) if weights_B is None else np.asarray(weights_B, np.float64)
    first, *rest = (np.asarray(part, np.float64).reshape(len(part), -1)[:, :size] * weights[None] for part in found)
    return Orders(first, rest[0] if rest else None)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
@jax.default_matmul_precision("highest")
def _orders(
    apply: Partial,
    params: Params,
    directions: Params,
    chunks: tuple[Batch, jax.Array],
    integrand: Integrand,
    second: bool,
    direction_chunk: int,
) -> tuple[jax.Array, ...]:
    """One or two arrays (directions, chunks, sequences) of derivatives."""

    def of_direction(direction: Params) -> tuple[jax.Array, ...]:
        def of_chunk(chunk: tuple[Batch, jax.Array]) -> tuple[jax.Array, ...]:
            def value(params: Params) -> jax.Array:
                return weighted_integrand(apply, params, *chunk, integrand)

            def slope(params: Params) -> jax.Array:
                return jax.jvp(value, (params,), (direction,))[1]

            # Along theta itself, not eta: the pass at theta is then the same for all directions, and done once.
            return jax.jvp(slope, (params,), (direction,)) if second else (slope(params),)

        return jax.lax.map(of_chunk, chunks)

    return jax.lax.map(of_direction, directions, batch_size=direction_chunk)
