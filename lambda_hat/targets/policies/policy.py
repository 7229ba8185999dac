"""A policy as functions and arrays: what generation, objectives and studies of its entropy take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.tree_util import Partial

from lambda_hat.store.arrays import unflatten
from lambda_hat.targets.policies.decoder import Decoder
from lambda_hat.targets.policies.lora import LoraSpec, joined
from lambda_hat.targets.policies.objective import negative_log_likelihoods
from lambda_hat.targets.target import Dataset, Objective, Params


class Policy(NamedTuple):
    """base: the frozen network below adapters; None, as is `lora`, where the whole network is trained. params: what is trained,
    the network or the adapters {module: {"a", "b"}}."""

    decoder: Decoder
    base: Params | None
    lora: LoraSpec | None
    params: Params

    @property
    def apply(self) -> Partial:
        """(params, tokens_BT) -> logits_BTV, a pytree that holds `base`: an argument of compiled programs, not a constant."""
        return Partial(_apply(self.decoder, self.lora), self.base)

    @property
    def full(self) -> Params:
        """What the decoder's functions and `generate` take as parameters."""
        return joined(self.lora, self.base, self.params)


@functools.cache
def _apply(decoder: Decoder, lora: LoraSpec | None) -> Callable[[Params | None, Params, jax.Array], jax.Array]:
    """Cached, so that equal policies compile once."""

    def apply(base: Params | None, params: Params, tokens_BT: jax.Array) -> jax.Array:
        return decoder.apply(joined(lora, base, params), tokens_BT)

    return apply


def frozen(lora: LoraSpec | None, constants: dict[str, Any]) -> Params | None:
    """The frozen network in the constants of a policy's dataset; None where there is none."""
    return None if lora is None else unflatten(constants)


@functools.cache
def answer_loss(network: Decoder, lora: LoraSpec | None) -> Objective:
    """-log pi(completion) of samples `tokens` and `mask`, both (B, T)."""

    def per_sample_loss(params: Params, dataset: Dataset) -> jax.Array:
        apply = Policy(network, frozen(lora, dataset.constants), lora, params).apply
        return negative_log_likelihoods(apply, params, dataset.samples["tokens"], dataset.samples["mask"])

    return Objective(per_sample_loss)
