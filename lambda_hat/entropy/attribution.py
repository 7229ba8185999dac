"""Which training sequences of an update change the entropy, and by how much: matrices of evaluation by training sequences.

An update eta v = eta (b + sum_i v_i), taken apart in `lambda_hat.entropy.adamw`, changes the entropy. To first order the
change per unit eta is the sum of M, plus the baseline's: M[e, i] = v_i . grad psi_e / N, with psi of
`lambda_hat.entropy.estimators`, is the part of evaluation sequence e in that of training sequence i. At a finite eta each part
is measured by importance sampling, by itself and on top of the baseline.

All loops are over chunks of training sequences, and can be cut after any of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.entropy.adamw import Update, precondition, sequence_gradients
from lambda_hat.entropy.checks import check_like
from lambda_hat.entropy.estimators import Integrand, evaluate, evaluate_chunk, weighted_integrand, with_baselines
from lambda_hat.entropy.importance import Evaluation, Snis, snis
from lambda_hat.entropy.sequences import Batch, as_partial, check_sequences, in_chunks
from lambda_hat.targets.policies.decoder import Apply
from lambda_hat.targets.target import Params, chunk_size


class Columns(NamedTuple):
    """What is known of the first `done` training sequences: arrays whose first axis is the training sequence."""

    done: int
    arrays: dict[str, np.ndarray]


#: Receives what is known after a chunk.
Save = Callable[[Columns], None]


class Training(NamedTuple):
    """The sequences of an update, (N_U, T), their weights in its loss, (N_U,), as
    `targets.policies.objective.sequence_weights` has them, and the update's parts."""

    batch: Batch
    weights: np.ndarray
    update: Update


