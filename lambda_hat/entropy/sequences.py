"""Sequences of tokens, and what a policy says of each token.

Arrays are tokens, never text: a sequence is a prompt and its completion, padded on the right. The token at t is predicted by
the logits at t - 1. Everything takes the policy as `apply`: (params, tokens_BT) -> logits_BTV, causal, with float32 logits or
better where precision matters. Large arrays that it needs besides `params` (a frozen base model under adapters) do not become
constants of the compiled programs if it is a `jax.tree_util.Partial` that holds them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lambda_hat.policies.decoder import Apply
from lambda_hat.policies.generate import token_statistics
from lambda_hat.spec import InvalidInput
from lambda_hat.target import Params, chunk_size

Arrays = TypeVar("Arrays")


class Batch(NamedTuple):
    """Sequences as the device sees them: int32 tokens, and which of them are the completion's, the end token included."""

    tokens_BT: Any
    mask_BT: Any


class TokenStats(NamedTuple):
    """Of each completion token: its log-probability, and the entropy in nats of the distribution it was drawn from.

    Both (B, T), 0 elsewhere. The surprisal is -logp_BT.
    """

    logp_BT: Any
    entropies_BT: Any


def check_batch(batch: Batch) -> Batch:
    """The batch on the host, as int32 tokens and a mask of bool.

    Raises:
      InvalidInput: shapes differ, or a completion is empty, is not one run of tokens, or has no token before it.
    """
    tokens, mask = np.asarray(batch.tokens_BT), np.asarray(batch.mask_BT).astype(bool)
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise InvalidInput(
            f"Tokens and mask must have one shape (sequences, length); got {tokens.shape} and {mask.shape}. Pad on the right."
        )
    runs = np.sum(np.diff(mask.astype(np.int8), axis=1) == 1, axis=1)
    wrong = np.flatnonzero(mask[:, 0] | (runs != 1))
    if wrong.size:
        raise InvalidInput(
            "A completion must be one run of at least one token after a prompt of at least one; got the mask "
            f"{mask[wrong[0]].astype(int).tolist()} for sequence {wrong[0]}. Begin prompts with a start token."
        )
    return Batch(tokens.astype(np.int32), mask)


def as_partial(apply: Apply) -> Partial:
    """The policy as a pytree, so that arrays which it holds are arguments of compiled programs."""
    return apply if isinstance(apply, Partial) else Partial(apply)


def token_stats(apply: Apply, params: Params, batch: Batch) -> TokenStats:
    """Log-probabilities and exact token entropies of the completions, at least in float32; traceable."""
    mask_BT = jnp.asarray(batch.mask_BT)
    stats = token_statistics(apply, params, jnp.asarray(batch.tokens_BT))
    return TokenStats(*(jnp.where(mask_BT, array, 0) for array in stats))


@jax.jit
def _token_stats(apply: Partial, params: Params, chunks: Batch) -> TokenStats:
    return jax.lax.map(lambda chunk: token_stats(apply, params, chunk), chunks)


def all_token_stats(apply: Apply, params: Params, batch: Batch, sequence_chunk: int = 64) -> TokenStats:
    """`token_stats` on the host, at most `sequence_chunk` sequences at a time."""
    size = len(batch.tokens_BT)
    stats = _token_stats(as_partial(apply), params, in_chunks(batch, sequence_chunk))
    return TokenStats(*(np.asarray(array).reshape(-1, array.shape[-1])[:size] for array in stats))


def in_chunks(arrays: Arrays, most: int) -> Arrays:
    """Arrays of sequences, on the host, in the fewest chunks of at most `most`, (chunks, size, ...), of nearly equal sizes.

    Zeros fill up the last: sequences of zeros have no completion and add nothing.
    """
    size = chunk_size(len(jax.tree.leaves(arrays)[0]), most)

    def cut(array: Any) -> np.ndarray:
        array = np.asarray(array)
        padded = np.pad(array, ((0, -len(array) % size), *((0, 0),) * (array.ndim - 1)))
        return padded.reshape(-1, size, *array.shape[1:])

    return jax.tree.map(cut, arrays)


def moved(params: Params, direction: Params, eta: jax.Array) -> Params:
    """theta + eta d, each tensor in its own dtype; traceable."""
    return jax.tree.map(lambda p, d: p + eta.astype(p.dtype) * d.astype(p.dtype), params, direction)
