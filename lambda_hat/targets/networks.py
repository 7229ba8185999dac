"""Networks: Haiku modules built from their specs."""

from __future__ import annotations

import bisect
import functools
import itertools
from typing import ClassVar, Literal, Self

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, PositiveInt, model_validator

from lambda_hat.specs.spec import Precision, Spec
from lambda_hat.targets.target import Shapes

Activation = Literal["relu", "leaky_relu", "gelu", "silu", "tanh", "identity"]

ACTIVATIONS = {
    "relu": jax.nn.relu, "leaky_relu": jax.nn.leaky_relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh,
    "identity": lambda x: x,
}  # fmt: skip

Init = Literal["auto", "he", "lecun", "xavier"]

_VARIANCE = {"he": (2.0, "fan_in"), "lecun": (1.0, "fan_in"), "xavier": (1.0, "fan_avg")}


def initializer(init: Init, activation: Activation) -> hk.initializers.Initializer:
    """Truncated normal weights of variance 2/fan_in (he), 1/fan_in (lecun) or 2/(fan_in + fan_out) (xavier, or Glorot).

    auto: he before a ReLU or leaky ReLU, else lecun.
    """
    if init == "auto":
        init = "he" if activation in ("relu", "leaky_relu") else "lecun"
    return hk.initializers.VarianceScaling(*_VARIANCE[init], "truncated_normal")


class ModelSpec(Spec):
    """A multilayer perceptron; input and output come from the data.

    Its hidden layers are given in one of three ways: `depth` layers of `width` units; their `widths`; or `target_params`, and
    `depth` layers as wide as brings the number of parameters nearest to it.
    """

    rivals: ClassVar = {
        "depth": ("widths",), "width": ("widths", "target_params"), "target_params": ("widths", "width"),
        "widths": ("depth", "width", "target_params"),
    }  # fmt: skip

    depth: int | None = Field(None, ge=0, le=100, description="number of hidden layers; none = 2")
    width: int | None = Field(None, ge=1, description="units in each hidden layer; none = 16")
    widths: tuple[PositiveInt, ...] | None = Field(None, max_length=100, description="instead: units of each hidden layer")
    target_params: int | None = Field(None, ge=1, description="instead of a width: number of parameters to come near to")
    activation: Activation = Field("relu", description="activation of the hidden layers")
    bias: bool = Field(True, description="whether layers add a bias")
    layernorm: bool = Field(False, description="whether hidden layers are normalised before the activation")
    skip: bool = Field(False, description="whether hidden layers add their input, where it is as wide as they are")
    init: Init = Field("auto", description="hidden layers' initial weights; auto = he before (leaky) relu, else lecun")

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        others = [name for name in ("depth", "width", "target_params") if getattr(self, name) is not None]
        if self.widths is not None and others:
            raise ValueError(
                f"widths says all about the hidden layers; got {' and '.join(others)} too: set to none what is not meant"
            )
        if self.target_params is not None and self.width is not None:
            raise ValueError(
                f"target_params decides the width; got width={self.width} too: set to none the one that is not meant"
            )
        if self.target_params is not None and self.depth == 0:
            raise ValueError("target_params needs hidden layers whose width it decides; got depth=0")
        return self

    def hidden_widths(self, input_dim: int, output_dim: int) -> tuple[int, ...]:
        """Units of each hidden layer, from the input on."""
        if self.widths is not None:
            return self.widths
        depth = 2 if self.depth is None else self.depth
        width = 16 if self.width is None else self.width
        if self.target_params is not None:

            def count(width: int) -> int:
                return self._count(input_dim, (width,) * depth, output_dim)

            # The count grows with the width, and every unit has at least one parameter.
            above = bisect.bisect_left(range(1, self.target_params), self.target_params, key=count) + 1
            width = min(max(above - 1, 1), above, key=lambda width: abs(count(width) - self.target_params))  # type: ignore[operator]
        return (width,) * depth

    def num_params(self, input_dim: int, output_dim: int) -> int:
        """Number of the network's parameters."""
        return self._count(input_dim, self.hidden_widths(input_dim, output_dim), output_dim)

    def _count(self, input_dim: int, hidden: tuple[int, ...], output_dim: int) -> int:
        pairs = itertools.pairwise((input_dim, *hidden, output_dim))
        return sum((inner + self.bias) * outer for inner, outer in pairs) + 2 * self.layernorm * sum(hidden)


