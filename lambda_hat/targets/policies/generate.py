"""Sampling completions: one compiled loop over tokens, side by side over sequences, with a cache of keys and values."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lambda_hat.targets.policies.decoder import Apply, Decoder
from lambda_hat.targets.policies.tokenizer import EOS, PAD
from lambda_hat.targets.target import Params


class Samples(NamedTuple):
    """Sequences, each a prompt then its completion, padded on the right: T = P + L.

    tokens: (B, T), int32. mask: (B, T), bool, True at the completion's tokens, the end token included. completions: (B, L), the
    same tokens from each completion's start, PAD after the end token. log_probs, entropies: (B, T), at each token of a
    completion log pi(token | those before) and H(pi(. | those before)), in nats, 0 elsewhere; both of the policy itself,
    whatever temperature and top_p the tokens were drawn with.
    """

    tokens: jax.Array
    mask: jax.Array
    completions: jax.Array
    log_probs: jax.Array
    entropies: jax.Array


def generate(
    decoder: Decoder,
    params: Params,
    keys_B: jax.Array,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    max_length: int,
    temperature: float | jax.Array = 1.0,
    top_p: float = 1.0,
    end_token: int | jax.Array = EOS,
) -> Samples:
    """Draws one completion of each prompt, up to its end token or `max_length` = L tokens.

    A token is drawn from pi^(1/temperature), normalised, restricted to the nucleus: the likeliest tokens, as few as have
    probability top_p together (arXiv 1904.09751).

    Args:
      keys_B: a key for each sequence. It alone, with the prompt, decides the completion, whatever else is in the batch, but
        for rounding, which may differ between batches of different sizes.
      prompts_BP, lengths_B: padded on the right, and the tokens of each, at least one.
      temperature: above 0. top_p: above 0, at most 1, which is no restriction.
      end_token: one, or several in an array, each of which ends a completion.
    """
    return _generate(decoder, params, keys_B, prompts_BP, lengths_B, max_length, temperature, top_p, end_token, top_p < 1)


@functools.partial(jax.jit, static_argnames=("decoder", "max_length", "nucleus"))
def _generate(
    decoder: Decoder,
    params: Params,
    keys_B: jax.Array,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    max_length: int,
    temperature: jax.Array,
    top_p: jax.Array,
    end_token: jax.Array,
    nucleus: bool,
) -> Samples:
    batch, width = prompts_BP.shape
    dtype = jax.tree.leaves(params)[0].dtype
    caches = decoder.init_caches(batch, width + max_length, dtype)
    # The logits are not used: the loop begins with the last token of the prompt, which is as far in for every sequence.
    _, caches = decoder.step(params, caches, prompts_BP, jnp.zeros_like(lengths_B))
    last_B = jnp.take_along_axis(prompts_BP, lengths_B[:, None] - 1, axis=1)[:, 0]

    def draw(key: jax.Array, log_probs_V: jax.Array) -> jax.Array:
        log_probs_V = jax.nn.log_softmax(log_probs_V / jnp.asarray(temperature, log_probs_V.dtype))
        if nucleus:
            log_probs_V = _nucleus(log_probs_V, top_p)
        # The token whose share of [0, 1) holds a uniform number: one number, where the largest of V Gumbels would take V.
        ends_V = jnp.cumsum(jnp.exp(log_probs_V))
        u = jax.random.uniform(key, dtype=ends_V.dtype) * ends_V[-1]
        return jnp.sum(ends_V <= u, dtype=jnp.int32)

    def goes_on(carry: tuple) -> jax.Array:
        t, _, _, done_B, *_ = carry
        return (t < max_length) & ~jnp.all(done_B)

    def body(carry: tuple) -> tuple:
        t, caches, token_B, done_B, completions, log_probs, entropies = carry
        logits_BV, caches = decoder.step(params, caches, token_B[:, None], lengths_B - 1 + t)
        log_probs_BV = log_softmax(logits_BV[:, 0])
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, t)
        token_B = jnp.where(done_B, PAD, jax.vmap(draw)(keys, log_probs_BV))
        chosen_B = jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=1)[:, 0]
        completions = completions.at[:, t].set(token_B)
        log_probs = log_probs.at[:, t].set(jnp.where(done_B, 0, chosen_B))
        entropies = entropies.at[:, t].set(jnp.where(done_B, 0, entropy(log_probs_BV)))
        return t + 1, caches, token_B, done_B | jnp.isin(token_B, end_token), completions, log_probs, entropies

    dtype = jax.eval_shape(log_softmax, jax.ShapeDtypeStruct((1,), dtype)).dtype
    shape = (batch, max_length)
    results = (jnp.full(shape, PAD, jnp.int32), jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    carry = (jnp.int32(0), caches, last_B, jnp.zeros(batch, bool), *results)
    *_, completions, log_probs, entropies = jax.lax.while_loop(goes_on, body, carry)
    place = functools.partial(_placed, lengths_B=lengths_B, width=width)
    tokens, mask = sequences(prompts_BP, lengths_B, completions, end_token)
    return Samples(tokens, mask, completions, place(log_probs), place(entropies))


def _placed(values_BL: jax.Array, lengths_B: jax.Array, width: int) -> jax.Array:
    """Values of the tokens of completions at their places in the sequences, (B, width + L), 0 elsewhere: PAD is 0."""

    def one(values_L: jax.Array, length: jax.Array) -> jax.Array:
        empty = jnp.zeros(width + len(values_L), values_L.dtype)
        return jax.lax.dynamic_update_slice_in_dim(empty, values_L, length, axis=0)

    return jax.vmap(one)(values_BL, lengths_B)


def _nucleus(log_probs_V: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf for tokens outside the nucleus; a token is inside if those likelier than it have less than top_p together."""
    order = jnp.argsort(-log_probs_V)
    probs = jnp.exp(log_probs_V[order])
    likelier = jnp.cumsum(probs) - probs
    kept = jnp.zeros(log_probs_V.shape, bool).at[order].set(likelier < top_p)
    return jnp.where(kept, log_probs_V, -jnp.inf)


