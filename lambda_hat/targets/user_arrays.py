"""What a user gives, leaf by leaf: which of their parameters move and which stay, and the arrays of their data."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.specs.text import listed
from lambda_hat.targets.selection import tensor_name

#: What a dataset calls its samples' weights.
WEIGHT = "weight"

#: Names under which libraries keep running statistics of normalisation, which training does not fit: Flax Linen's collection,
#: Haiku's moving averages, PyTorch's buffers; and the classes that hold them in Flax NNX and in Equinox.
STATISTICS = {"batch_stats", "mean_ema", "var_ema", "running_mean", "running_var"}
STATISTIC_CLASSES = {("flax", "BatchStat"), ("equinox", "State")}


class Leaf(NamedTuple):
    """A leaf of the parameters.

    moves: the array to sample, or None. stays: the array that does not move, or None; of a random key its data, and key_impl
    its kind. static: a leaf that is no array. is_setting: whether that is a Python float of an Equinox module, which Equinox
    does not train.
    """

    name: str
    moves: np.ndarray | None = None
    stays: np.ndarray | None = None
    key_impl: str | None = None
    static: Hashable = None
    is_setting: bool = False


def parameter_leaves(params: Any) -> list[Leaf]:
    """The leaves of a user's parameters, in order; warns of one array in two places.

    Raises:
      InvalidInput: what moves is not of one dtype, float32 or float64, not finite, or two of it have one path.
    """
    leaves: list[Leaf] = []
    places: dict[Any, list[str]] = defaultdict(list)  # of each array that moves
    for path, node in jax.tree_util.tree_flatten_with_path(params, is_leaf=_holds_statistics)[0]:
        for inner, value in jax.tree_util.tree_flatten_with_path(node)[0]:
            name = tensor_name((*path, *inner)) or "value"
            named = not STATISTICS.isdisjoint(name.replace(".", "/").split("/"))
            leaf = _leaf(name, value, _holds_statistics(node) or named, _is_in_equinox(params, path))
            leaves.append(leaf)
            if leaf.moves is not None and leaf.moves.ndim:
                places[_identity(value)].append(name)
    leaves = _in_one_dtype(leaves)
    _check_moving({leaf.name: leaf.moves for leaf in leaves if leaf.moves is not None}, leaves)
    for names in places.values():
        if len(names) > 1:
            warnings.warn(
                f"{listed(names)} of params are one array, but move apart from each other. If the network ties them, give the "
                "array once and let loss_fn use it in both places.",
                stacklevel=5,
            )
    return leaves


def _holds_statistics(node: Any) -> bool:
    return (type(node).__module__.split(".")[0], type(node).__name__) in STATISTIC_CLASSES


def _is_in_equinox(params: Any, path: Sequence[Any]) -> bool:
    """Whether the leaf at `path` is of an Equinox module."""
    node = params
    for key in path:
        if any(cls.__module__.split(".")[0] == "equinox" for cls in type(node).__mro__):
            return True
        match key:
            case jax.tree_util.DictKey():
                node = node[key.key]
            case jax.tree_util.SequenceKey():
                node = node[key.idx]
            case jax.tree_util.GetAttrKey():
                node = getattr(node, key.name)
            case _:
                return False
    return False


def _leaf(name: str, value: Any, is_statistic: bool, in_equinox: bool) -> Leaf:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return Leaf(name, stays=np.asarray(jax.random.key_data(value)), key_impl=str(jax.random.key_impl(value)))
    if _is_array(value):
        moves = jnp.issubdtype(value.dtype, jnp.inexact) and value.size > 0 and not is_statistic
        return Leaf(name, moves=np.asarray(value)) if moves else Leaf(name, stays=np.asarray(value))
    if isinstance(value, float) and not in_equinox:
        return Leaf(name, moves=np.asarray(value, object))
    return Leaf(name, static=value, is_setting=isinstance(value, float))


def _is_array(value: Any) -> bool:
    """Whether it is an array of numbers: no random keys, no objects."""
    if not isinstance(value, np.ndarray | np.generic | jax.Array) or isinstance(value, np.ma.MaskedArray):
        return False
    return (jnp.issubdtype(value.dtype, np.number) and value.dtype.kind != "m") or value.dtype == np.bool_


def _identity(array: Any) -> Any:
    """Equal for arrays that share their memory."""
    if isinstance(array, np.ndarray):
        return array.__array_interface__["data"][0], array.shape, array.strides
    return id(array)


def _in_one_dtype(leaves: list[Leaf]) -> list[Leaf]:
    """What moves, Python floats in the dtype of the arrays.

    Raises:
      InvalidInput: these have several, or none that samplers know.
    """
    moving = [leaf.moves for leaf in leaves if leaf.moves is not None]
    dtypes = sorted({array.dtype.name for array in moving} - {"object"}) or (["float32"] if moving else [])
    if not dtypes:
        raise InvalidInput(
            f"params must hold arrays of floating numbers; got {_others(leaves)}. Pass the pytree of the trained "
            "network's parameters."
        )
    if dtypes not in (["float32"], ["float64"]):
        raise InvalidInput(
            f"The floating arrays of params must be all float32 or all float64; got {' and '.join(dtypes)}. "
            "Convert them with jax.tree.map."
        )
    return [leaf if leaf.moves is None else leaf._replace(moves=leaf.moves.astype(dtypes[0], copy=False)) for leaf in leaves]


def _others(leaves: list[Leaf]) -> str:
    """What there is in place of parameters."""
    kinds = [type(leaf.static).__name__ if leaf.stays is None else str(leaf.stays.dtype) for leaf in leaves]
    return f"only {listed(list(dict.fromkeys(kinds)))}" if kinds else "nothing"


def _check_moving(star: dict[str, np.ndarray], leaves: list[Leaf]) -> None:
    names = [leaf.name for leaf in leaves if leaf.moves is not None]
    if len(names) > len(star):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInput(f"Each array of params must have a path of its own; got two named {twice!r}. Rename a key.")
    bad = [name for name, array in star.items() if not np.isfinite(array).all()]
    if bad:
        raise InvalidInput(f"params must be finite; got NaN or infinity in {listed(bad)}. Train with a lower learning rate.")


def sample_arrays(what: str, data: Any, dtype: np.dtype, least: int) -> dict[str, np.ndarray]:
    """The arrays of a user's data by the place of their leaf, floating ones in `dtype`.

    Raises:
      InvalidInput: a leaf is no array of numbers, or they have no common first axis of `least` or more.
    """
    leaves = jax.tree.leaves(data)
    wrong = [_kind(leaf) for leaf in leaves if not _is_array(leaf) or np.ndim(leaf) == 0]
    if wrong or not leaves:
        raise InvalidInput(
            f"The leaves of {what} must be arrays of numbers whose first axis is the sample; got {listed(wrong) or 'none'}. "
            "Pass arrays, like (x, y), and let loss_fn close over what the samples share."
        )
    lengths = sorted({len(leaf) for leaf in leaves})
    if len(lengths) > 1 or lengths[0] < least:
        raise InvalidInput(
            f"The arrays of {what} must have one first axis, of {least} or more samples; "
            f"got {' and '.join(map(str, lengths))}. Let loss_fn close over what the samples share."
        )
    arrays = [np.asarray(leaf) for leaf in leaves]
    for array in arrays:
        bits = np.uint32 if array.dtype.kind == "u" else np.int32
        if dtype == np.float32 and array.dtype.kind in "iu" and array.size and not _within(array, bits):
            raise InvalidInput(
                f"The integers of {what} must fit 32 bits where the parameters are float32; got {array.min()} to "
                f"{array.max()}. Convert them to floating numbers, or the parameters to float64."
            )
    return {
        str(place): array.astype(dtype, copy=False) if jnp.issubdtype(array.dtype, jnp.floating) else array
        for place, array in enumerate(arrays)
    }


def _kind(leaf: Any) -> str:
    """What a leaf of data is that it must not be."""
    if isinstance(leaf, np.ma.MaskedArray):
        return "MaskedArray, whose mask JAX does not know"
    return f"{type(leaf).__name__} of {leaf.dtype}, shape {leaf.shape}" if hasattr(leaf, "dtype") else type(leaf).__name__


def _within(array: np.ndarray, bits: type[np.integer]) -> bool:
    """Whether all integers of the array fit these bits."""
    limits = np.iinfo(bits)
    return int(array.min()) >= limits.min and int(array.max()) <= limits.max


def sample_weights(weights: Any, num_data: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    """The samples' weights, of mean 1, by their name in a dataset; empty for None.

    Raises:
      InvalidInput: they are not `num_data` finite numbers, none negative, some positive.
    """
    if weights is None:
        return {}
    try:
        array = np.asarray(weights)
    except ValueError:  # rows of different lengths
        array = np.asarray(weights, object)
    if array.shape != (num_data,) or array.dtype.kind not in "iufb":
        got = f"shape {array.shape} of {array.dtype}"
    elif not np.isfinite(array).all() or (array < 0).any() or not array.any():
        got = f"numbers from {array.min()} to {array.max()}"
    else:
        array = array.astype(np.float64)
        return {WEIGHT: (array / array.mean()).astype(dtype)}
    raise InvalidInput(
        f"weights must be a finite number for each of the {num_data} samples, none negative and not all zero; got {got}. Pass "
        "for example the number of tokens of each row, or class_weights[labels]."
    )
