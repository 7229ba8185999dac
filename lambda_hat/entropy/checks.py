"""Tensors that are given are looked at on the host before anything is computed of them: a NaN, or an array of another shape,
would end in a wrong number."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.selection import tensor_name
from lambda_hat.targets.target import Params


def check_finite(what: str, tree: Any) -> None:
    """Raises InvalidInput: an array of the tree has numbers that are not finite."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        bad = array.size - int(np.sum(np.isfinite(array)))
        if bad:
            name = f"{what}, {tensor_name(path)}," if path else what
            raise InvalidInput(
                f"{name} must be finite; got {bad} of {array.size} numbers that are not. Correct or leave it out."
            )


def check_like(what: str, tree: Any, params: Params) -> None:
    """Raises InvalidInput: a tree has not the tensors of the parameters, in their shapes, or numbers that are not finite."""
    found, wanted = (
        {tensor_name(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(one)[0]}
        for one in (tree, params)
    )
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            shapes = (f"shape {of[name]}" if name in of else "no such tensor" for of in (wanted, found))
            raise InvalidInput(
                f"{what} must have the parameters' tensors, in their shapes: for {name!r} {next(shapes)}; got {next(shapes)}. "
                "Take those of the same checkpoint."
            )
    check_finite(what, tree)
