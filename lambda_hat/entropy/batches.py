"""The sequences of a measurement: drawn from the policy, or written out, with all that is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from lambda_hat.entropy.sequences import Batch, TokenStats
from lambda_hat.entropy.spec import EvaluationSpec, PromptsSpec, SequenceSpec, UpdateSpec
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.generate import generate, sequences
from lambda_hat.targets.policies.objective import group_advantages
from lambda_hat.targets.policies.policy import Policy
from lambda_hat.targets.policies.tasks import Prompts, TokenizedTask, rewards

#: Sequences that are drawn side by side at most.
GENERATED_TOGETHER = 1024

#: Numbers of the keys that differ between an update's sequences and those of evaluation batches, from 1 on.
_UPDATE = 0


class Drawn(NamedTuple):
    """Sequences, on the host. completions_NL: their tokens alone, padded after the end token. answers_NL: the right ones.

    The others are (N,). prompts: texts. advantages: NaN outside updates. attempts: of draws, the one it comes from, from 0.
    """

    batch: Batch
    completions_NL: np.ndarray
    answers_NL: np.ndarray
    prompts: np.ndarray
    prompt_ids: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    attempts: np.ndarray


class Update(NamedTuple):
    """An update's sequences, and how they were found.

    accuracy: mean reward of the first draw. groups_asked, shortfall: groups wanted, and those left out because their rewards
    were still all equal after `attempts` redraws.
    """

    drawn: Drawn
    accuracy: float
    groups_asked: int
    shortfall: int
    attempts: int


def draw_update(spec: UpdateSpec, policy: Policy, task: TokenizedTask, seed: int) -> Update:
    """Completions in groups with group-relative advantages; groups without any are redrawn, with other prompts where these are
    drawn.

    Raises:
      InvalidInput: no group is left, or a text has characters that the policy does not know.
    """
    group, attempt = spec.num_completions, 0
    if spec.sequences:
        drawn = _with_advantages(_written_out(spec.sequences, task), group)
        accuracy, flat = float(np.mean(drawn.rewards)), _flat(drawn, group, spec.tolerance)
    else:
        prompts = prompts_of(spec, task)
        places = _places(spec, seed, _UPDATE, 1 + spec.max_resample_attempts, len(prompts[1])).repeat(group, axis=1)
        drawn = _with_advantages(_draw(policy, task, prompts, places[0], _key(seed, _UPDATE, 0)), group)
        accuracy, flat = float(np.mean(drawn.rewards)), _flat(drawn, group, spec.tolerance)
        while flat.any() and attempt < spec.max_resample_attempts:
            attempt += 1
            again = _draw(policy, task, prompts, places[attempt], _key(seed, _UPDATE, attempt), attempt)
            drawn = _replaced(drawn, _with_advantages(again, group), flat.repeat(group))
            flat = _flat(drawn, group, spec.tolerance)
    if flat.all():
        raise InvalidInput(
            f"An update needs a group whose rewards differ; all {len(flat)} had equal ones after {attempt} redraws. Raise "
            "update.max_resample_attempts, update.num_prompts or update.num_completions, or take another checkpoint."
        )
    kept = ~flat.repeat(group)
    return Update(jax.tree.map(lambda array: array[kept], drawn), accuracy, len(flat), int(flat.sum()), attempt)


def draw_evaluation(spec: EvaluationSpec, policy: Policy, task: TokenizedTask, seed: int, number: int) -> Drawn:
    """One completion of each prompt: independent draws from the policy."""
    prompts = prompts_of(spec, task)
    [places] = _places(spec, seed, 1 + number, 1, len(prompts[1]))
    return _draw(policy, task, prompts, places, _key(seed, 1 + number, 0))


def features(drawn: Drawn, stats: TokenStats, task: TokenizedTask) -> pd.DataFrame:
    """A row for each sequence: texts, reward, advantage, and what the policy says of its tokens, in nats; `truncated` where the
    completion was cut off at the most tokens it may have."""
    mask = np.asarray(drawn.batch.mask_BT)
    lengths, surprisals = mask.sum(axis=1), np.where(mask, -stats.logp_BT, -np.inf).astype(np.float64)
    surprisal = np.sum(np.where(mask, surprisals, 0), axis=1)
    last = drawn.completions_NL[np.arange(len(lengths)), lengths - 1]
    entropy = np.sum(stats.entropies_BT, axis=1, dtype=np.float64)
    return pd.DataFrame({
        "sequence": np.arange(len(lengths)), "prompt_id": drawn.prompt_ids, "prompt": drawn.prompts,
        "completion": [task.text(row[:length]) for row, length in zip(drawn.completions_NL, lengths, strict=True)],
        "answer": [task.text(row) for row in drawn.answers_NL],
        "reward": drawn.rewards, "advantage": drawn.advantages, "length": lengths, "truncated": ~np.isin(last, task.end_tokens),
        "surprisal": surprisal, "mean_surprisal": surprisal / lengths,
        "max_surprisal": surprisals.max(axis=1),
        "max_surprisal_position": surprisals.argmax(axis=1) - mask.argmax(axis=1),
        "entropy": entropy, "mean_entropy": entropy / lengths, "attempt": drawn.attempts,
    })  # fmt: skip


def token_arrays(drawn: Drawn, stats: TokenStats) -> dict[str, np.ndarray]:
    """What is known of each token: ids, which are the completion's, log-probabilities, entropies; (N, T) each."""
    batch = drawn.batch
    return {"tokens": batch.tokens_BT, "mask": batch.mask_BT, "logp": stats.logp_BT, "entropies": stats.entropies_BT}


