"""Text as tokens: single characters, or the pieces of a real language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from lambda_hat.specs.spec import InvalidInput

#: Ids of padding, of the beginning of a sequence and of its end; characters follow.
PAD, BOS, EOS = 0, 1, 2
_FIRST = 3


class Tokenizer(NamedTuple):
    """characters: of the vocabulary, each once, in the order of their ids."""

    characters: str

    @property
    def start(self) -> tuple[int, ...]:
        """Tokens that every sequence begins with."""
        return (BOS,)

    @property
    def end(self) -> int:
        """The token that ends a sequence."""
        return EOS

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a sequence, `end` first."""
        return (EOS,)

    @property
    def vocab_size(self) -> int:
        """V: the characters and PAD, BOS, EOS."""
        return len(self.characters) + _FIRST

    def encode(self, text: str) -> list[int]:
        """Ids of the characters, without BOS or EOS.

        Raises:
          InvalidInput: one is not in the vocabulary.
        """
        if unknown := sorted(set(text) - set(self.characters)):
            raise InvalidInput(
                f"Text must consist of the tokenizer's characters, {self.characters!r}; got {text!r} with {unknown}. "
                "Leave them out."
            )
        return [self.characters.index(character) + _FIRST for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; PAD, BOS and EOS have none."""
        return "".join(self.characters[int(i) - _FIRST] for i in ids if i >= _FIRST)


class TextTokenizer(NamedTuple):
    """A tokenizer of the `tokenizers` package, with the same methods.

    vocab_size: tokens that the model has, which may be more than have text. start, ends: see `Tokenizer`.
    """

    model: Any
    vocab_size: int
    start: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def end(self) -> int:
        """The first of `ends`."""
        return self.ends[0]

    def encode(self, text: str) -> list[int]:
        """Ids of the text's pieces, without those that begin or end sequences.

        Raises:
          InvalidInput: one is beyond the model's vocabulary.
        """
        ids = self.model.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.vocab_size:
            raise InvalidInput(
                f"A tokenizer's tokens must be below the {self.vocab_size} of its model; {text!r} has {max(ids)}. Take the "
                "tokenizer of this model."
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; those that begin or end sequences have none."""
        return self.model.decode([int(i) for i in ids])


AnyTokenizer = Tokenizer | TextTokenizer


def padded(rows: list[list[int]], width: int) -> np.ndarray:
    """The rows filled with PAD on the right, (len(rows), width), int32."""
    return np.array([row + [PAD] * (width - len(row)) for row in rows], np.int32)
