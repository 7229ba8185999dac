"""The loss of group-relative reinforcement learning, in which every sequence has its own additive part.

Advantages and weights are of arrays on the device or on the host, as they are given.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from lambda_hat.specs.spec import Spec
from lambda_hat.targets.policies.decoder import Apply
from lambda_hat.targets.policies.generate import token_statistics
from lambda_hat.targets.target import Params


class RlSpec(Spec):
    """Group-relative policy gradient with AdamW: see above."""

    num_steps: int = Field(150, ge=1, le=2**30, description="updates")
    num_prompts: int = Field(32, ge=1, le=10**6, description="prompts U of an update, drawn with replacement")
    num_completions: int = Field(8, ge=2, le=10**6, description="completions G of each prompt")
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of the gradients")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the mean of their squares")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the mean square")
    weight_decay: float = Field(0.0, ge=0, description="an update takes learning_rate * weight_decay * w from w")
    max_norm: float | None = Field(1.0, gt=0, description="gradients longer than this are scaled to it; none = never")
    num_checkpoints: int = Field(
        5,
        ge=1,
        le=1000,
        description="parameters and optimizer kept at this many evenly spaced updates, first 0, last num_steps",
    )

    @property
    def saved_steps(self) -> tuple[int, ...]:
        """The updates after which a checkpoint is kept, ascending; those that round alike are one. A single one is the last."""
        spaced = np.linspace(self.num_steps, 0, self.num_checkpoints)
        return tuple(sorted({round(float(step)) for step in spaced}))


def group_advantages(rewards_UG: Any) -> Any:
    """A_bg = r_bg - mean_g r_bg, of U prompts with G completions each; not divided by a standard deviation."""
    return rewards_UG - rewards_UG.mean(axis=1, keepdims=True)


def sequence_weights(advantages_UG: Any, lengths_UG: Any) -> Any:
    """Weights w_bg = A_bg / (U G Lmax_b) of the sequences in `policy_loss`, (U, G).

    Args:
      lengths_UG: tokens of each completion; Lmax_b is the largest of its group.
    """
    longest_U = lengths_UG.max(axis=1).astype(advantages_UG.dtype)
    return advantages_UG / (advantages_UG.size * longest_U[:, None])


def policy_loss(apply: Apply, params: Params, tokens_BT: jax.Array, mask_BT: jax.Array, weights_B: jax.Array) -> jax.Array:
    """-sum_i w_i sum_t log pi(token_t), over the completions' tokens.

    With `sequence_weights` it is the mean over prompts b of -sum_g sum_t A_bg log pi / (G Lmax_b); with 1/B, the mean negative
    log-likelihood of completions.
    """
    return jnp.sum(weights_B * negative_log_likelihoods(apply, params, tokens_BT, mask_BT))


def negative_log_likelihoods(apply: Apply, params: Params, tokens_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """-sum_t log pi(token_t) over the completion's tokens of each sequence, (B,), in nats."""
    log_probs, _ = token_statistics(apply, params, tokens_BT)
    return -jnp.sum(jnp.where(mask_BT, log_probs, 0), axis=1)
