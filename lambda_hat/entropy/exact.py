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

from lambda_hat.entropy.sequences import Batch, as_partial, check_batch, in_chunks, moved, token_stats
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.decoder import Apply
from lambda_hat.targets.target import Params

#: Completions beyond which an enumeration is refused: their tokens alone would fill gigabytes.
MAX_COMPLETIONS = 2**24


class Enumeration(NamedTuple):
    """Every completion of some prompts.

    prompt_ids: each's prompt, by its place, (N,). endings: of the batch, those that end with the end token, as a mask (N,).
    """

    batch: Batch
    prompt_ids: np.ndarray
    endings: np.ndarray

    @property
    def num_prompts(self) -> int:
        return int(self.prompt_ids[-1]) + 1


class Derivatives(NamedTuple):
    """Entropy in nats along a direction, H(theta + eta d), at eta = 0: its value and derivatives."""

    entropy: float
    first: float
    second: float


def check_enumerable(num_prompts: int, vocab_size: int, max_length: int) -> None:
    """Raises InvalidInput if there are more completions than `enumerate_completions` takes."""
    count = num_prompts * (
        sum((vocab_size - 1) ** k for k in range(max_length - 1)) + (vocab_size - 1) ** (max_length - 1) * vocab_size
    )
    if count > MAX_COMPLETIONS:
        raise InvalidInput(
            f"An enumeration is of at most {MAX_COMPLETIONS} completions; got {count} for {num_prompts} prompts, {vocab_size} "
            f"tokens and max_length={max_length}. Take fewer prompts or shorter answers, or estimate instead."
        )


def enumerate_completions(prompts: Sequence[Sequence[int]], vocab_size: int, max_length: int, end_token: int) -> Enumeration:
    """All completions that end with the end token, or after `max_length` tokens without one.

    With V tokens there are (1 + (V-1) + ... + (V-1)^(T-2)) + (V-1)^(T-1) V of T = max_length tokens at most, for each prompt.

    Raises:
      InvalidInput: they are too many.
    """
    check_enumerable(len(prompts), vocab_size, max_length)
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
    batch = check_batch(Batch(np.concatenate(tokens), np.concatenate(masks)))
    endings = np.any(batch.mask_BT & (batch.tokens_BT == end_token), axis=1)
    return Enumeration(batch, np.concatenate(ids), endings)


def _tree(enumeration: Enumeration, chunk_size: int) -> tuple[Batch, np.ndarray]:
    """One completion for every leaf but the last tokens' of the tree of completions, and which of its tokens lead to the leaf.

    The last token's distribution enters by its entropy, and any one last token, the end token, gives it: V times less work than
    -sum_x p(x) log p(x) over all completions. In chunks.
    """
    batch = Batch(*(array[enumeration.endings] for array in enumeration.batch))
    leading = batch.mask_BT & (np.cumsum(batch.mask_BT, axis=1) < np.max(np.sum(batch.mask_BT, axis=1)))
    return in_chunks((batch, leading), chunk_size)


@jax.jit
def _entropy(apply: Partial, params: Params, tree: tuple[Batch, Any]) -> jax.Array:
    """The sum over prompts of sum_x p(x) sum_t H_t, over the leaves x of the tree; sequences that pad a chunk have no H_t."""

    def of_chunk(chunk: tuple[Batch, Any]) -> jax.Array:
        batch, leading_BT = chunk
        stats = token_stats(apply, params, batch)
        p_B = jnp.exp(jnp.sum(jnp.where(leading_BT, stats.logp_BT, 0), axis=1))
        return jnp.sum(p_B * jnp.sum(stats.entropies_BT, axis=1))

    return jnp.sum(jax.lax.map(of_chunk, tree))


def completion_probabilities(apply: Apply, params: Params, enumeration: Enumeration, chunk_size: int = 1024) -> np.ndarray:
    """p(x | prompt) / prompts of every completion, (N,) in float64: they sum to 1."""
    with jax.enable_x64(True):
        logp = _log_probabilities(float64(as_partial(apply)), float64(params), in_chunks(enumeration.batch, chunk_size))
    return np.exp(np.asarray(logp).reshape(-1)[: len(enumeration.prompt_ids)]) / enumeration.num_prompts


@jax.jit
def _log_probabilities(apply: Partial, params: Params, chunks: Batch) -> jax.Array:
    return jax.lax.map(lambda chunk: jnp.sum(token_stats(apply, params, chunk).logp_BT, axis=1), chunks)


def exact_entropy(apply: Apply, params: Params, enumeration: Enumeration, chunk_size: int = 1024) -> float:
    """H = -sum_x p(x) log p(x) = sum_x p(x) sum_t H_t, the mean over the prompts, in nats; computed in float64."""
    with jax.enable_x64(True):
        total = _entropy(float64(as_partial(apply)), float64(params), _tree(enumeration, chunk_size))
    return float(total) / enumeration.num_prompts


def exact_derivatives(
    apply: Apply, params: Params, direction: Params, enumeration: Enumeration, chunk_size: int = 1024
) -> Derivatives:
    """H(theta + eta d) and its first two derivatives with respect to eta at 0, in float64."""
    with jax.enable_x64(True):
        tree = _tree(enumeration, chunk_size)
        found = _derivatives(float64(as_partial(apply)), float64(params), float64(direction), tree)
    return Derivatives(*(float(value) / enumeration.num_prompts for value in found))


@jax.jit
def _derivatives(
    apply: Partial, params: Params, direction: Params, tree: tuple[Batch, Any]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def along(eta: jax.Array) -> jax.Array:
        return _entropy(apply, moved(params, direction, eta), tree)

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
