"""Every kind of pytree as the library's, and what is no loss, no parameters or no data."""

from __future__ import annotations

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.selection import num_selected, select
from lambda_hat.targets.target import Dataset, mean_loss_float64
from lambda_hat.targets.wrap import wrap, wrap_like

RNG = np.random.default_rng(0)

# --- Networks of every library -----------------------------------------------------------------------------------------

X = RNG.standard_normal((60, 3)).astype(np.float32)
BATCH = {"x": X, "y": np.sin(X.sum(axis=1, keepdims=True))}


def squared(output, batch):
    return jnp.sum(jnp.square(output - batch["y"]), axis=1)


def plain():
    params = [(0.5 * np.ones((3, 4), np.float32), np.zeros(4, np.float32)), (0.5 * np.ones((4, 1), np.float32),)]
    return (lambda p, b: squared(jnp.tanh(b["x"] @ p[0][0] + p[0][1][None, :]) @ p[1][0], b)), params, "0/*"


def haiku():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 1], activation=jnp.tanh)(x)))
    return (lambda p, b: squared(network.apply(p, b["x"]), b)), network.init(jax.random.key(0), X), "mlp/~/linear_0/*"


def linen():
    import flax.linen as nn

    network = nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(1)])
    return (lambda p, b: squared(network.apply(p, b["x"]), b)), network.init(jax.random.key(0), X), "params/layers_0/*"


def nnx_network():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.dropout, self.last = (
                nnx.Linear(3, 4, rngs=rngs),
                nnx.Dropout(0.5, rngs=rngs),
                nnx.Linear(4, 1, rngs=rngs),
            )

        def __call__(self, x):
            return self.last(self.dropout(jnp.tanh(self.first(x))))

    network = Network(nnx.Rngs(0))
    network.eval()
    return network


def nnx_split():
    from flax import nnx

    graph, params, rest = nnx.split(nnx_network(), nnx.Param, ...)
    return (lambda p, b: squared(nnx.merge(graph, p, rest)(b["x"]), b)), params, "first/*"


def nnx_module():
    """With its random keys and counts, which stay."""
    return (lambda network, b: squared(network(b["x"]), b)), nnx_network(), "first/*"


