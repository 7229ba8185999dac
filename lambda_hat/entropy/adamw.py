"""One step of AdamW, taken apart: which part of it is whose.

With moments m, s before the step, t its number from 1, the aggregate gradient g clipped by c = min(1, max_norm / |g|),
  m' = b1 m + (1 - b1) c g,   s' = b2 s + (1 - b2) (c g)^2,   D = sqrt(s' / (1 - b2^t)) + eps,
the step per unit learning rate (Loshchilov & Hutter 2017, arXiv 1711.05101, as Optax has it) is
  v = -[m' / (1 - b1^t)] / D - wd theta,
and for g = sum_i g_i it is exactly v = b + sum_i v_i with
  b = -[b1 m / (1 - b1^t)] / D - wd theta,   v_i = P g_i,   P = -[(1 - b1) c / (1 - b1^t)] / D:
c and D are the aggregate's, so that a sequence's part depends on the others through them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from lambda_hat.entropy.checks import check_finite, check_like
from lambda_hat.entropy.sequences import Batch, as_partial, check_sequences, in_chunks
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.decoder import Apply
from lambda_hat.targets.policies.objective import policy_loss
from lambda_hat.targets.selection import tensor_name
from lambda_hat.targets.target import Params


class AdamW(NamedTuple):
    """The optimizer's numbers. max_norm: of clipping by the global norm; infinite = none."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_norm: float = math.inf


class Update(NamedTuple):
    """A step per unit learning rate and its parts, shaped as the parameters.

    full: v. baseline: b. preconditioner: P, so that the part of a gradient g_i is P g_i. clip: c. gradient_norm: |g| before
    clipping.
    """

    full: Params
    baseline: Params
    preconditioner: Params
    clip: jax.Array
    gradient_norm: jax.Array


def adam_state(opt_state: Any) -> optax.ScaleByAdamState:
    """The moments and step count within the state of an Optax optimizer.

    Raises:
      InvalidInput: there is not exactly one Adam in it.
    """

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(node)]
    if len(found) != 1:
        raise InvalidInput(
            f"The optimizer's state must hold one optax.ScaleByAdamState; got {len(found)}. Pass the state of optax.adamw, "
            "or of a chain with it."
        )
    return found[0]


def take_apart(hyper: AdamW, state: Any, params: Params, gradient: Params, decay_mask: Params | None = None) -> Update:
    """The step that follows from an aggregate gradient, before clipping, and its parts.

    Args:
      state: before the step, with `count`, `mu` and `nu`: an `optax.ScaleByAdamState` or a policy's checkpoint.
      gradient: of the whole loss, `aggregate_gradient`.
      decay_mask: which parameters decay, a tree of booleans or a prefix of one, as Optax's `mask`; none = all.

    Raises:
      InvalidInput: the gradient or the moments have not the parameters' tensors, in their shapes, or numbers that are not
        finite; nu is negative somewhere.
    """
    check_finite("params", params)
    for name, tree in (("The gradient", gradient), ("The moments mu", state.mu), ("The moments nu", state.nu)):
        check_like(name, tree, params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.nu)[0]:
        if np.min(leaf, initial=0.0) < 0:
            raise InvalidInput(
                f"The moments nu are means of squares, at least 0; got {np.min(leaf):.3g} in {tensor_name(path)!r}. Is it mu?"
            )
    return _take_apart(hyper, optax.ScaleByAdamState(state.count, state.mu, state.nu), params, gradient, decay_mask)


@functools.partial(jax.jit, static_argnums=0)
def _take_apart(
    hyper: AdamW, state: optax.ScaleByAdamState, params: Params, gradient: Params, decay_mask: Params | None
) -> Update:
    norm = optax.tree.norm(gradient)
    clip = jnp.minimum(1, hyper.max_norm / norm).astype(norm.dtype)  # infinite for no gradient, and then 1
    count = state.count + 1
    # As Optax computes it, so that what is taken apart is the step it takes, its rounding included.
    correction1, correction2 = (1 - jnp.power(beta, count.astype(float)) for beta in (hyper.beta1, hyper.beta2))
    decays = jax.tree.broadcast(True if decay_mask is None else decay_mask, params)

    def part(p: jax.Array, g: jax.Array, m: jax.Array, s: jax.Array, decay: Any) -> tuple[jax.Array, ...]:
        beta1, beta2 = hyper.beta1, hyper.beta2
        first, second = correction1.astype(p.dtype), correction2.astype(p.dtype)
        g = clip.astype(p.dtype) * g
        scale = jnp.sqrt((beta2 * s + (1 - beta2) * jnp.square(g)) / second) + hyper.epsilon
        decayed = hyper.weight_decay * jnp.where(decay, p, 0)
        full = -((beta1 * m + (1 - beta1) * g) / first) / scale - decayed
        baseline = -(beta1 * m / first) / scale - decayed
        return full, baseline, -((1 - beta1) * clip.astype(p.dtype) / first) / scale

    parts = jax.tree.map(part, params, gradient, state.mu, state.nu, decays)
    full, baseline, preconditioner = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), parts)
    return Update(full, baseline, preconditioner, clip, norm)


def precondition(preconditioner: Params, gradients: Params) -> Params:
    """v_i = P g_i for gradients with a leading axis of sequences."""
    return jax.tree.map(lambda p, g: p[None] * g, preconditioner, gradients)


def sequence_gradients(apply: Apply, params: Params, batch: Batch, weights_B: jax.Array) -> Params:
    """Each sequence's gradient g_i of the loss, with a leading axis of sequences; traceable, all of them at once."""

    def gradient(tokens_T: jax.Array, mask_T: jax.Array, weight: jax.Array) -> Params:
        return jax.grad(lambda params: policy_loss(apply, params, tokens_T[None], mask_T[None], weight[None]))(params)

    return jax.vmap(gradient)(batch.tokens_BT, batch.mask_BT, weights_B)


@jax.jit
@jax.default_matmul_precision("highest")
def _summed(function: Partial, params: Params, chunks: Any) -> Params:
    """The sum over chunks of a gradient, in memory for two."""

    def add(total: Params, chunk: Any) -> tuple[Params, None]:
        return jax.tree.map(jnp.add, total, function(params, *chunk)), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), chunks)[0]


def _chunk_gradient(apply: Apply, params: Params, batch: Batch, weights_B: jax.Array) -> Params:
    return jax.grad(lambda params: policy_loss(apply, params, *batch, weights_B))(params)


def aggregate_gradient(apply: Apply, params: Params, batch: Batch, weights_B: Any, chunk_size: int = 8) -> Params:
    """g = sum_i g_i, the gradient of the loss, at most `chunk_size` sequences at a time.

    Args:
      weights_B: of `targets.policies.objective.sequence_weights`, flat.

    Raises:
      InvalidInput: see `entropy.sequences.check_sequences`.
    """
    batch = check_sequences(apply, params, batch, weights_B)
    weights = np.asarray(weights_B, np.promote_types(jax.tree.leaves(params)[0].dtype, np.float32))
    return _summed(Partial(_chunk_gradient, as_partial(apply)), params, in_chunks((batch, weights), chunk_size))
