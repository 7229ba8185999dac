"""One update of a policy, taken apart and measured: all numbers of one entry of a study, computed step by step.

The steps are, for each evaluation batch, the attribution matrix and the changes at each eta. An interrupted measurement goes on
within the step it was in; batches are drawn again, from the same keys.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jax.tree_util import Partial

from lambda_hat.compute.chunks import Pace, Progress, no_progress
from lambda_hat.entropy.adamw import AdamW, aggregate_gradient, take_apart
from lambda_hat.entropy.attribution import (
    PARTS,
    Changes,
    Columns,
    References,
    Training,
    attribution_matrix,
    entropy_changes,
    evaluate_references,
    gradient_norms,
    linearity,
)
from lambda_hat.entropy.batches import Drawn, draw_evaluation, draw_update, features, prompts_of, token_arrays
from lambda_hat.entropy.estimators import Orders, baselines, orders, standard_error, token_terms
from lambda_hat.entropy.exact import enumerate_completions, exact_entropy
from lambda_hat.entropy.importance import Snis
from lambda_hat.entropy.sequences import Batch, TokenStats, all_token_stats, moved
from lambda_hat.entropy.spec import EntropySpec
from lambda_hat.entropy.study import Measured
from lambda_hat.targets.policies.objective import sequence_weights
from lambda_hat.targets.policies.spec import RlSpec, policy_of
from lambda_hat.targets.target import Params, Target

#: Bytes that directions held together, and the logits of sequences evaluated together, may each take where the device does not
#: say how much memory it has.
MEMORY = 2**30
#: Arrays of a direction's size, and of the logits', that are held at once: v_i, g_i, what is being added, and gradients.
_COPIES = 4


class ChunkSizes(NamedTuple):
    """What is held together; it changes rounding alone.

    grad: training sequences whose gradients are. policies: training sequences whose policies are evaluated side by side.
    sequences: of a forward pass, for each of the policies.
    """

    grad: int
    policies: int
    sequences: int


#: The most that is worth holding together.
MAX_CHUNKS = ChunkSizes(256, 64, 32)


class Work(NamedTuple):
    """A measurement cut short: the arrays of finished steps, the step it was in, and what is known of that."""

    finished: dict[str, dict[str, np.ndarray]]
    step: str
    columns: Columns


class Details(NamedTuple):
    """What the tables leave out.

    update, evaluations: arrays of every token. changes: of each evaluation batch, one for each eta.
    """

    update: dict[str, np.ndarray]
    evaluations: list[dict[str, np.ndarray]]
    changes: list[list[Changes]]


def chunk_sizes(grad: int, sequences: int, params: Params, length: int, vocab_size: int) -> ChunkSizes:
    """Those given, and where one is 0 what an eighth of the device's memory holds, at least 1 and at most MAX_CHUNKS."""
    stats = jax.local_devices()[0].memory_stats()
    budget = stats["bytes_limit"] // 8 if stats and "bytes_limit" in stats else MEMORY
    room = budget // (_COPIES * sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params)))  # in directions
    of_one = _COPIES * length * vocab_size * jnp.dtype(jnp.float32).itemsize  # logits of a sequence under one policy
    # Policies and sequences of a forward pass share the room for logits: not all of it is the policies'.
    policies = grad or max(1, min(MAX_CHUNKS.policies, room, budget // (4 * of_one)))
    return ChunkSizes(
        grad or max(1, min(MAX_CHUNKS.grad, room)),
        policies,
        sequences or max(1, min(MAX_CHUNKS.sequences, room, budget // (of_one * policies))),
    )


def measure(
    spec: EntropySpec,
    target: Target,
    state: dict[str, Any],
    grad_chunk_size: int = 0,
    tf_batch_size: int = 0,
    progress: Progress = no_progress,
    resume: Work | None = None,
    save: Callable[[Work], None] | None = None,
) -> tuple[Measured, Details]:
    """Takes the update apart and measures what it and its parts do to the entropy.

    Args:
      target: the policy at the spec's checkpoint. state: its optimizer's there, with count, mu and nu.
      grad_chunk_size, tf_batch_size: see `ChunkSizes`; 0 = as memory allows.
      resume: what `save` received last in an interrupted call.

    Raises:
      InvalidInput: no group of the update has rewards that differ, or a written prompt has unknown characters.
    """
    with jax.enable_x64(spec.target.precision == "float64"):
        return _Measurement(spec, target, state, (grad_chunk_size, tf_batch_size), progress, resume, save).measured()


class _Measurement:
    """The state of `measure`."""

    def __init__(
        self, spec: EntropySpec, target: Target, state: dict[str, Any], chunks: tuple[int, int], progress: Progress,
        resume: Work | None, save: Callable[[Work], None] | None,
    ) -> None:  # fmt: skip
        self.began = time.perf_counter()
        self.spec, self.policy, self.task = spec, policy_of(target), spec.target.tokenized()
        self.params: Params = self.policy.params
        #: Of gradients and derivatives. What compares two policies takes the policy's own precision: see `EntropySpec.forward`.
        self.apply = in_bfloat16(self.policy.apply) if spec.forward == "bfloat16" else self.policy.apply
        self.update = draw_update(spec.update, self.policy, self.task, spec.seed)
        self.drawn = [
            draw_evaluation(spec.evaluation, self.policy, self.task, spec.seed, number)
            for number in range(spec.evaluation.num_batches)
        ]
        length, vocabulary = self.drawn[0].batch.tokens_BT.shape[1], self.task.tokenizer.vocab_size
        self.chunks = chunk_sizes(*chunks, self.params, length, vocabulary)
        self.progress, self.save, self.pace = progress, save, Pace()
        self.work = resume or Work({}, "", Columns(0, {}))
        self.training = self._take_apart(state)

    def _take_apart(self, state: dict[str, Any]) -> Training:
        drawn, group = self.update.drawn, self.spec.update.num_completions
        lengths = drawn.batch.mask_BT.sum(axis=1)
        weights = sequence_weights(drawn.advantages.reshape(-1, group), lengths.reshape(-1, group)).ravel()
        gradient = aggregate_gradient(self.apply, self.params, drawn.batch, weights, self.chunks.sequences)
        adam = optax.ScaleByAdamState(**{name: state[name] for name in ("count", "mu", "nu")})
        update = take_apart(adamw_of(self.spec.target.rl), adam, self.params, gradient)
        return Training(drawn.batch, weights, update)

    def measured(self) -> tuple[Measured, Details]:
        stats = self._stats(self.update.drawn.batch)
        table = features(self.update.drawn, stats, self.task)
        norms = gradient_norms(self.apply, self.params, self.training, self.chunks.policies)
        table = self._named(table.assign(weight=self.training.weights, gradient_norm=norms), "update")
        evaluations, matrices, tokens, all_changes, influence, changes, summaries = [], [], [], [], [], [], []
        exact = self._exact()
        for number, drawn in enumerate(self.drawn):
            own = self._stats(drawn.batch)
            controls = baselines(own, drawn.batch.mask_BT, self.spec.integrand)
            matrix = self._matrix(number, drawn, controls)
            first = self._orders(drawn, controls)
            references = self._references(drawn)
            found = [self._changes(number, drawn, eta, references) for eta in self.spec.etas]
            named = self._named(features(drawn, own, self.task), f"eval_{number:02}")
            evaluations.append(named.drop(columns=["advantage", "attempt"]))
            matrices.append(matrix)
            tokens.append(token_arrays(drawn, own))
            all_changes.append(found)
            influence += [_influence(number, matrix, change) for change in found]
            changes += [_change(number, change, first, exact.get(change.eta)) for change in found]
            cut = {"truncated": int(named["truncated"].sum())}
            summaries.append(_summary(self._mean(drawn, own), matrix, first, found, exact.get(0.0)) | cut)
        summary = self._head(stats, table) | {"evaluations": summaries}
        measured = Measured(
            self.spec.entropy_id, self.spec, summary, table, evaluations, matrices,
            pd.concat(influence, ignore_index=True), pd.DataFrame(changes),
        )  # fmt: skip
        return measured, Details(token_arrays(self.update.drawn, stats), tokens, all_changes)

    def _named(self, table: pd.DataFrame, batch: str) -> pd.DataFrame:
        """With an id for each sequence, under which it is known in no other measurement."""
        return table.assign(id=[f"{self.spec.entropy_id}.{batch}.{number}" for number in table["sequence"]])

    def _stats(self, batch: Batch) -> TokenStats:
        return all_token_stats(self.policy.apply, self.params, batch, self.chunks.sequences)

    def _mean(self, drawn: Drawn, stats: TokenStats) -> tuple[float, float, int]:
        """The mean of the integrand, its standard error and the number of sequences."""
        h = np.sum(np.asarray(token_terms(stats, drawn.batch.mask_BT, self.spec.integrand), np.float64), axis=1)
        return float(np.mean(h)), float(np.std(h, ddof=1) / np.sqrt(len(h))), len(h)

    def _step(self, name: str, compute: Callable[[Columns | None, Callable[[Columns], None]], dict[str, np.ndarray]]) -> Any:
        """The arrays of a step: found among the finished, or computed from where it was left."""
        if name not in self.work.finished:
            resume = self.work.columns if self.work.step == name and self.work.columns.done else None

            def save(columns: Columns) -> None:
                self.work = self.work._replace(step=name, columns=columns)
                if self.save is not None:
                    self.pace(lambda: self.save(self.work))  # type: ignore[misc]

            arrays = compute(resume, save)
            self.work = Work(self.work.finished | {name: arrays}, "", Columns(0, {}))
        return self.work.finished[name]

    def _progress(self, note: str) -> Progress:
        """Of one step as that of all."""
        steps = len(self.drawn) * (1 + len(self.spec.etas))
        finished = len(self.work.finished)

        def show(done: int, total: int, unit: str, _: str) -> None:
            self.progress(finished * total + done, steps * total, unit, note)

        return show

    def _matrix(self, number: int, drawn: Drawn, controls: np.ndarray) -> np.ndarray:
        def compute(resume: Columns | None, save: Callable[[Columns], None]) -> dict[str, np.ndarray]:
            matrix = attribution_matrix(
                self.apply, self.params, self.training, drawn.batch, controls, self.spec.integrand, self.chunks.grad,
                self.chunks.sequences, progress=self._progress("attribution"), resume=resume, save=save,
            )  # fmt: skip
            return {"matrix": matrix}

        return np.asarray(self._step(f"{number}/matrix", compute)["matrix"])

    def _references(self, drawn: Drawn) -> References:
        """For all etas at once; not kept by an interrupted measurement, which evaluates them anew."""
        return evaluate_references(
            self.policy.apply, self.params, self.training, drawn.batch, self.spec.etas, self.spec.integrand, *self.chunks[1:]
        )

    def _changes(self, number: int, drawn: Drawn, eta: float, references: References) -> Changes:
        def compute(resume: Columns | None, save: Callable[[Columns], None]) -> dict[str, np.ndarray]:
            changes = entropy_changes(
                self.policy.apply, self.params, self.training, drawn.batch, eta, self.spec.integrand, self.spec.clip,
                *self.chunks[1:], self._progress(f"eta {eta:g}"), resume, save, references, self.apply,
            )  # fmt: skip
            return {f"{name}.{field}": array for name, snis in changes.parts.items() for field, array in snis._asdict().items()}

        arrays = self._step(f"{number}/eta_{eta!r}", compute)
        return Changes(eta, *(Snis(*(arrays[f"{name}.{field}"] for field in Snis._fields)) for name in PARTS))

    def _orders(self, drawn: Drawn, controls: np.ndarray) -> Orders:
        """Along v and along b."""
        both = jax.tree.map(lambda *leaves: np.stack(leaves), self.training.update.full, self.training.update.baseline)
        return orders(
            self.apply, self.params, both, drawn.batch, controls, self.spec.integrand,
            direction_chunk=2, sequence_chunk=self.chunks.sequences,
        )  # fmt: skip

    def _exact(self) -> dict[float, float]:
        """By enumeration, the entropy at the policy, under eta = 0, and its changes at the etas; none where it is not asked."""
        if not self.spec.exact:
            return {}
        prompts, _ = prompts_of(self.spec.evaluation, self.task)
        rows = [row[:length].tolist() for row, length in zip(prompts.tokens, prompts.lengths, strict=True)]
        enumeration = enumerate_completions(rows, self.task.tokenizer.vocab_size, self.task.max_length, self.task.end_token)
        full = self.training.update.full
        there = {eta: jax.jit(moved)(self.params, full, np.asarray(eta)) for eta in (0.0, *self.spec.etas)}
        entropies = {eta: exact_entropy(self.policy.apply, params, enumeration) for eta, params in there.items()}
        return {eta: value - (entropies[0.0] if eta else 0) for eta, value in entropies.items()}

    def _head(self, stats: TokenStats, update: pd.DataFrame) -> dict[str, Any]:
        drawn, mask = self.update.drawn, self.update.drawn.batch.mask_BT
        advantages = np.broadcast_to(drawn.advantages[:, None], mask.shape)[mask]
        return {
            "target_id": self.spec.target.target_id, "checkpoint": self.spec.target.checkpoint,
            "eta_policy": self.spec.target.rl.learning_rate, "integrand": self.spec.integrand,
            "num_update": len(drawn.rewards), "truncated": int(update["truncated"].sum()),
            "max_length": self.task.max_length, "num_groups": self.update.groups_asked - self.update.shortfall,
            "groups_asked": self.update.groups_asked, "shortfall": self.update.shortfall,
            "resample_attempts": self.update.attempts, "accuracy": self.update.accuracy,
            "clip": float(self.training.update.clip), "gradient_norm": float(self.training.update.gradient_norm),
            "covariance": float(np.cov(stats.logp_BT[mask].astype(np.float64), advantages)[0, 1]),
            "chunk_sizes": self.chunks._asdict(),
            "seconds": time.perf_counter() - self.began,
        }  # fmt: skip


def adamw_of(rl: RlSpec) -> AdamW:
    """The numbers of a policy's optimizer."""
    return AdamW(rl.beta1, rl.beta2, rl.epsilon, rl.weight_decay, np.inf if rl.max_norm is None else rl.max_norm)


def in_bfloat16(apply: Partial) -> Partial:
    """The policy with its parameters and activations in bfloat16; logits in float32."""

    def forward(apply: Partial, params: Params, tokens_BT: jax.Array) -> jax.Array:
        cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.bfloat16))
        held = Partial(apply.func, *cast(apply.args), **cast(apply.keywords))
        return held(cast(params), tokens_BT).astype(jnp.float32)

    return Partial(forward, apply)


def _influence(number: int, matrix: np.ndarray, changes: Changes) -> pd.DataFrame:
    """A row for each training sequence."""
    alone, on_top = changes.grad, changes.baseline_plus_grad
    return pd.DataFrame({
        "evaluation": number, "eta": changes.eta, "sequence": np.arange(matrix.shape[1]),
        "change": alone.change, "error": alone.jackknife_error,
        "change_on_baseline": on_top.change, "error_on_baseline": on_top.jackknife_error,
        "first_order": changes.eta * matrix.sum(axis=0),
        "first_order_error": changes.eta * standard_error(matrix, axis=0),
        "ess": alone.ess, "clip_fraction": alone.clip_fraction,
    })  # fmt: skip


def _change(number: int, changes: Changes, orders: Orders, exact: float | None) -> dict[str, Any]:
    full, baseline, eta = changes.full, changes.baseline, changes.eta
    return {
        "evaluation": number, "eta": eta,
        "full": full.change[0], "full_error": full.jackknife_error[0],
        "baseline": baseline.change[0], "baseline_error": baseline.jackknife_error[0],
        "grad_sum": float(np.sum(changes.grad.change)), "residual": changes.residual,
        "first_order": eta * orders.first[0], "first_order_error": eta * orders.first_error[0],
        "second_order": orders.change(eta)[0], "exact": np.nan if exact is None else exact,
        "ess": full.ess[0], "clip_fraction": full.clip_fraction[0],
    }  # fmt: skip


def _summary(
    mean: tuple[float, float, int], matrix: np.ndarray, orders: Orders, changes: list[Changes], exact: float | None
) -> dict[str, Any]:
    values = {
        "num_sequences": mean[2], "entropy": mean[0], "entropy_error": mean[1], "exact_entropy": exact,
        "first": orders.first[0], "first_error": orders.first_error[0],
        "second": orders.second[0], "second_error": orders.second_error[0], "eta_star": orders.linear_until()[0],
        "baseline_first": orders.first[1], "baseline_first_error": orders.first_error[1], "grad_first": np.sum(matrix),
    }  # fmt: skip
    summary: dict[str, Any] = {name: value if value is None else float(value) for name, value in values.items()}
    summary["num_sequences"] = mean[2]
    if len(changes) > 1:
        line = linearity([change.eta for change in changes], [change.full.change[0] for change in changes])
        summary["linearity"] = line._asdict()
    return summary
