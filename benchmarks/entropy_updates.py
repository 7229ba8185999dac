"""Policies small enough to enumerate, their exact entropies, and updates redrawn at their checkpoints: for
`benchmarks/entropy_science.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from lambda_hat.entropy.adamw import AdamW, Update, aggregate_gradient, take_apart
from lambda_hat.entropy.exact import Enumeration, enumerate_completions, exact_entropy, float64
from lambda_hat.entropy.sequences import Batch, TokenStats, all_token_stats, in_chunks, token_stats
from lambda_hat.targets.policies.generate import generate
from lambda_hat.targets.policies.objective import group_advantages, negative_log_likelihoods, sequence_weights
from lambda_hat.targets.policies.spec import PolicySpec
from lambda_hat.targets.policies.tasks import rewards
from lambda_hat.targets.policies.train import PolicyCheckpoint, TrainedPolicy, answers_dataset
from lambda_hat.targets.target import Params

SEEDS, CHECKPOINTS, REDRAWN = (0, 1, 2, 3), 11, 4
SPEC = PolicySpec(rl={"num_checkpoints": CHECKPOINTS})
NETWORK, TASK, RL = SPEC.decoder(), SPEC.tokenized(), SPEC.rl
PROMPTS = TASK.prompts()
HYPER = AdamW(RL.beta1, RL.beta2, RL.epsilon, RL.weight_decay, RL.max_norm or np.inf)
DIRECTIONS = {"gradient": "plain gradient, -g", "parts": "AdamW's parts, sum v_i", "full": "AdamW's step, v = b + sum v_i"}


class Exact(NamedTuple):
    """At a checkpoint, means over all prompts: H of a completion and per token, the probability of the answer, the gradient of
    H, and that with the probabilities of states held fixed."""

    entropy: float
    token_entropy: float
    accuracy: float
    gradient: Params
    fixed_gradient: Params


class Drawn(NamedTuple):
    """An update's sequences, drawn anew."""

    batch: Batch
    rewards: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray


# --- Exact values ----------------------------------------------------------------------------------------------------------


def enumeration() -> Enumeration:
    rows = [tokens[:length].tolist() for tokens, length in zip(PROMPTS.tokens, PROMPTS.lengths, strict=True)]
    return enumerate_completions(rows, TASK.tokenizer.vocab_size, TASK.max_length, TASK.end_token)


@jax.jit
def _exact(params: Params, chunks: tuple[Batch, Any]) -> Any:
    """Sums over the tree of completions, with H by the entropies at its nodes, and their gradients."""

    def sums(params: Params, batch: Batch, leading_BT: Any) -> tuple[jax.Array, jax.Array]:
        found = token_stats(NETWORK.apply, params, batch)
        p_B = jnp.exp(jnp.sum(jnp.where(leading_BT, found.logp_BT, 0), axis=1))
        h_B = jnp.sum(found.entropies_BT, axis=1)
        length = jnp.sum(p_B * jnp.sum(batch.mask_BT, axis=1).astype(p_B.dtype))
        values = jnp.stack([jnp.sum(p_B * h_B), jnp.sum(jax.lax.stop_gradient(p_B) * h_B)])
        return values, jnp.append(values, length)

    def add(total: Any, chunk: Any) -> Any:
        return jax.tree.map(jnp.add, total, jax.jacrev(sums, has_aux=True)(params, *chunk)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape), leaf.dtype), params)
    return jax.lax.scan(add, (zeros, jnp.zeros(3)), chunks)[0]


def exact(params: Params, every: Enumeration) -> Exact:
    batch = Batch(*(array[every.endings] for array in every.batch))
    # The last token that there can be is any: its distribution enters by its entropy.
    leading = batch.mask_BT & (np.cumsum(batch.mask_BT, axis=1) < TASK.max_length)
    chunks = in_chunks(batch, 512), in_chunks(Batch(leading, leading), 512).mask_BT
    answers = answers_dataset(TASK, None).samples
    with jax.enable_x64(True):
        wide = float64(params)
        gradients, (entropy, _, length) = jax.tree.map(np.asarray, _exact(wide, chunks))
        right = np.exp(-np.asarray(negative_log_likelihoods(NETWORK.apply, wide, answers["tokens"], answers["mask"])))
    count = every.num_prompts
    first, fixed = (jax.tree.map(lambda leaf, index=index: leaf[index] / count, gradients) for index in (0, 1))
    return Exact(float(entropy) / count, float(entropy / length), float(np.mean(right)), first, fixed)


def dot(one: Params, other: Params) -> float:
    return float(sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)))


# --- Updates drawn anew ----------------------------------------------------------------------------------------------------


def draw(params: Params, ids: np.ndarray, seed: tuple[int, ...]) -> tuple[Batch, np.ndarray]:
    """A completion of each prompt, and its reward."""
    keys = jax.random.split(jax.random.key(np.random.default_rng(seed).integers(2**31)), len(ids))
    samples = generate(NETWORK, params, keys, PROMPTS.tokens[ids], PROMPTS.lengths[ids], TASK.max_length)
    right = np.asarray(rewards(samples.completions, PROMPTS.answers[ids]), np.float64)
    return Batch(np.asarray(samples.tokens), np.asarray(samples.mask)), right


def draw_update(params: Params, seed: tuple[int, ...]) -> Drawn:
    ids = np.random.default_rng((*seed, 1)).integers(0, len(PROMPTS.texts), RL.num_prompts)
    return with_rewards(*draw(params, np.repeat(ids, RL.num_completions), seed))


def with_rewards(batch: Batch, right: np.ndarray) -> Drawn:
    groups = (RL.num_prompts, RL.num_completions)
    advantages = group_advantages(right.reshape(groups))
    weights = sequence_weights(advantages, batch.mask_BT.sum(axis=1).reshape(groups))
    return Drawn(batch, right, advantages.ravel(), weights.ravel())