def equinox():
    """With functions as leaves, which stay."""
    import equinox as eqx

    network = eqx.nn.MLP(3, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    return (lambda network, b: squared(jax.vmap(network)(b["x"]), b)), network, "layers/0/*"


@pytest.mark.parametrize("make", [plain, haiku, linen, nnx_split, nnx_module, equinox])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Flax's own
def test_networks_of_every_library(make, library_promotion):
    with jax.enable_x64(False):
        loss_fn, params, first_layer = make()
        wrapped = wrap(loss_fn, params, BATCH)
        assert num_selected(wrapped.params, select(wrapped.params, [first_layer])) == 16
        np.testing.assert_allclose(wrapped.losses, loss_fn(params, BATCH), rtol=1e-5)
        moved = jax.tree.map(lambda x: x + np.float32(0.1), wrapped.params)
        expected = loss_fn(jax.tree.map(lambda x: x + 0.1 if _floats(x) else x, params), BATCH)
        np.testing.assert_allclose(
            jax.jit(wrapped.objective.per_sample_loss)(moved, wrapped.dataset), expected, rtol=1e-5, atol=1e-8
        )


def _floats(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


# --- Leaves --------------------------------------------------------------------------------------------------------------

STAR = RNG.standard_normal(4)
X4, Y = RNG.standard_normal((50, 4)), RNG.standard_normal(50)
DATA = (X4, Y)


class Model(NamedTuple):
    w: np.ndarray
    steps: np.ndarray
    mask: np.ndarray
    key: jax.Array
    activation: object
    none: None
    rate: float


def test_what_is_no_floating_array_stays():
    params = Model(STAR, np.array([3, 4]), np.array([1, 0, 1, 1], bool), jax.random.key(7), jnp.tanh, None, 0.5)

    def loss_fn(p, batch):
        assert p.none is None
        scale = p.steps[0].astype(p.w.dtype) + jax.random.uniform(p.key, dtype=p.w.dtype) + p.rate
        return scale * jnp.square(p.activation(batch[0]) @ jnp.where(p.mask, p.w, 0.0))

    wrapped = wrap(loss_fn, params, DATA)
    assert list(wrapped.params) == ["w", "rate"]
    np.testing.assert_allclose(wrapped.losses, loss_fn(params, DATA), rtol=1e-12)
    again = wrap(loss_fn, params._replace(w=STAR + 1, key=jax.random.key(8)), DATA)
    assert again.objective is wrapped.objective, "its programs are compiled already"
    assert not np.allclose(again.losses, wrapped.losses)


def losses(params, batch):
    return 0.5 * jnp.square(batch[0] @ params["a"] - batch[1])


def test_a_mean_is_taken_of_one_sample_at_a_time():
    one, other = (wrap(loss_fn, {"a": STAR}, DATA) for loss_fn in (losses, lambda p, b: jnp.mean(losses(p, b))))
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-12)


def test_data_are_taken_in_the_dtype_of_params():
    seen = set()

    def loss_fn(params, batch):
        seen.add((batch[0].dtype.name, batch[1].dtype.name))
        return jnp.square(batch[0] @ params)

    with jax.enable_x64(False):
        assert list(wrap(loss_fn, STAR.astype(np.float32), (X4, np.arange(50))).params) == ["value"]
    assert seen == {("float32", "int32")}
    assert wrap(loss_fn, STAR, (X4.astype(np.float32), Y)).losses.dtype == np.float64


def test_a_loss_in_a_lower_precision_is_taken_as_it_is():
    wrapped = wrap(lambda p, b: losses(p, b).astype(jnp.float32), {"a": STAR}, DATA)
    assert wrapped.objective.per_sample_loss(wrapped.params, wrapped.dataset).dtype == np.float64


def test_a_loss_is_in_the_dtype_it_is_called_with():
    """Parameters in float32 are measured in float64 all the same."""
    single = {"a": STAR.astype(np.float32)}
    wrapped = wrap(lambda p, b: 1e4 + losses(p, b), single, DATA)
    assert wrapped.losses.dtype == np.float32
    x, y = (np.asarray(array, np.float32).astype(np.float64) for array in DATA)
    exact = np.mean(1e4 + 0.5 * np.square(x @ single["a"].astype(np.float64) - y))
    assert mean_loss_float64(wrapped.objective, wrapped.params, wrapped.dataset) == pytest.approx(exact, rel=1e-14)
    assert np.abs(np.mean(wrapped.losses, dtype=np.float64) / exact - 1) > 1e-10


def test_observables_are_like_data():
    wrapped = wrap(losses, {"a": STAR}, DATA)
    assert isinstance(wrap_like("one", (X4[:1], Y[:1]), DATA, wrapped), Dataset)


# --- Errors --------------------------------------------------------------------------------------------------------------


def of_losses(output):
    return lambda params, batch: output(losses(params, batch))


def nan_at_17(params, batch):
    return jnp.where(batch[1] == Y[17], jnp.nan, losses(params, batch))


def batch_normalised(params, batch):
    return losses(params, (batch[0] - jnp.mean(batch[0], axis=0, keepdims=True), batch[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": of_losses(lambda loss: loss[:, None])}, r"of 32 samples it returned shape \(32, 1\) of float64"),
        ({"loss_fn": of_losses(lambda loss: (jnp.mean(loss), loss))}, "of 32 samples it returned tuple"),
        ({"loss_fn": of_losses(lambda loss: (loss > 0).astype(int))}, r"as floating numbers; of 32 samples .* int64"),
        ({"loss_fn": nan_at_17}, "loss_fn must be finite at params; got nan for 1 of 50 samples, first for sample 17"),
        ({"loss_fn": batch_normalised}, "must not depend on the rest of its batch"),
        ({"loss_fn": of_losses(jnp.sum)}, "A scalar loss must be the mean"),
        ({"params": {"a": STAR, "b": STAR.astype(np.float32)}}, "all float32 or all float64; got float32 and float64"),
        ({"params": {"a": jnp.asarray(STAR, jnp.bfloat16)}}, "got bfloat16. Convert"),
        ({"params": {"n": np.arange(3)}}, "got only int"),
        ({"params": {"a": STAR * np.nan}}, "params must be finite; got NaN or infinity in a"),
        ({"params": {"b": {"c": STAR}, "b/c": STAR}}, "a path of its own; got two named 'b/c'"),
        ({"params": {"a": STAR, "z": {1, 2}}}, "must be hashable; got .*set"),
        ({"data": (X4, Y[:-1])}, "must have one first axis, of 2 or more samples; got 49 and 50"),
        ({"data": (X4[:1], Y[:1])}, "of 2 or more samples; got 1"),
        ({"data": (X4, 3.0)}, "first axis is the sample; got float"),
        ({"data": ()}, "first axis is the sample; got none"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        wrap(**{"loss_fn": losses, "params": {"a": STAR}, "data": DATA} | arguments)
