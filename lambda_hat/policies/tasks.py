"""Verifiable tasks: prompts with one right answer each, so that a completion's reward is known without a judge."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from lambda_hat.policies.tokenizer import BOS, EOS, Tokenizer, padded
from lambda_hat.spec import InvalidInput, Spec


class Prompts(NamedTuple):
    """Prompts and their answers; the prompt's id is its index.

    texts: the prompts, such as "3+4=". tokens: (n, P), int32, BOS first, padded on the right. lengths: (n,), int32, tokens of
    each. answers: (n, L), int32, the right completion with EOS, padded on the right.
    """

    texts: list[str]
    tokens: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray


class _ArithmeticTask(Spec):
    """Prompts "a+b=" of numbers in decimal digits, the answer being a number and the end token."""

    def pairs(self) -> list[tuple[int, int]]:
        """The numbers (a, b) of each prompt, in the order of the prompts' ids."""
        raise TypeError(f"{type(self).__name__} has no pairs")

    def result(self, a: int, b: int) -> int:
        """The right answer."""
        raise TypeError(f"{type(self).__name__} has no result")

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer("0123456789+=")

    @property
    def max_length(self) -> int:
        """Tokens L of a completion at most: of the longest answer, with the end token."""
        return max(len(str(self.result(a, b))) for a, b in self.pairs()) + 1

    @property
    def num_prompts(self) -> int:
        return len(self.pairs())

    def prompts(self) -> Prompts:
        """All prompts of the task."""
        pairs = self.pairs()
        answers = [[*self.tokenizer.encode(str(self.result(a, b))), EOS] for a, b in pairs]
        return self._prompts([f"{a}+{b}=" for a, b in pairs], padded(answers, self.max_length))

    def custom_prompts(self, texts: Sequence[str], answers: Sequence[str]) -> Prompts:
        """Prompts of one's own, in the task's characters, and their answers, with at most as many tokens as the task's.

        Raises:
          InvalidInput: an answer is too long, or a character is not in the vocabulary.
        """
        rows = [[*self.tokenizer.encode(answer), EOS] for answer in answers]
        if any(len(row) > self.max_length for row in rows):
            raise InvalidInput(
                f"Answers must have at most {self.max_length - 1} characters with this task; got {max(answers, key=len)!r}. "
                "Shorten it."
            )
        return self._prompts(list(texts), padded(rows, self.max_length))

    def _prompts(self, texts: list[str], answers: np.ndarray) -> Prompts:
        rows = [[BOS, *self.tokenizer.encode(text)] for text in texts]
        lengths = np.array([len(row) for row in rows], np.int32)
        return Prompts(texts, padded(rows, max(lengths)), lengths, answers)


class ModularTask(_ArithmeticTask):
    """(a + b) mod p for all pairs of numbers below the modulus p: "8+7=" has the answer "4" with p = 11."""

    kind: Literal["modular_addition"] = "modular_addition"
    modulus: int = Field(11, ge=2, le=1000, description="p: the sum is taken modulo this")

    def pairs(self) -> list[tuple[int, int]]:
        return [(a, b) for a in range(self.modulus) for b in range(self.modulus)]

    def result(self, a: int, b: int) -> int:
        return (a + b) % self.modulus


class AdditionTask(_ArithmeticTask):
    """a + b for all pairs of numbers of two digits: "10+99=" has the answer "109"."""

    kind: Literal["addition"] = "addition"

    def pairs(self) -> list[tuple[int, int]]:
        return [(a, b) for a in range(10, 100) for b in range(10, 100)]

    def result(self, a: int, b: int) -> int:
        return a + b


AnyTask = Annotated[ModularTask | AdditionTask, Field(discriminator="kind")]


def rewards(completions_BL: jax.Array, answers_BL: jax.Array) -> jax.Array:
    """1 for each completion that is the answer up to its end token, else 0, (B,), float32; both padded with PAD after EOS."""
    return jnp.all(completions_BL == answers_BL, axis=1).astype(jnp.float32)


def enumerate_completions(vocab_size: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Every completion there is: all sequences of tokens that end at their first EOS or have max_length tokens.

    Returns:
      tokens (N, max_length), int32, PAD after EOS; mask (N, max_length), bool, True up to EOS. With m = V - 1 tokens that are
      not EOS, N = 1 + m + ... + m^(max_length - 2) + m^(max_length - 1) V. The probabilities of all N sum to one.
    """
    others = [token for token in range(vocab_size) if token != EOS]
    rows = [
        [*head, EOS] for length in range(max_length) for head in itertools.product(others, repeat=length)
    ] + [list(row) for row in itertools.product(others, repeat=max_length)]  # fmt: skip
    mask = np.arange(max_length)[None] < np.array([len(row) for row in rows])[:, None]
    return padded(rows, max_length), mask
