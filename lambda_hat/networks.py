"""Networks: Haiku modules built from a `ModelSpec`."""

from __future__ import annotations

import functools
from typing import Literal

import haiku as hk
import jax
import jax.numpy as jnp
from pydantic import Field

from lambda_hat.spec import Spec

Activation = Literal["relu", "tanh", "gelu", "identity"]

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "gelu": jax.nn.gelu, "identity": lambda x: x}


class ModelSpec(Spec):
    """A multilayer perceptron: `depth` hidden layers of `width` units; input and output come from the data."""

    depth: int = Field(2, ge=0, le=100, description="number of hidden layers")
    width: int = Field(16, ge=1, description="units in each hidden layer")
    activation: Activation = Field("relu", description="activation of the hidden layers")
    bias: bool = Field(True, description="whether layers add a bias")


@functools.cache
def mlp(spec: ModelSpec, output_dim: int) -> hk.Transformed:
    """The network as a pure (init, apply) pair: `apply(params, x)` maps (batch, in) to (batch, output_dim).

    Weights start as LeCun-normal (variance 1/fan_in; He-normal, 2/fan_in, before a ReLU), biases at 0.
    Cached, so that equal specs give the same functions and compile once.
    """
    gain = 2.0 if spec.activation == "relu" else 1.0

    def forward(x: jax.Array) -> jax.Array:
        init = hk.initializers.VarianceScaling(gain, "fan_in", "truncated_normal")
        for layer in range(spec.depth):
            x = hk.Linear(spec.width, with_bias=spec.bias, w_init=init, name=f"hidden_{layer}")(x)
            x = ACTIVATIONS[spec.activation](x)
        return hk.Linear(output_dim, with_bias=spec.bias, name="output")(x)

    return hk.without_apply_rng(hk.transform(forward))
