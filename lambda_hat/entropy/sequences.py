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

from lambda_hat.entropy.checks import check_finite
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.decoder import Apply
from lambda_hat.targets.policies.generate import token_statistics
from lambda_hat.targets.target import Params, chunk_size

Arrays = TypeVar("Arrays")


#: Under jit, so that a policy is traced for its vocabulary once.
_logits = jax.jit(lambda apply, params, tokens_BT: apply(params, tokens_BT))


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


def check_batch(batch: Batch, attention_BT: Any = None) -> Batch:
    """The batch on the host, as int32 tokens and a mask of bool, padded on the right.

    Args:
      attention_BT: which tokens are the sequence's and not padding, as Hugging Face's `attention_mask`: what is padded on the
        left begins at its first token then. None = all from the first on.

    Raises:
      InvalidInput: shapes differ, tokens are no whole numbers, a completion is empty, is not one run of tokens, or has no token
        before it; the batch is padded on the left, or within a sequence.
    """
    tokens, mask = np.asarray(batch.tokens_BT), np.asarray(batch.mask_BT).astype(bool)
    attention = np.ones_like(mask) if attention_BT is None else np.asarray(attention_BT).astype(bool)
    if tokens.ndim != 2 or not tokens.shape == mask.shape == attention.shape:
        raise InvalidInput(
            f"Tokens and masks must have one shape (sequences, length); got {tokens.shape} and "
            f"{mask.shape if attention_BT is None else (mask.shape, attention.shape)}. Pad on the right."
        )
    if not len(tokens) or not np.issubdtype(tokens.dtype, np.integer):
        raise InvalidInput(
            f"Tokens must be whole numbers, of one sequence at least; got {len(tokens)} sequences of {tokens.dtype}. "
            "Pass their ids."
        )
    if attention_BT is None:
        _refuse_left_padding(tokens, mask)
    else:
        tokens, mask = _from_the_left(tokens, mask, attention)
    runs = np.sum(np.diff(mask.astype(np.int8), axis=1) == 1, axis=1)
    wrong = np.flatnonzero(mask[:, 0] | (runs != 1))
    if wrong.size:
        raise InvalidInput(
            "A completion must be one run of at least one token after a prompt of at least one; got the mask "
            f"{mask[wrong[0]].astype(int).tolist()} for sequence {wrong[0]}. Begin prompts with a start token."
        )
    return Batch(tokens.astype(np.int32), mask)


def _from_the_left(tokens: np.ndarray, mask: np.ndarray, attention: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence moved to begin at its first token that is no padding."""
    starts, counts = np.argmax(attention, axis=1), np.sum(attention, axis=1)
    places = np.arange(tokens.shape[1])[None]
    runs = attention == ((places >= starts[:, None]) & (places < (starts + counts)[:, None]))
    wrong = np.flatnonzero(~runs.all(axis=1) | (counts == 0) | (mask & ~attention).any(axis=1))
    if wrong.size:
        raise InvalidInput(
            "A sequence's tokens must be one run with its completion inside; got the attention mask "
            f"{attention[wrong[0]].astype(int).tolist()} for sequence {wrong[0]}. Pad at the ends alone."
        )
    moved = (places + starts[:, None]) % tokens.shape[1]
    return np.take_along_axis(tokens, moved, axis=1), np.take_along_axis(mask, moved, axis=1)


def _refuse_left_padding(tokens: np.ndarray, mask: np.ndarray) -> None:
    """Raises InvalidInput: completions begin at one place, behind prompts that one token, found nowhere else in them, fills up
    on the left, to that of the longest or to a start token. To the policy it would be text."""
    starts = np.argmax(mask, axis=1)
    longest = np.argmax(np.cumprod(tokens == tokens[:, :1], axis=1).sum(axis=1))
    pad = tokens[longest, 0]
    runs = np.cumprod(tokens == pad, axis=1).sum(axis=1)
    if np.ptp(starts) or runs.max() < 2 or runs.min() == runs.max() or runs.max() >= starts[0]:
        return
    within = (np.arange(tokens.shape[1])[None] >= runs[:, None]) & (np.arange(tokens.shape[1])[None] < starts[:, None])
    first = tokens[np.arange(len(tokens)), runs]
    if not (within & (tokens == pad)).any() and (runs.min() == 0 or len(set(first.tolist())) == 1):
        raise InvalidInput(
            f"Sequences must be padded on the right; some begin with up to {runs.max()} tokens {pad} that others have not. "
            "Call check_batch with attention_BT, which is 0 at padding."
        )


def as_partial(apply: Apply) -> Partial:
    """The policy as a pytree, so that arrays which it holds are arguments of compiled programs."""
    return apply if isinstance(apply, Partial) else Partial(apply)


def check_sequences(
    apply: Apply, params: Params, batch: Batch, weights_B: Any = None, baselines_BT: Any = None, what: str = "weights"
) -> Batch:
    """The batch on the host, as `check_batch` has it.

    Args:
      weights_B: a finite number for each sequence, called `what`. baselines_BT: one for each token.

    Raises:
      InvalidInput: the batch, see `check_batch`; a token is not one of the policy's; a parameter, a weight or a baseline is not
        finite; or there are not as many as sequences or tokens.
    """
    batch = check_batch(batch)
    tokens = batch.tokens_BT
    check_finite("params", params)
    for name, given, shape in ((what, weights_B, tokens.shape[:1]), ("baselines_BT", baselines_BT, tokens.shape)):
        if given is None:
            continue
        array = np.asarray(given)
        if array.shape != shape:
            of = "sequence" if len(shape) == 1 else "token"
            raise InvalidInput(f"{name} must hold a number for each {of}, {shape}; got {array.shape}. Make them of this batch.")
        check_finite(name, array)
    logits = jax.eval_shape(_logits, as_partial(apply), params, tokens[:1])
    if logits.shape[:2] != tokens[:1].shape or logits.ndim != 3:
        raise InvalidInput(
            f"A policy must give logits (sequences, length, vocabulary) of tokens (sequences, length); got {logits.shape} of "
            f"{tokens[:1].shape}. Return them for every position."
        )
    wrong = np.argwhere((tokens < 0) | (tokens >= logits.shape[2]))
    if len(wrong):
        row, column = wrong[0]
        raise InvalidInput(
            f"Tokens must be numbers from 0 to {logits.shape[2] - 1}, of the policy's vocabulary; got {tokens[row, column]} in "
            f"sequence {row} at {column}. Pad with one of its tokens, and use its own tokenizer."
        )
    return batch


def token_stats(apply: Apply, params: Params, batch: Batch) -> TokenStats:
    """Log-probabilities and exact token entropies of the completions, at least in float32; traceable."""
    mask_BT = jnp.asarray(batch.mask_BT)
    stats = token_statistics(apply, params, jnp.asarray(batch.tokens_BT))
    return TokenStats(*(jnp.where(mask_BT, array, 0) for array in stats))


@jax.jit
def _token_stats(apply: Partial, params: Params, chunks: Batch) -> TokenStats:
    return jax.lax.map(lambda chunk: token_stats(apply, params, chunk), chunks)


def all_token_stats(apply: Apply, params: Params, batch: Batch, sequence_chunk: int = 64) -> TokenStats:
    """`token_stats` on the host, at most `sequence_chunk` sequences at a time.

    Raises:
      InvalidInput: see `check_sequences`.
    """
    batch = check_sequences(apply, params, batch)
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
