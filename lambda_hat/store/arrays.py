"""Named arrays as bytes, without pickle."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from lambda_hat.specs.spec import InvalidInput

#: Between the keys of a nested dict's path; Haiku's own names hold "/" and "~".
SEPARATOR = "::"


def pack_arrays(arrays: Mapping[str, Any]) -> bytes:
    """Arrays as one .npz without pickle; equal arrays give equal bytes.

    Raises:
      InvalidInput: an array's dtype is none .npy can hold faithfully (objects, structures, bfloat16).
    """
    buffer = io.BytesIO()
    # Not np.savez, which takes names like "file" for its own arguments.
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in arrays.items():
            array = np.asarray(value)
            if array.dtype.kind in "OV":
                raise InvalidInput(
                    f"Arrays must hold plain numbers, booleans or text; {name!r} has dtype {array.dtype}: convert it first."
                )
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return buffer.getvalue()


def unpack_arrays(data: bytes) -> dict[str, np.ndarray]:
    """What `pack_arrays` was given, as numpy arrays.

    Raises:
      ValueError: an array inside is pickled. It is not loaded.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return dict(archive)


def flatten(params: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """A nested dict of arrays as one dict, its keys joined."""
    if not isinstance(params, dict):
        return {prefix: np.asarray(params)}
    flat: dict[str, np.ndarray] = {}
    for key, value in params.items():
        flat |= flatten(value, f"{prefix}{SEPARATOR}{key}" if prefix else key)
    return flat


def unflatten(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, name = path.split(SEPARATOR)
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = array
    return params