def update_of(saved: PolicyCheckpoint, drawn: Drawn) -> tuple[Params, Update]:
    gradient = aggregate_gradient(NETWORK.apply, saved.params, drawn.batch, drawn.weights, 64)
    return gradient, take_apart(HYPER, saved, saved.params, gradient)


@jax.jit
def _along(params: Params, batch: Batch, direction: Params) -> tuple[jax.Array, jax.Array]:
    """Sums over each sequence's states of -Cov_{a ~ pi}(log pi(a), dz(a)), and of dH_t by differentiating H_t."""
    tokens_BT = jnp.asarray(batch.tokens_BT)
    logits, change = jax.jvp(lambda params: NETWORK.apply(params, tokens_BT)[:, :-1], (params,), (direction,))
    log_p = jax.nn.log_softmax(logits)
    p, mask = jnp.exp(log_p), jnp.asarray(batch.mask_BT)[:, 1:]
    centred = log_p - jnp.sum(p * log_p, axis=-1, keepdims=True)
    by_covariance = jnp.sum(jnp.where(mask, -jnp.sum(p * centred * change, axis=-1), 0), axis=1)
    slopes = jax.jvp(lambda params: token_stats(NETWORK.apply, params, batch).entropies_BT, (params,), (direction,))[1]
    return by_covariance, jnp.sum(slopes, axis=1)


def slopes_of(params: Params, drawn: Drawn, direction: Params) -> np.ndarray:
    """g_i . d of every sequence."""
    return np.asarray(_loss_slopes(params, drawn.batch, drawn.weights, direction))


@jax.jit
def _loss_slopes(params: Params, batch: Batch, weights: jax.Array, direction: Params) -> jax.Array:
    def losses(params: Params) -> jax.Array:
        return weights * negative_log_likelihoods(NETWORK.apply, params, batch.tokens_BT, batch.mask_BT)

    return jax.jvp(losses, (params,), (direction,))[1]


class Redrawn(NamedTuple):
    updates: pd.DataFrame  # a row per update
    sequences: pd.DataFrame  # a row per training sequence with an advantage


def shuffled(drawn: Drawn, seed: tuple[int, ...]) -> Drawn:
    """The same sequences, with the rewards in each group at random: a covariance of either sign."""
    groups = drawn.rewards.reshape(-1, RL.num_completions)
    order = np.random.default_rng((*seed, 2)).permuted(np.tile(np.arange(RL.num_completions), (len(groups), 1)), axis=1)
    return with_rewards(drawn.batch, np.take_along_axis(groups, order, axis=1).ravel())


def redraw(policies: dict[int, TrainedPolicy], known: dict[tuple[int, int], Exact], every: Enumeration) -> Redrawn:
    updates, sequences = [], []
    for (seed, step), values in known.items():
        saved = policies[seed].checkpoints[step]
        with jax.enable_x64(True):
            wide = PolicyCheckpoint(*float64(tuple(saved)))
            for number in range(REDRAWN):
                with jax.enable_x64(False):
                    drawn = draw_update(saved.params, (seed, step, number))
                found = all_token_stats(NETWORK.apply, wide.params, drawn.batch, 256)
                for rewarded in (drawn, shuffled(drawn, (seed, step, number))):
                    row, update = _taken_apart(wide, values, rewarded, found)
                    row |= {"seed": seed, "step": step, "number": number, "rewards": "own" if rewarded is drawn else "shuffled"}
                    updates.append(row)
                    if rewarded is not drawn:
                        continue
                    # g_i . P grad H is dH/deta along v_i.
                    columns = slopes_of(wide.params, drawn, jax.tree.map(np.multiply, update.preconditioner, values.gradient))
                    row["columns"] = np.sum(columns)
                    if number == 0:
                        there = jax.tree.map(lambda p, d: p + RL.learning_rate * d, wide.params, update.full)
                        row["actual"] = exact_entropy(NETWORK.apply, there, every) - values.entropy
                    part = pd.DataFrame({
                        "seed": seed, "step": step, "number": number, "change": columns, "correct": drawn.rewards > 0,
                        "advantage": drawn.advantages, "surprisal": np.max(-found.logp_BT, axis=1),
                    })  # fmt: skip
                    sequences.append(part[part["advantage"] != 0])
    return Redrawn(pd.DataFrame(updates), pd.concat(sequences, ignore_index=True))


def _taken_apart(wide: PolicyCheckpoint, values: Exact, drawn: Drawn, found: TokenStats) -> tuple[dict[str, Any], Update]:
    """Derivatives of H along an update and its parts, and the covariances that should tell their signs."""
    gradient, update = jax.tree.map(np.asarray, update_of(wide, drawn))
    mask = np.asarray(drawn.batch.mask_BT)
    covariance = np.cov(found.logp_BT[mask], np.repeat(drawn.advantages, mask.sum(axis=1)), bias=True)[0, 1]
    directions = {
        "gradient": jax.tree.map(np.negative, gradient), "full": update.full,
        "parts": jax.tree.map(np.multiply, update.preconditioner, gradient),
    }  # fmt: skip
    row = {"covariance": covariance, "baseline": dot(values.gradient, update.baseline)}
    for name, direction in directions.items():
        covariances, slopes = (np.asarray(part) for part in _along(wide.params, drawn.batch, direction))
        row[name], row[f"{name}_fixed"] = dot(values.gradient, direction), dot(values.fixed_gradient, direction)
        row[f"{name}_states"] = np.mean(covariances)
        row[f"{name}_identity"] = np.max(np.abs(covariances - slopes)) / np.max(np.abs(slopes))
    return row, update
