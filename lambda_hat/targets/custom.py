"""A user's own target: a function, named by its import path, that returns a loss, parameters and data."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, JsonValue

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.specs.spec import InvalidInput, Precision, canonical_json
from lambda_hat.specs.text import shortened
from lambda_hat.targets.target import (
    DataSpec,
    Objective,
    Save,
    Shapes,
    Target,
    TargetSpec,
    Unfinished,
    mean_loss_float64,
    num_params,
)
from lambda_hat.targets.wrap import Wrapped, wrap


class CustomSpec(TargetSpec):
    """A user's own target: an import path to a function that returns loss, parameters and data.

    `package.module:function`, called with `arguments` (and `seed`, if it takes one), returns (loss_fn, params, data), or with
    the samples' weights as a fourth, as `targets.wrap.wrap` takes them, floating arrays of any precision; params are w*, and
    not trained further. Its source is not part of the id: change `version` when results change.
    """

    family: Literal["custom"] = "custom"
    path: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$", description="package.module:function")
    arguments: dict[str, JsonValue] = Field({}, description="keyword arguments of the function: plain JSON")
    version: str = Field("1", description="of the function: anything new when its results change")
    data: DataSpec = DataSpec(n_data=1000)

    def __hash__(self) -> int:
        return hash(self.canonical_json())

    def check_sources(self, built: bool) -> None:
        _function(self.path, canonical_json(self.arguments), self.seed)

    def param_shapes(self) -> Shapes:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._wrapped().params)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        wrapped = self._wrapped()
        if wrapped.dataset.num_data != self.data.n_data:
            raise InvalidInput(
                f"data.n_data must be the number of samples {self.path} returns, {wrapped.dataset.num_data}; "
                f"got {self.data.n_data}. Set data.n_data={wrapped.dataset.num_data}."
            )
        metrics = {
            "init_loss": mean_loss_float64(wrapped.objective, wrapped.params, wrapped.dataset),
            "num_params": num_params(wrapped.params), "num_data": wrapped.dataset.num_data, "loss_degree": wrapped.degree,
        }  # fmt: skip
        return Target(self, wrapped.params, wrapped.dataset, metrics)

    def objective(self) -> Objective:
        return self._wrapped().objective

    def _wrapped(self) -> Wrapped:
        return _call(self.path, self.version, canonical_json(self.arguments), self.seed, self.precision)


def _function(path: str, arguments: str, seed: int) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function at an import path, and the keywords it is to be called with."""
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # whatever a user's module raises
        what = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise InvalidInput(
            f"path must name a function Python can import, as package.module:function; got {path!r}: {what}. "
            "Install its package, put its folder on PYTHONPATH, or correct the module."
        ) from error
    if not callable(function):
        raise InvalidInput(f"path must name a function; {path!r} is {shortened(function)}. Correct it.")
    keywords = json.loads(arguments)
    try:
        signature = inspect.signature(function)
        if "seed" in signature.parameters:
            keywords.setdefault("seed", seed)
        signature.bind(**keywords)
    except TypeError as error:
        raise InvalidInput(
            f"arguments must be those of {path}; got {shortened(keywords)}: {error}. Set target.arguments."
        ) from None
    return function, keywords


@functools.lru_cache(maxsize=8)  # the data come with the loss, and equal specs must share their loss
def _call(path: str, version: str, arguments: str, seed: int, precision: Precision) -> Wrapped:
    function, keywords = _function(path, arguments, seed)
    with jax.enable_x64(precision == "float64"):
        returned = function(**keywords)
        if not isinstance(returned, tuple) or len(returned) not in (3, 4):
            raise InvalidInput(
                f"{path} must return (loss_fn, params, data), or with weights as a fourth; got {type(returned).__name__}. "
                "Return the three."
            )
        loss_fn, params, data, *weights = returned
        return wrap(loss_fn, jax.tree.map(lambda leaf: _cast(leaf, precision), params), data, *weights)


def _cast(leaf: Any, precision: Precision) -> Any:
    """Floating arrays in the target's precision; anything else as it is."""
    return leaf.astype(precision) if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
