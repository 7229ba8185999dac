"""What the readers of all formats of language models share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.decoder import DecoderSpec
from lambda_hat.targets.policies.tokenizer import TextTokenizer

#: Parts of a layer and of the whole, in our names and those of a format's tensors.
Names = Mapping[str, str]


class Source(NamedTuple):
    """What a format tells. names: see `Names`. shapes: of its tensors. tensor: name -> (out, in), queries and keys in the
    half-split order. max_positions: see `Opened`."""

    model: DecoderSpec
    names: Names
    shapes: Mapping[str, tuple[int, ...]]
    tensor: Callable[[str], np.ndarray]
    tokenizer: TextTokenizer
    max_positions: int | None


def package(name: str) -> Any:
    """The module of an optional package.

    Raises:
      InvalidInput: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidInput(
            f"Files of language models are read by the package {name.split('.')[0]}, which is not installed. "
            'Call pip install "lambda_hat[pretrained]".'
        ) from error


def require(rules: Mapping[str, tuple[Any, Any]], path: Path) -> None:
    """Refuses a model that computes something else than the decoder: of each of its properties, the value found and the one
    there may be."""
    for name, (found, allowed) in rules.items():
        if found != allowed:
            raise InvalidInput(
                f"A pretrained model must be of Llama's or Qwen2's plain architecture, with {name} = {allowed!r}; {path.name} "
                f"has {found!r}. Take another model."
            )
