"""Language models of Llama's and Qwen2's architecture from files: Hugging Face folders of safetensors, and GGUF.

Nothing is downloaded. The packages that read the files are those of `pip install "lambda_hat[pretrained]"`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from lambda_hat.specs.spec import InvalidInput, Spec
from lambda_hat.targets.policies.decoder import DecoderSpec, decoder
from lambda_hat.targets.policies.gguf_file import gguf_source
from lambda_hat.targets.policies.hugging_face import hugging_face_source
from lambda_hat.targets.policies.model_files import Source
from lambda_hat.targets.policies.tokenizer import TextTokenizer
from lambda_hat.targets.target import Params


class PretrainedSpec(Spec):
    """A language model whose weights, architecture and tokenizer are read from files, wherever they are used."""

    kind: Literal["pretrained"] = "pretrained"
    path: str = Field(
        min_length=1,
        description="folder of config.json, *.safetensors and tokenizer.json; or a .gguf file; or a Python package with one",
    )
    sha256: str = Field(
        pattern="^[0-9a-f]{64}$",
        description="what `sha256sum` prints for the .gguf file, or in the folder for the output of `sha256sum config.json "
        "generation_config.json *.safetensors tokenizer.json` of the files there are, in this order",
    )


class Opened(NamedTuple):
    """A language model's files.

    max_positions: tokens of a sequence at most, None where the files do not tell. load: dtype -> parameters of
    `targets.policies.decoder.decoder(model, vocab_size)`, read anew at every call.
    """

    model: DecoderSpec
    vocab_size: int
    tokenizer: TextTokenizer
    max_positions: int | None
    load: Callable[[Any], Params]


@functools.cache
def open_pretrained(spec: PretrainedSpec) -> Opened:
    """The files of a spec, checked, every number of them; once a process.

    Raises:
      InvalidInput: they are not there, cannot be read, are not whole or not those of `spec.sha256`, or hold what
        `targets.policies.decoder` does not compute.
    """
    try:
        return _open(spec)
    except InvalidInput:
        raise
    except Exception as error:  # each of the packages that read the files has its own
        raise InvalidInput(
            f"The files of a pretrained model must be whole and readable; those of {spec.path!r} are not: "
            f"{type(error).__name__}: {error}. Get them again."
        ) from error


def _open(spec: PretrainedSpec) -> Opened:
    path = find(spec.path)
    found = fingerprint(path)
    if found != spec.sha256:
        raise InvalidInput(
            f"The weights must be those that the spec names: model.sha256={spec.sha256}; the files of {spec.path!r} have "
            f"{found}. Set model.sha256 to this if these are the weights you mean."
        )
    if path.is_file():
        source = gguf_source(path)
    else:
        source = hugging_face_source(path)
    tensors = list(_tensors(source))
    unknown = sorted(set(source.shapes) - {name for _, _, name in tensors})
    if missing := sorted({name for _, _, name in tensors} - set(source.shapes)):
        raise InvalidInput(
            f"A model must have all tensors of its architecture; {spec.path!r} lacks {missing[0]!r}. Get it whole."
        )
    if unknown:
        raise InvalidInput(
            f"A model's tensors must be those of Llama or Qwen2; {spec.path!r} has {unknown[0]!r} besides. Take another model."
        )

    vocab_size = source.tokenizer.vocab_size
    if outside := [token for token in (*source.tokenizer.start, *source.tokenizer.ends) if not 0 <= token < vocab_size]:
        raise InvalidInput(
            f"Tokens that begin or end sequences must be from 0 to {vocab_size - 1}, of the model's vocabulary; "
            f"{spec.path!r} names {outside[0]}. Correct it, or take the model's own files."
        )
    shapes = decoder(source.model, vocab_size).shapes()
    for module, leaf, name in tensors:
        array, shape = source.tensor(name), shapes[module][leaf].shape
        expected = shape[::-1] if leaf == "w" else shape
        if array.shape != expected:
            raise InvalidInput(
                f"The tensors of a model must have the shapes that its configuration gives; {name!r} of {spec.path!r} is "
                f"{array.shape}, not {expected}. Get it whole."
            )
        if not np.isfinite(array).all():
            raise InvalidInput(
                f"A model's weights must be finite; {name!r} of {spec.path!r} has NaN or infinity. Get it again."
            )

    def load(dtype: Any) -> Params:
        params: dict[str, dict[str, np.ndarray]] = {}
        for module, leaf, name in tensors:
            array = source.tensor(name).astype(dtype)
            params.setdefault(module, {})[leaf] = np.ascontiguousarray(array.T) if leaf == "w" else array
        return params

    return Opened(source.model, source.tokenizer.vocab_size, source.tokenizer, source.max_positions, load)


def _tensors(source: Source) -> Iterator[tuple[str, str, str]]:
    """(module, leaf, tensor) of every array of the decoder's."""
    model, names = source.model, source.names
    yield "embedding", "embeddings", f"{names['embedding']}.weight"
    for layer in range(model.num_layers):
        for part in ("attention_norm", "mlp_norm"):
            yield f"layer_{layer}/{part}", "scale", f"{names[part].format(layer)}.weight"
        for part in ("query", "key", "value", "output", "gate", "up", "down"):
            yield f"layer_{layer}/{part}", "w", f"{names[part].format(layer)}.weight"
            if model.attention_bias and part in ("query", "key", "value"):
                yield f"layer_{layer}/{part}", "b", f"{names[part].format(layer)}.bias"
    yield "norm", "scale", f"{names['norm']}.weight"
    if not model.tied_embeddings:
        yield "unembedding", "w", f"{names['unembedding']}.weight"


def find(path: str) -> Path:
    """The folder or the .gguf file that a spec's path names.

    Raises:
      InvalidInput: there is none, or a package has several.
    """
    if (here := Path(path).expanduser()).is_dir() or (here.is_file() and here.suffix == ".gguf"):
        return here
    try:
        files = importlib.metadata.distribution(path).files or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        files = []
    packed = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(packed) != 1:
        raise InvalidInput(
            "model.path must name a folder, a .gguf file, or an installed package with one .gguf file; got "
            f"{path!r}, {f'a package with {len(packed)} of them' if files else 'which is none of these'}. Correct it."
        )
    return packed[0]


def fingerprint(path: Path) -> str:
    """The SHA-256 that stands for the files: see `PretrainedSpec.sha256`."""
    if path.is_file():
        return _sha256(path)
    files = [
        path / "config.json",
        path / "generation_config.json",
        *sorted(path.glob("*.safetensors")),
        path / "tokenizer.json",
    ]
    lines = [f"{_sha256(file)}  {file.name}\n" for file in files if file.exists()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
