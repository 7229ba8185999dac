"""Networks are what their specs say."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from lambda_hat.targets.networks import ACTIVATIONS, CnnSpec, ModelSpec, cnn, mlp

X = np.random.default_rng(0).standard_normal((5, 3))


def init(spec, output_dim=2):
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(mlp(spec, output_dim).init)(jax.random.key(0), X)


@pytest.mark.usefixtures("library_promotion")
@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(), ModelSpec(depth=0), ModelSpec(depth=3, width=7, bias=False), ModelSpec(widths=(5, 4), layernorm=True),
        ModelSpec(widths=()), ModelSpec(target_params=500), ModelSpec(depth=1, skip=True),
    ],
)  # fmt: skip
def test_number_of_parameters(spec):
    shapes = jax.eval_shape(mlp(spec, 2).init, jax.random.key(0), X)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == spec.num_params(3, 2)


@pytest.mark.parametrize("fields", [{}, {"depth": 1}, {"depth": 5, "bias": False}, {"layernorm": True}])
@pytest.mark.parametrize("target", [1, 60, 999, 12_345, 1_000_000])
def test_target_params_is_met_as_nearly_as_a_width_can(fields, target):
    spec = ModelSpec(target_params=target, **fields)
    (width, *others) = spec.hidden_widths(10, 2)
    assert set(others) <= {width}
    plain = {name: value for name, value in fields.items() if name != "depth"}
    counts = [
        ModelSpec(widths=(w,) * (1 + len(others)), **plain).num_params(10, 2) for w in (max(width - 1, 1), width, width + 1)
    ]
    assert min(abs(count - target) for count in counts) == abs(counts[1] - target)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mlp_by_hand(name):
    """Layer norm before the activation, and a sum with the input where it is as wide."""
    spec = ModelSpec(widths=(4, 4), activation=name, layernorm=True, skip=True)
    params = jax.tree.map(lambda leaf: leaf + 0.1, init(spec))
    h = X
    for layer in (0, 1):
        linear, norm = params[f"hidden_{layer}"], params[f"norm_{layer}"]
        z = h @ linear["w"] + linear["b"][None]
        z = (z - z.mean(1, keepdims=True)) / np.sqrt(np.var(np.asarray(z), axis=1, keepdims=True) + 1e-5)
        z = ACTIVATIONS[name](z * norm["scale"][None] + norm["offset"][None])
        h = z if layer == 0 else h + z
    expected = h @ params["output"]["w"] + params["output"]["b"][None]
    np.testing.assert_allclose(mlp(spec, 2).apply(params, X), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("init_name", "activation", "variance"),
    [
        ("auto", "relu", 2 / 400),
        ("auto", "tanh", 1 / 400),
        ("he", "tanh", 2 / 400),
        ("lecun", "relu", 1 / 400),
        ("xavier", "relu", 2 / 1000),
    ],
)
def test_initial_weights(init_name, activation, variance):
    spec = ModelSpec(depth=1, width=600, init=init_name, activation=activation)
    with jax.numpy_dtype_promotion("standard"):
        params = jax.jit(mlp(spec, 1).init)(jax.random.key(0), np.zeros((1, 400)))
    assert params["hidden_0"]["w"].var() == pytest.approx(variance, rel=0.02)
    assert (params["hidden_0"]["b"] == 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": (3,), "depth": 1}, "widths says all about the hidden layers; got depth too"),
        ({"widths": (3,), "target_params": 9, "width": 2}, "got width and target_params too"),
        ({"target_params": 100, "width": 5}, "target_params decides the width; got width=5 too"),
        ({"target_params": 100, "depth": 0}, "got depth=0"),
        ({"widths": (0,)}, "greater than 0"),
    ],
)
def test_fields_that_contradict(fields, message):
    with pytest.raises(ValidationError, match=message):
        ModelSpec(**fields)


def test_equal_specs_are_one_network():
    assert mlp(ModelSpec(widths=(3,)), 2) is mlp(ModelSpec(widths=(3,)), 2)


@pytest.mark.parametrize("side", [8, 7])
def test_cnn_is_a_strided_convolution(side):
    """Against XLA's own convolution."""
    spec = CnnSpec(channels=(3, 5))
    x = np.random.default_rng(0).standard_normal((4, side * side))
    network = cnn(spec, side, 10)
    with jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.05, jax.jit(network.init)(jax.random.key(0), x))

    @jax.jit
    def expected(params, x):
        h = x.reshape(4, side, side, 1)
        for layer, channels in enumerate(spec.channels):
            kernel = params[f"conv_{layer}"]["w"].reshape(3, 3, h.shape[-1], channels)
            h = jax.lax.conv_general_dilated(h, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
            h = jax.nn.relu(h + params[f"conv_{layer}"]["b"][None, None, None])
        return h.reshape(4, -1) @ params["output"]["w"] + params["output"]["b"][None]

    np.testing.assert_allclose(jax.jit(network.apply)(params, x), expected(params, x), rtol=1e-6, atol=1e-8)
