"""Which parameters move: tensors of a network, or parts of them, by name; and w at an offset of these."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.specs.text import listed, shortened
from lambda_hat.targets.target import Params

#: For each tensor of the parameters: None if it stays, else which part moves, as the text of a NumPy index ("" for all of it).
Selection = tuple[str | None, ...]


def tensor_names(params: Params) -> list[str]:
    """Names of the parameter tensors in the order of their leaves, like "hidden_0/w"."""
    return [tensor_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def tensor_name(path: tuple[Any, ...]) -> str:
    """The name of the leaf at a path of JAX's keys."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def select(params: Params, patterns: Sequence[str]) -> Selection:
    """Which tensors, or parts of them, the patterns name: shell patterns of tensor names, with an optional index.

    Raises:
      InvalidInput: a pattern names nothing, an index does not fit, or two indices name parts of one tensor.
    """
    names, leaves = tensor_names(params), jax.tree.leaves(params)
    selection: list[str | None] = [None] * len(names)
    for pattern in patterns:
        match = re.fullmatch(r"(.*?)(?:\[([-\d:, ]+)\])?", pattern)
        glob, index = match.group(1), match.group(2) or ""  # type: ignore[union-attr]  # it matches anything
        matched = [place for place, name in enumerate(names) if fnmatch.fnmatchcase(name, glob)]
        if not matched:
            raise InvalidInput(
                f"Every pattern of posterior.parameters must name a parameter; got {shortened(pattern)}. {_remedy(glob, names)}"
            )
        for place in matched:
            if selection[place] not in (None, index):
                raise InvalidInput(
                    f"posterior.parameters may name one part of a tensor; got two of {names[place]!r}: {listed(patterns)}. "
                    "Name the whole tensor or a range that holds both."
                )
            try:
                if np.empty(np.shape(leaves[place]), bool)[index_of(index)].size == 0:
                    raise IndexError("it is empty")
            except (IndexError, TypeError, ValueError) as error:
                raise InvalidInput(
                    f"The index of {pattern!r} in posterior.parameters must fit the tensor {names[place]!r}, "
                    f"of shape {np.shape(leaves[place])}: {error}."
                ) from error
            selection[place] = index
    return tuple(selection)


def _remedy(glob: str, names: Sequence[str]) -> str:
    """For a pattern that names nothing: the nearest one that does, and the names there are."""
    modules = {name.rpartition("/")[0] for name in names} - {""}
    close = difflib.get_close_matches(glob, [*names, *modules, *(f"{module}/*" for module in modules)], n=1)
    return (f"Did you mean {close[0]!r}? " if close else "") + f"There are: {listed(names)}."


def index_of(text: str) -> tuple[int | slice, ...]:
    """The NumPy index of its text, like "0" or "2:4, 1"; "" is all."""
    parts = [part.strip() for part in text.split(",")] if text else []
    return tuple(slice(*(int(i) if i else None for i in part.split(":"))) if ":" in part else int(part) for part in parts)


def _shapes(params: Params, selection: Selection) -> list[tuple[int, ...]]:
    """Shapes of the selected parts, in order."""
    pairs = zip(jax.tree.leaves(params), selection, strict=True)
    return [np.empty(leaf.shape, bool)[index_of(index)].shape for leaf, index in pairs if index is not None]


def num_selected(params: Params, selection: Selection) -> int:
    """The number of parameters that move, d."""
    return sum(math.prod(shape) for shape in _shapes(params, selection))


def to_params(position: jax.Array, params_star: Params, scales: Sequence[jax.Array], selection: Selection) -> Params:
    """w = w* + scale * u on the selected parameters."""
    leaves, structure = jax.tree.flatten(params_star)
    shapes = _shapes(params_star, selection)
    # Not slices, whose gradients are additions to the whole vector.
    parts = jax.lax.split(position, [math.prod(shape) for shape in shapes])
    moving = [place for place, index in enumerate(selection) if index is not None]
    for place, part, shape in zip(moving, parts, shapes, strict=True):
        offset = scales[place] * part.reshape(shape)
        index = index_of(selection[place] or "")
        leaves[place] = leaves[place] + offset if not index else jnp.asarray(leaves[place]).at[index].add(offset)
    return jax.tree.unflatten(structure, leaves)
