"""The entropy of a policy by enumeration of every completion: what all estimators are held against.

There are of the order of V^T completions of at most T tokens, so this is for small vocabularies and short answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lambda_hat.entropy.sequences import Apply, Batch, as_partial, check_batch, in_chunks, moved, token_stats
from lambda_hat.spec import InvalidInput
from lambda_hat.target import Params

#: Completions beyond which an enumeration is refused: their tokens alone would fill gigabytes.
MAX_COMPLETIONS = 2**24


class Enumeration(NamedTuple):
    """Every completion of some prompts, and each's prompt, (N,)."""

    batch: Batch
    prompt_ids: np.ndarray

    @property
    def num_prompts(self) -> int:
        return int(self.prompt_ids[-1]) + 1


class Derivatives(NamedTuple):
    """Entropy in nats along a direction, H(theta + eta d), at eta = 0: its value and derivatives."""

    entropy: float
    first: float
    second: float


def enumerate_completions(prompts: Sequence[Sequence[int]], vocab_size: int, max_length: int, end_token: int) -> Enumeration:
    """All completions that end with the end token, or after `max_length` tokens without one.

    With V tokens there are (1 + (V-1) + ... + (V-1)^(T-2)) + (V-1)^(T-1) V of T = max_length tokens at most, for each prompt.

    Raises:
      InvalidInput: they are too many.
    """
    count = len(prompts) * (
        sum((vocab_size - 1) ** k for k in range(max_length - 1)) + (vocab_size - 1) ** (max_length - 1) * vocab_size
    )
    if count > MAX_COMPLETIONS:
        raise InvalidInput(
            f"An enumeration is of at most {MAX_COMPLETIONS} completions; got {count} for {len(prompts)} prompts, {vocab_size} "
            f"tokens and max_length={max_length}. Take fewer prompts or shorter answers, or estimate instead."
        )
    finished: list[np.ndarray] = []
    unfinished = np.zeros((1, 0), np.int32)
    vocabulary = np.arange(vocab_size, dtype=np.int32)
    for _ in range(max_length):
        longer = np.concatenate(
            [np.repeat(unfinished, vocab_size, axis=0), np.tile(vocabulary, len(unfinished))[:, None]], axis=1
        )
        ends = longer[:, -1] == end_token
        finished += [longer[ends]]
        unfinished = longer[~ends]
    finished += [unfinished]
    width = max(map(len, prompts)) + max_length
    tokens, masks, ids = [], [], []
    for index, prompt in enumerate(prompts):
        for rows in finished:
            start, stop = len(prompt), len(prompt) + rows.shape[1]
            block = np.full((len(rows), width), end_token, np.int32)
            block[:, :start], block[:, start:stop] = prompt, rows
            tokens += [block]
            masks += [np.tile((np.arange(width) >= start) & (np.arange(width) < stop), (len(rows), 1))]
            ids += [np.full(len(rows), index)]
    return Enumeration(check_batch(Batch(np.concatenate(tokens), np.concatenate(masks))), np.concatenate(ids))


@jax.jit
def _negative_entropy(apply: Partial, params: Params, chunks: Batch) -> jax.Array:
    """sum_x p(x) log p(x) over all completions; those that pad a chunk have log p = 0 and add nothing."""

    def of_chunk(chunk: Batch) -> jax.Array:
        logp_B = jnp.sum(token_stats(apply, params, chunk).logp_BT, axis=1)
        return jnp.sum(jnp.exp(logp_B) * logp_B)

    return jnp.sum(jax.lax.map(of_chunk, chunks))


def completion_probabilities(apply: Apply, params: Params, enumeration: Enumeration, chunk_size: int = 1024) -> np.ndarray:
    """p(x | prompt) / prompts of every completion, (N,) in float64: they sum to 1."""
    with jax.enable_x64(True):
        logp = _log_probabilities(float64(as_partial(apply)), float64(params), in_chunks(enumeration.batch, chunk_size))
    return np.exp(np.asarray(logp).reshape(-1)[: len(enumeration.prompt_ids)]) / enumeration.num_prompts


@jax.jit
def _log_probabilities(apply: Partial, params: Params, chunks: Batch) -> jax.Array:
    return jax.lax.map(lambda chunk: jnp.sum(token_stats(apply, params, chunk).logp_BT, axis=1), chunks)


def exact_entropy(apply: Apply, params: Params, enumeration: Enumeration, chunk_size: int = 1024) -> float:
    """H = -sum_x p(x) log p(x), the mean over the prompts, in nats; computed in float64."""
    with jax.enable_x64(True):
        chunks = in_chunks(enumeration.batch, chunk_size)
        return -float(_negative_entropy(float64(as_partial(apply)), float64(params), chunks)) / enumeration.num_prompts


def exact_derivatives(
    apply: Apply, params: Params, direction: Params, enumeration: Enumeration, chunk_size: int = 1024
) -> Derivatives:
    """H(theta + eta d) and its first two derivatives with respect to eta at 0, in float64."""
    with jax.enable_x64(True):
        chunks = in_chunks(enumeration.batch, chunk_size)
        found = _derivatives(float64(as_partial(apply)), float64(params), float64(direction), chunks)
    return Derivatives(*(-float(value) / enumeration.num_prompts for value in found))


@jax.jit
def _derivatives(apply: Partial, params: Params, direction: Params, chunks: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    def along(eta: jax.Array) -> jax.Array:
        return _negative_entropy(apply, moved(params, direction, eta), chunks)

    def with_slope(eta: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(along, (eta,), (jnp.ones_like(eta),))

    zero = jnp.zeros(())
    (value, first), (_, second) = jax.jvp(with_slope, (zero,), (jnp.ones_like(zero),))
    return value, first, second


def float64(tree: Any) -> Any:
    """Floating arrays on the host in float64; integers as they are."""

    def convert(leaf: Any) -> np.ndarray:
        array = np.asarray(leaf)
        return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree.map(convert, tree)