class Dense(hk.Module):
    """W^T h + b of features-first activations h, (in, batch) to (out, batch), with w of shape (in, out) as in hk.Linear.

    With the batch last, CPUs do the products of the forward and both backward passes at one speed; with it first, that of the
    weights' gradient takes twice as long.
    """

    def __init__(self, width: int, with_bias: bool, w_init: hk.initializers.Initializer | None, name: str) -> None:
        super().__init__(name=name)
        self.width, self.with_bias, self.w_init = width, with_bias, w_init

    def __call__(self, h: jax.Array) -> jax.Array:
        fan_in = h.shape[0]
        init = self.w_init or hk.initializers.TruncatedNormal(fan_in**-0.5)
        w = hk.get_parameter("w", (fan_in, self.width), h.dtype, init)
        out = jnp.einsum("io,ib->ob", w, h)
        if self.with_bias:
            out = out + hk.get_parameter("b", (self.width,), h.dtype, jnp.zeros)[:, None]
        return out


@functools.cache
def mlp(spec: ModelSpec, output_dim: int) -> hk.Transformed:
    """The network as a pure (init, apply) pair: `apply(params, x)` maps (batch, in) to (batch, output_dim).

    A hidden layer is x -> activation(norm(W x + b)), plus x with `skip`. The output's weights start LeCun-normal, biases at 0.
    Cached, so that equal specs give the same functions and compile once.
    """

    def forward(x: jax.Array) -> jax.Array:
        init = initializer(spec.init, spec.activation)
        # Or XLA would fold the transposition into the gradient of the first layer's weights.
        h = jax.lax.optimization_barrier(x.T)
        for layer, width in enumerate(spec.hidden_widths(x.shape[-1], output_dim)):
            out = Dense(width, spec.bias, init, f"hidden_{layer}")(h)
            if spec.layernorm:
                out = hk.LayerNorm(-1, create_scale=True, create_offset=True, name=f"norm_{layer}")(out.T).T
            out = ACTIVATIONS[spec.activation](out)
            h = h + out if spec.skip and out.shape == h.shape else out
        return Dense(output_dim, spec.bias, None, "output")(h).T

    return hk.without_apply_rng(hk.transform(forward))


class CnnSpec(Spec):
    """A convolutional network: 3x3 convolutions of stride 2, each followed by a ReLU, then a linear layer."""

    channels: tuple[PositiveInt, ...] = Field((8, 16), min_length=1, max_length=5, description="channels of each convolution")
    bias: bool = Field(True, description="whether layers add a bias")
    init: Init = Field("auto", description="initial weights of the convolutions; auto = he")


def input_shapes(network: hk.Transformed, input_dim: int, precision: Precision) -> Shapes:
    """What `init` gives for inputs (batch, input_dim), without the numbers."""
    with jax.enable_x64(precision == "float64"):
        return jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, input_dim), np.dtype(precision)))


@functools.cache
def cnn(spec: CnnSpec, side: int, output_dim: int) -> hk.Transformed:
    """The network as a pure (init, apply) pair: `apply(params, x)` maps images (batch, side * side) to (batch, output_dim)."""

    def forward(x: jax.Array) -> jax.Array:
        init = initializer(spec.init, "relu")
        x = x.reshape(len(x), side, side, 1)
        for layer, channels in enumerate(spec.channels):
            # A matrix product over the patches: on CPUs a convolution with weights of its own for each chain is slower.
            x = hk.Linear(channels, with_bias=spec.bias, w_init=init, name=f"conv_{layer}")(_patches(x))
            x = jax.nn.relu(x)
        return hk.Linear(output_dim, with_bias=spec.bias, name="output")(x.reshape(len(x), -1))

    return hk.without_apply_rng(hk.transform(forward))


def _patches(x: jax.Array) -> jax.Array:
    """The 3x3 neighbourhoods of every second pixel, 0 outside: (B, side, side, C) to (B, ceil(side/2), ceil(side/2), 9 C)."""
    side = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [x[:, i : i + side : 2, j : j + side : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)
