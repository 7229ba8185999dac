"""A user's own target: a function, named by its import path, that returns a loss, parameters and data."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from pydantic import Field, JsonValue

from lambda_hat.chunks import Progress, no_progress
from lambda_hat.spec import InvalidInput, Precision, canonical_json
from lambda_hat.target import (
    Arrays,
    Dataset,
    DataSpec,
    Objective,
    Params,
    Save,
    Target,
    TargetSpec,
    Unfinished,
    mean_loss_float64,
    num_params,
)


class Wrapped(NamedTuple):
    """A user's loss, parameters and data as those of a target."""

    objective: Objective
    params: Params
    dataset: Dataset


def wrap(loss_fn: Callable[[Any, Any], Any], params: Any, data: Any, precision: Precision) -> Wrapped:
    """Makes any loss a target's: its pytrees become dicts of named arrays, and `loss_fn` still sees its own.

    Args:
      loss_fn: (params, data) -> the losses of the samples, (n,), or their mean, (); of a minibatch data is its samples.
        A mean must be of independent samples: it is taken of one at a time.
      params: pytree of floating arrays (Haiku, Flax, Equinox after `eqx.partition`, plain dicts). A leaf's name is the parts of
        its path joined by "/".
      data: pytree of arrays whose first axis is the sample, n.
      precision: dtype of all floating arrays; integers become int32.

    Raises:
      InvalidInput: one of them is not so.
    """
    named, unname = _named("parameters", params, precision)
    for name, leaf in named.items():
        if not np.issubdtype(leaf.dtype, np.floating):
            raise InvalidInput(
                f"The leaves of the parameters must be floating arrays; {name!r} is of {leaf.dtype}. Give only what is "
                "trained, and close the loss over the rest (eqx.partition, nnx.split)."
            )
    samples, unsample = _named("data", data, precision)
    sizes = {name: leaf.shape[:1] for name, leaf in samples.items()}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise InvalidInput(
            f"The first axis of all data must be the sample, of one size; got {sizes}. Put what is shared into the loss."
        )

    def losses(named: Params, dataset: Dataset) -> Any:
        return loss_fn(unname(named), unsample(dataset.samples))

    dataset = Dataset(samples, {})
    shape = jax.eval_shape(losses, named, dataset)
    found = getattr(shape, "shape", None)
    if found not in ((), (dataset.num_data,)):
        raise InvalidInput(
            f"The loss must be that of each sample, shape ({dataset.num_data},), or their mean, shape (); got {shape}. "
            "Return one array."
        )

    def one_by_one(named: Params, dataset: Dataset) -> jax.Array:
        return jax.vmap(lambda sample: losses(named, Dataset(jax.tree.map(lambda leaf: leaf[None], sample), {})))(
            dataset.samples
        )

    return Wrapped(Objective(one_by_one if found == () else losses), named, dataset)


def _named(what: str, tree: Any, precision: Precision) -> tuple[Arrays, Callable[[Arrays], Any]]:
    """The tree's leaves by the names of their paths, and the function that makes the tree of them again."""
    paths, structure = jax.tree.flatten_with_path(tree)
    named: Arrays = {}
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "value"
        array = np.asarray(leaf)
        if array.dtype.kind not in "fiub" or name in named or "::" in name:
            raise InvalidInput(
                f"The {what} must be a pytree of arrays of numbers with paths of their own, without '::'; "
                f"got {type(leaf).__name__} at {name!r}. Rename it, or keep what is no array in the loss."
            )
        dtype = {"f": precision, "b": bool}.get(array.dtype.kind, np.int32)
        named[name] = array.astype(dtype)
    names = list(named)
    if not names:
        raise InvalidInput(f"The {what} must hold an array; got none.")
    return named, lambda named: jax.tree.unflatten(structure, [named[name] for name in names])


class CustomSpec(TargetSpec):
    """A user's own target: an import path to a function that returns loss, parameters and data.

    `package.module:function`, called with `arguments` (and `seed`, if it takes one), returns (loss_fn, params, data) as `wrap`
    takes them; params are w*, and not trained further. Its source is not part of the id: change `version` when results change.
    """

    family: Literal["custom"] = "custom"
    path: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$", description="package.module:function")
    arguments: dict[str, JsonValue] = Field({}, description="keyword arguments of the function: plain JSON")
    version: str = Field("1", description="of the function: anything new when its results change")
    data: DataSpec = DataSpec(n_data=1000)

    def __hash__(self) -> int:
        return hash(self.canonical_json())

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        objective, params, dataset = _call(self.path, self.version, canonical_json(self.arguments), self.seed, self.precision)
        if dataset.num_data != self.data.n_data:
            raise InvalidInput(
                f"data.n_data must be the number of samples {self.path} returns, {dataset.num_data}; got {self.data.n_data}. "
                f"Set data.n_data={dataset.num_data}."
            )
        metrics = {
            "init_loss": mean_loss_float64(objective, params, dataset),
            "num_params": num_params(params), "num_data": dataset.num_data,
        }  # fmt: skip
        return Target(self, params, dataset, metrics)

    def objective(self) -> Objective:
        return _call(self.path, self.version, canonical_json(self.arguments), self.seed, self.precision).objective


@functools.lru_cache(maxsize=8)  # the data come with the loss, and equal specs must share their loss
def _call(path: str, version: str, arguments: str, seed: int, precision: Precision) -> Wrapped:
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(
            f"path must name a function Python can import, as package.module:function; got {path!r}: {error}. "
            "Install its package, or put its folder on PYTHONPATH."
        ) from error
    keywords = json.loads(arguments)
    try:
        signature = inspect.signature(function)
        if "seed" in signature.parameters:
            keywords.setdefault("seed", seed)
        signature.bind(**keywords)
    except TypeError as error:
        raise InvalidInput(f"arguments must be those of {path}; got {keywords}: {error}. Set target.arguments.") from None
    with jax.enable_x64(precision == "float64"):
        returned = function(**keywords)
        if not isinstance(returned, tuple) or len(returned) != 3:
            raise InvalidInput(
                f"{path} must return (loss_fn, params, data); got {type(returned).__name__}. Return these three."
            )
        return wrap(*returned, precision)
