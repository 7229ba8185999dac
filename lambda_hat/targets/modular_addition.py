"""Modular addition by a transformer of one layer: the network in which grokking was taken apart (arXiv 2301.05217)."""

from __future__ import annotations

import math
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.specs.spec import Spec
from lambda_hat.targets.classification import classification_measure, cross_entropy
from lambda_hat.targets.target import (
    OBSERVABLE_SIZE,
    Dataset,
    DataSpec,
    Objective,
    Params,
    Save,
    Shapes,
    Target,
    Unfinished,
    shaped,
)
from lambda_hat.targets.training import TrainedSpec, TrainingSpec, Untrained, train_target


class TransformerSpec(Spec):
    """One layer of attention and MLP, no layer norm; weights start N(0, 1/fan_in), biases at 0."""

    width: int = Field(64, ge=1, description="dimension of the residual stream")
    num_heads: int = Field(4, ge=1, le=1000, description="attention heads, each of dimension width / num_heads")
    mlp_width: int = Field(128, ge=1, description="hidden units of the MLP")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, {self.num_heads}; got {self.width}")
        return self

    def shapes(self, modulus: int) -> dict[str, dict[str, tuple[int, ...]]]:
        """Of the parameters. Each head's are leaves of their own, so that a posterior can move one head alone."""
        d, head, mlp = self.width, self.width // self.num_heads, self.mlp_width
        one: dict[str, tuple[int, ...]] = {"query": (d, head), "key": (d, head), "value": (d, head), "output": (head, d)}
        return {
            **{f"head_{h}": one for h in range(self.num_heads)},  # in the order in which they are drawn
            "embedding": {"token": (modulus + 1, d), "position": (3, d)},
            "mlp": {"in_w": (d, mlp), "in_b": (mlp,), "out_w": (mlp, d), "out_b": (d,)},
            "unembedding": {"w": (d, modulus)},
        }

    def init(self, seed: tuple[int, int], modulus: int) -> Params:
        """Initial parameters, float64."""
        rng, shapes = np.random.default_rng(seed), self.shapes(modulus)

        def initial(name: str, shape: tuple[int, ...]) -> np.ndarray:
            if name.endswith("_b"):
                return np.zeros(shape)
            # One-hot tokens have one input; the last is the equals sign.
            return rng.standard_normal(shape) / math.sqrt(self.width if name in ("token", "position") else shape[0])

        return {module: {name: initial(name, shape) for name, shape in own.items()} for module, own in shapes.items()}


def transformer(params: Params, a: jax.Array, b: jax.Array) -> jax.Array:
    """Logits of (a + b) mod p at the "=" of the tokens "a b =", (B, p); a and b (B,) integers below p.

    Only the last position is read, and its query q = x_3 W_Q is the same for every sample. So a head's scores are
    x_t . (W_K q) / sqrt(d_head), and its output is that of the weighted mean of the x_t: exact, without a product per token.
    """
    tokens, positions = params["embedding"]["token"], params["embedding"]["position"]
    last = tokens[-1] + positions[2]
    x = jnp.stack(
        [tokens[a] + positions[0][None], tokens[b] + positions[1][None], jnp.broadcast_to(last, (len(a), len(last)))], 1
    )
    stream = last[None]
    for name in sorted(name for name in params if name.startswith("head_")):
        head = params[name]
        direction = head["key"] @ (last @ head["query"]) / math.sqrt(head["key"].shape[1])
        attention = jax.nn.softmax(x @ direction, axis=1)
        stream = stream + jnp.einsum("bt,btd->bd", attention, x) @ head["value"] @ head["output"]
    mlp = params["mlp"]
    stream = stream + jax.nn.relu(stream @ mlp["in_w"] + mlp["in_b"][None]) @ mlp["out_w"] + mlp["out_b"][None]
    return stream @ params["unembedding"]["w"]


class ModularData(DataSpec):
    """All pairs (a, b) of numbers below the modulus, shuffled: the first n_data train, the others test."""

    modulus: int = Field(53, ge=2, le=1000, description="p: the sum is taken modulo this, a prime in the literature")
    n_data: int = Field(1320, ge=2, description="number of training pairs n, of p^2")

    @model_validator(mode="after")
    def _leaves_a_test(self) -> Self:
        if self.n_data >= self.modulus**2:
            raise ValueError(
                f"n_data must be below modulus^2, {self.modulus**2}, so that pairs are left to test; got {self.n_data}"
            )
        return self


class ModularAdditionSpec(TrainedSpec):
    """Modular addition by a one-layer transformer, which generalises long after it has memorised (grokking).

    Cross-entropy l(w; a, b) = -log softmax(f(a, b; w))_{(a+b) mod p}, in nats. Weight decay is the training's, not the loss's.
    """

    family: Literal["modular_addition"] = "modular_addition"
    model: TransformerSpec = TransformerSpec()
    data: ModularData = ModularData()
    training: TrainingSpec = TrainingSpec(
        optimizer="adamw",
        learning_rate=1e-3,
        schedule="constant",
        warmup_steps=10,
        num_steps=2000,
        beta2=0.98,
        weight_decay=2.0,
    )

    @property
    def observable_names(self) -> tuple[str, ...]:
        return ("test",)

    @property
    def sample_size(self) -> int:
        return 3

    def param_shapes(self) -> Shapes:
        return shaped(self.model.shapes(self.data.modulus), self.precision)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        p, n = self.data.modulus, self.data.n_data
        pairs = np.random.default_rng((self.seed, 0)).permutation(p * p).astype(np.int32)
        a, b = pairs // p, pairs % p
        everything = Dataset({"a": a, "b": b, "y": (a + b) % p}, {})
        dataset, test = everything.take(np.arange(n)), everything.take(np.arange(n, p * p))
        params = jax.tree.map(lambda leaf: leaf.astype(self.precision), self.model.init((self.seed, 1), p))
        observables = {"test": test.take(np.arange(test.num_data)[:OBSERVABLE_SIZE])}
        key = jax.random.key(self.seed)
        measure = classification_measure(_logits, dataset, test)
        return train_target(self, Untrained(params, dataset, key, observables, measure), progress, resume, save)

    def objective(self) -> Objective:
        return cross_entropy(_logits)


def _logits(params: Params, dataset: Dataset) -> jax.Array:
    return transformer(params, dataset.samples["a"], dataset.samples["b"])