def sequences(
    prompts_BP: Any, lengths_B: Any, completions_BL: Any, end_token: int | jax.Array = EOS
) -> tuple[jax.Array, jax.Array]:
    """Tokens (B, P + L) of the prompts followed by their completions, and the mask of the completions' tokens.

    Args:
      completions_BL: each up to its first end token, then PAD, or without an end token all L tokens.
      end_token: see `generate`.
    """
    width = prompts_BP.shape[1]
    place = functools.partial(_placed, lengths_B=lengths_B, width=width)
    prompts_BP = jnp.where(jnp.arange(width, dtype=jnp.int32)[None] < lengths_B[:, None], prompts_BP, PAD)
    tokens = jnp.pad(prompts_BP, ((0, 0), (0, completions_BL.shape[1]))) + place(completions_BL)
    is_end = jnp.isin(completions_BL, end_token).astype(jnp.int32)
    return tokens, place(jnp.cumsum(is_end, axis=1) == is_end)


def log_softmax(logits: jax.Array) -> jax.Array:
    """log pi over the last axis, in float32 at least."""
    return jax.nn.log_softmax(logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32))


def entropy(log_probs: jax.Array) -> jax.Array:
    """H = -sum_v p_v log p_v over the last axis, in nats."""
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def token_statistics(apply: Apply, params: Params, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log pi(token_t | tokens before t) and the entropy H_t of that distribution, both (B, T), 0 at t = 0."""
    log_probs_BTV = log_softmax(apply(params, tokens_BT)[:, :-1])
    chosen = jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=2)[..., 0]
    at_start = ((0, 0), (1, 0))
    return jnp.pad(chosen, at_start), jnp.pad(entropy(log_probs_BTV), at_start)