class Changes(NamedTuple):
    """Changes of the entropy at one eta, by importance sampling; see `entropy.importance.Snis`.

    full: H(theta + eta v) - H(theta), K = 1. baseline: H(theta + eta b) - H(theta), K = 1. grad: H(theta + eta v_i) - H(theta),
    K = N_U. baseline_plus_grad: H(theta + eta b + eta v_i) - H(theta + eta b), K = N_U. Contributions are (K, N_E).
    """

    eta: float
    full: Snis
    baseline: Snis
    grad: Snis
    baseline_plus_grad: Snis

    @property
    def parts(self) -> dict[str, Snis]:
        """The estimates by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def residual(self) -> float:
        """full - (baseline + sum_i grad_i): what the parts do together and not each by itself."""
        return float(self.full.change[0] - self.baseline.change[0] - np.sum(self.grad.change))


#: The fields of `Changes` that are estimates.
PARTS = Changes._fields[1:]


class References(NamedTuple):
    """What changes at some etas are measured from, evaluated once for all of them; see `evaluate_references`.

    etas: E of them. base: the policy itself, K = 1. full, baseline: theta + eta v and theta + eta b, K = E.
    """

    etas: tuple[float, ...]
    base: Evaluation
    full: Evaluation
    baseline: Evaluation

    def at(self, eta: float) -> tuple[Evaluation, Evaluation]:
        """full and baseline at one of the etas, K = 1 each."""
        row = [self.etas.index(eta)]
        full, baseline = (Evaluation(of.logp_KN[row], of.h_KN[row]) for of in (self.full, self.baseline))
        return full, baseline


class Linearity(NamedTuple):
    """A straight line through changes over eta by least squares, and how far they are from it.

    rmse, max_residual: in the changes' units. worst: indices of the largest residuals, from the largest.
    """

    slope: float
    intercept: float
    r_squared: float
    rmse: float
    max_residual: float
    worst: tuple[int, ...]


def attribution_matrix(
    apply: Apply,
    params: Params,
    training: Training,
    evaluation: Batch,
    baselines_BT: np.ndarray,
    integrand: Integrand = "entropy",
    grad_chunk: int = 64,
    sequence_chunk: int = 32,
    progress: Progress = no_progress,
    resume: Columns | None = None,
    save: Save | None = None,
) -> np.ndarray:
    """M[e, i] of the first-order change per unit eta, (N_E, N_U) in float64: the sum of column i is dH/deta along v_i.

    Every evaluation sequence's gradient is computed once for each chunk of training sequences and multiplied with all of the
    chunk: a derivative in direction v_i is a product of two gradients, and one of each sequence is far less work than one
    forward-mode pass of the evaluation batch for each v_i (`orders`, of the same result).

    Args:
      evaluation: independent draws from the policy. baselines_BT: theirs, of `entropy.estimators.baselines`.
      grad_chunk: training sequences whose v_i are held together: for each chunk the evaluation gradients are computed anew.
        sequence_chunk: sequences whose gradients are computed together.
      resume: what `save` received last in an interrupted call.

    Raises:
      InvalidInput: see `entropy.sequences.check_sequences`.
    """
    training, evaluation = _checked(apply, params, training), check_sequences(apply, params, evaluation, None, baselines_BT)
    num_evaluated, total = len(evaluation.tokens_BT), len(training.weights)
    chunks = with_baselines(params, evaluation, baselines_BT, sequence_chunk)
    grad_chunk = chunk_size(total, grad_chunk)

    def of_chunk(part: Batch, weights: np.ndarray) -> dict[str, Any]:
        inner = in_chunks((part, weights), sequence_chunk)
        products = _products(as_partial(apply), params, inner, training.update.preconditioner, chunks, integrand)
        return {"matrix": products[:grad_chunk]}

    found = _by_chunks(params, training, grad_chunk, num_evaluated, of_chunk, progress, resume, save)
    return found["matrix"].T / num_evaluated


@functools.partial(jax.jit, static_argnums=5)
@jax.default_matmul_precision("highest")
def _products(
    apply: Partial,
    params: Params,
    training: tuple[Batch, jax.Array],
    preconditioner: Params,
    chunks: tuple[Batch, jax.Array],
    integrand: Integrand,
) -> jax.Array:
    """v_i . grad psi_e, (training, chunks, evaluation), of training sequences and weights in chunks too."""
    dtype = training[1].dtype

    def flat(leaf: jax.Array, axes: int) -> jax.Array:
        """As (sequences, entries), of which the first `axes` axes are sequences."""
        return leaf.reshape(math.prod(leaf.shape[:axes]), -1).astype(dtype)

    parts = jax.lax.map(lambda own: precondition(preconditioner, sequence_gradients(apply, params, *own)), training)
    parts = jax.tree.map(lambda leaf: flat(leaf, 2), parts)

    def gradient(tokens_T: jax.Array, mask_T: jax.Array, baselines_T: jax.Array) -> Params:
        one = Batch(tokens_T[None], mask_T[None])
        return jax.grad(lambda params: weighted_integrand(apply, params, one, baselines_T[None], integrand)[0])(params)

    def of_chunk(chunk: tuple[Batch, jax.Array]) -> jax.Array:
        gradients = jax.vmap(gradient)(*chunk[0], chunk[1])
        return jax.tree.reduce(jnp.add, jax.tree.map(lambda v, g: v @ flat(g, 1).T, parts, gradients))

    return jnp.swapaxes(jax.lax.map(of_chunk, chunks), 0, 1)


def evaluate_references(
    apply: Apply,
    params: Params,
    training: Training,
    evaluation: Batch,
    etas: Sequence[float],
    integrand: Integrand = "entropy",
    grad_chunk: int = 8,
    sequence_chunk: int = 64,
) -> References:
    """The policies that `entropy_changes` compares with, by the program that evaluates the parts, so that what rounding they
    share cancels; arguments as there."""
    both = jax.tree.map(lambda *leaves: np.stack(leaves), training.update.full, training.update.baseline)
    count, size = len(etas), chunk_size(len(training.weights), grad_chunk)
    filled = -(1 + 2 * count) % size  # to whole chunks
    steps = np.array([0.0, *etas, *etas, *[0.0] * filled])
    which = np.array([0] * (1 + count) + [1] * count + [0] * filled)
    logp, h = evaluate(apply, params, both, steps, evaluation, integrand, size, sequence_chunk, which)
    rows = slice(0, 1), slice(1, 1 + count), slice(1 + count, 1 + 2 * count)
    return References(tuple(etas), *(Evaluation(logp[row], h[row]) for row in rows))


def entropy_changes(
    apply: Apply,
    params: Params,
    training: Training,
    evaluation: Batch,
    eta: float,
    integrand: Integrand = "entropy",
    clip: float | None = None,
    grad_chunk: int = 8,
    sequence_chunk: int = 64,
    progress: Progress = no_progress,
    resume: Columns | None = None,
    save: Save | None = None,
    references: References | None = None,
    gradient_apply: Apply | None = None,
) -> Changes:
    """The changes of the entropy by the update and by its parts, at eta.

    Args:
      apply: in float32 at least: in bfloat16 the difference of two nearby policies is rounding (8 bits of mantissa).
      evaluation: independent draws from the policy at `params`. clip: of log-weights, see `snis`.
      grad_chunk: training sequences whose v_i are held, and policies that are evaluated, together at most, in chunks of nearly
        equal sizes.
      resume: what `save` received last in an interrupted call.
      references: of `evaluate_references` with the same arguments and this eta among its etas; none = evaluated here.
      gradient_apply: the policy as the update's gradients were computed, in bfloat16 perhaps; none = `apply`.

    Raises:
      InvalidInput: see `entropy.sequences.check_sequences`.
    """
    training, evaluation = _checked(apply, params, training), check_sequences(apply, params, evaluation)
    grad_chunk = chunk_size(len(training.weights), grad_chunk)
    if references is None:
        references = evaluate_references(apply, params, training, evaluation, [eta], integrand, grad_chunk, sequence_chunk)
    etas = np.full(grad_chunk, eta)
    chunks = in_chunks(evaluation, sequence_chunk)
    num_evaluated, own = len(evaluation.tokens_BT), as_partial(apply if gradient_apply is None else gradient_apply)

    def of_chunk(part: Batch, weights: np.ndarray) -> dict[str, Any]:
        parts = _parts(own, params, part, weights, training.update.preconditioner)
        alone = evaluate_chunk(as_partial(apply), params, parts, etas, chunks, integrand)
        # All policies from the same parameters by the same program: what rounding they share cancels.
        on_top = evaluate_chunk(as_partial(apply), params, _added(parts, training.update.baseline), etas, chunks, integrand)
        return dict(zip(("grad_logp", "grad_h", "on_top_logp", "on_top_h"), (*alone, *on_top), strict=True))

    found = _by_chunks(params, training, grad_chunk, num_evaluated, of_chunk, progress, resume, save)
    full, baseline = references.at(eta)
    return Changes(
        eta,
        snis(references.base, full, clip),
        snis(references.base, baseline, clip),
        snis(references.base, Evaluation(found["grad_logp"], found["grad_h"]), clip),
        snis(references.base, Evaluation(found["on_top_logp"], found["on_top_h"]), clip, reference=baseline),
    )


def _checked(apply: Apply, params: Params, training: Training) -> Training:
    """Raises InvalidInput: see `check_sequences`."""
    batch = check_sequences(apply, params, training.batch, training.weights)
    check_like("The update", training.update.preconditioner, params)
    return training._replace(batch=batch)


@jax.jit
def _added(parts: Params, baseline: Params) -> Params:
    """b + v_i, with a leading axis of sequences."""
    return jax.tree.map(lambda v, b: v + b[None], parts, baseline)


@jax.jit
@jax.default_matmul_precision("highest")
def _parts(apply: Partial, params: Params, batch: Batch, weights: Any, preconditioner: Params) -> Params:
    return precondition(preconditioner, sequence_gradients(apply, params, batch, weights))


def gradient_norms(apply: Apply, params: Params, training: Training, grad_chunk: int = 8) -> np.ndarray:
    """|g_i| of each training sequence, (N_U,), in float64, at most `grad_chunk` of them at a time."""
    training = _checked(apply, params, training)
    grad_chunk = chunk_size(len(training.weights), grad_chunk)
    ones = jax.tree.map(np.ones_like, training.update.preconditioner)

    def of_chunk(part: Batch, weights: np.ndarray) -> dict[str, Any]:
        gradients = _parts(as_partial(apply), params, part, weights, ones)
        squares = (
            np.sum(np.square(leaf).reshape(len(leaf), -1), axis=1, dtype=np.float64) for leaf in jax.tree.leaves(gradients)
        )
        return {"squares": sum(squares)}

    found = _by_chunks(params, training, grad_chunk, 1, of_chunk, no_progress, None, None)
    return np.sqrt(found["squares"][:, 0])


def _by_chunks(
    params: Params,
    training: Training,
    grad_chunk: int,
    num_evaluated: int,
    of_chunk: Callable[[Batch, np.ndarray], dict[str, Any]],
    progress: Progress,
    resume: Columns | None,
    save: Save | None,
) -> dict[str, np.ndarray]:
    """What `of_chunk` gives for every chunk of training sequences, (N_U, N_E) in float64, on from where `resume` got to.

    Args:
      of_chunk: (a chunk of the batch, its weights) -> arrays (grad_chunk, chunks, evaluation).
    """
    total = len(training.weights)
    dtype = np.promote_types(jax.tree.leaves(params)[0].dtype, np.float32)
    columns = Columns(0, {}) if resume is None else resume
    progress(columns.done, total, "sequences", "")
    while columns.done < total:
        chosen = slice(columns.done, min(columns.done + grad_chunk, total))
        size = chosen.stop - chosen.start
        weights = np.pad(np.asarray(training.weights[chosen], dtype), (0, grad_chunk - size))
        batch = Batch(*(np.pad(np.asarray(array)[chosen], ((0, grad_chunk - size), (0, 0))) for array in training.batch))
        parts = of_chunk(batch, weights)
        arrays = {
            name: np.asarray(part, np.float64).reshape(grad_chunk, -1)[:size, :num_evaluated] for name, part in parts.items()
        }
        if columns.done:
            arrays = {name: np.concatenate([columns.arrays[name], array]) for name, array in arrays.items()}
        columns = Columns(chosen.stop, arrays)
        if save is not None:
            save(columns)
        progress(columns.done, total, "sequences", "")
    return columns.arrays


def linearity(etas: Sequence[float] | np.ndarray, changes: Sequence[float] | np.ndarray, num_worst: int = 3) -> Linearity:
    """How well changes over two or more etas lie on a line. How well each of them is known is not in this: see `snis`."""
    etas, changes = np.asarray(etas, np.float64), np.asarray(changes, np.float64)
    slope, intercept = np.polyfit(etas, changes, 1)
    residuals = changes - (slope * etas + intercept)
    squares, total = np.sum(np.square(residuals)), np.sum(np.square(changes - np.mean(changes)))
    worst = np.argsort(-np.abs(residuals), kind="stable")[:num_worst]
    return Linearity(
        float(slope),
        float(intercept),
        float(1 - squares / total) if total > 0 else 1.0,
        float(np.sqrt(squares / len(etas))),
        float(np.max(np.abs(residuals))),
        tuple(int(index) for index in worst),
    )
