"""The network of batch-size studies: a ReLU MLP without biases whose weights are all of size one.

With L weight layers W_0, ..., W_{L-1}, every weight drawn from N(0, 1), inputs of dimension D and hidden layers of N units:

  z_0 = W_0^T x / sqrt(D),  h_l = relu(z_l),  z_{l+1} = W_{l+1}^T h_l / sqrt(N),  raw output = W_{L-1}^T h_{L-2}

and f = raw / (gamma sqrt(N)) in the standard parameterization (SP; it is that of the neural tangent kernel), raw / (gamma N) in
the maximal update parameterization (muP; Yang et al., arXiv 2203.03466), gamma being the richness: small is lazy, large is
rich (Atanasov et al., arXiv 2410.04642). So muP at gamma is SP at gamma sqrt(N).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

Parameterization = Literal["sp", "mup"]
Params = dict[str, dict[str, Any]]


def output_scale(parameterization: Parameterization, width: int, richness: float) -> float:
    """f over the raw output: 1/(gamma sqrt(N)) or 1/(gamma N)."""
    return 1 / (richness * (width if parameterization == "mup" else math.sqrt(width)))


def init_params(seed: tuple[int, ...], widths: Sequence[int], precision: str) -> Params:
    """Weights from N(0, 1) of layers `widths`, input and output included; the same numbers in every precision."""
    rng = np.random.default_rng(seed)
    shapes = enumerate(itertools.pairwise(widths))
    return {f"layer_{layer}": {"w": rng.standard_normal(shape).astype(precision)} for layer, shape in shapes}


def to_weights(params: Mapping[str, Any]) -> list[Any]:
    """The layers' weights from the input on, each (out, in): the layout in which products over many networks are fast."""
    return [params[f"layer_{layer}"]["w"].swapaxes(-1, -2) for layer in range(len(params))]


def upper_layers(weights: Sequence[jax.Array], z: jax.Array) -> list[jax.Array]:
    """Outputs h_0, h_1, ... of the hidden layers and the raw output, each (units, B).

    Args:
      weights: W_1, ..., each (out, in). z: of the first layer, (N, B).
    """
    outputs = []
    for weight in weights:
        outputs.append(jax.nn.relu(z))
        z = weight @ outputs[-1]
        if len(outputs) < len(weights):
            z = z / math.sqrt(weight.shape[1])
    return [*outputs, z]


def activations(params: Mapping[str, Any], x: jax.Array) -> list[jax.Array]:
    """Outputs of the layers, each (B, units), of inputs x, (B, D): of hidden ones after the relu, last the raw output."""
    first, *rest = to_weights(params)
    z = first @ (x / math.sqrt(x.shape[-1])).T
    return [output.T for output in upper_layers(rest, z)]


def forward(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """The raw output, (B, out), of inputs x, (B, D)."""
    return activations(params, x)[-1]