def _key(seed: int, use: int, attempt: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), use), attempt)


def prompts_of(spec: PromptsSpec, task: TokenizedTask) -> tuple[Prompts, np.ndarray]:
    """The prompts that a batch draws from, or those it takes, and their ids: among the task's, or among those written out."""
    if spec.prompts:
        return task.custom_prompts(spec.prompts, spec.answers), np.arange(len(spec.prompts))
    prompts = task.prompts()
    if not spec.prompt_ids:
        return prompts, np.arange(len(prompts.texts))
    ids = np.asarray(spec.prompt_ids)
    texts = [prompts.texts[number] for number in ids]
    return Prompts(texts, prompts.tokens[ids], prompts.lengths[ids], prompts.answers[ids]), ids


def _places(spec: PromptsSpec, seed: int, use: int, attempts: int, count: int) -> np.ndarray:
    """Which of `count` prompts each attempt takes, (attempts, prompts)."""
    if spec.prompts or spec.prompt_ids:
        return np.tile(np.arange(count), (attempts, 1))
    return np.random.default_rng((seed, use)).integers(0, count, (attempts, spec.num_prompts))


def _draw(
    policy: Policy,
    task: TokenizedTask,
    prompts: tuple[Prompts, np.ndarray],
    places: np.ndarray,
    key: jax.Array,
    attempt: int = 0,
) -> Drawn:
    texts, tokens_NP, lengths, answers = (np.asarray(field)[places] for field in prompts[0])
    keys, parts, ends = jax.random.split(key, len(places)), [], jnp.array(task.end_tokens, jnp.int32)
    for start in range(0, len(places), GENERATED_TOGETHER):
        part = slice(start, start + GENERATED_TOGETHER)
        given = keys[part], tokens_NP[part], lengths[part], answers.shape[1]
        parts.append(generate(policy.decoder, policy.full, *given, end_token=ends))
    tokens, mask, completions = (
        np.concatenate([np.asarray(getattr(part, name)) for part in parts]) for name in ("tokens", "mask", "completions")
    )
    right = np.asarray(rewards(jnp.asarray(completions), jnp.asarray(answers), ends), np.float64)
    nan, attempts = np.full(len(places), np.nan), np.full(len(places), attempt)
    return Drawn(Batch(tokens, mask), completions, answers, texts, prompts[1][places], right, nan, attempts)


def _written_out(written: Sequence[SequenceSpec], task: TokenizedTask) -> Drawn:
    prompts = task.custom_prompts([one.prompt for one in written], [one.completion for one in written])
    tokens, mask = (np.asarray(array) for array in sequences(prompts.tokens, prompts.lengths, prompts.answers, task.end_token))
    numbers = {text: number for number, text in enumerate(dict.fromkeys(prompts.texts))}
    ids = np.array([numbers[text] for text in prompts.texts])
    none = np.zeros_like(prompts.answers)  # the right answer is not known
    given = np.array([one.reward for one in written], np.float64)
    nan, zero = np.full(len(ids), np.nan), np.zeros(len(ids), int)
    return Drawn(Batch(tokens, mask), prompts.answers, none, np.array(prompts.texts), ids, given, nan, zero)


def _with_advantages(drawn: Drawn, group: int) -> Drawn:
    return drawn._replace(advantages=group_advantages(drawn.rewards.reshape(-1, group)).ravel())


def _flat(drawn: Drawn, group: int, tolerance: float) -> np.ndarray:
    """Which groups have no advantages to speak of."""
    return np.max(np.abs(drawn.advantages.reshape(-1, group)), axis=1) <= tolerance


def _replaced(old: Drawn, new: Drawn, where_N: np.ndarray) -> Drawn:
    """`old` with the sequences at `where_N` from `new`."""

    def replace(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        return np.where(np.expand_dims(where_N, tuple(range(1, old.ndim))), new, old)

    return jax.tree.map(replace, old, new)
