"""Verifiable tasks: prompts with one right answer each, so that a completion's reward is known without a judge."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from lambda_hat.specs.spec import InvalidInput, Spec
from lambda_hat.targets.policies.tokenizer import EOS, AnyTokenizer, TextTokenizer, padded


class Prompts(NamedTuple):
    """Prompts and their answers; the prompt's id is its index.

    texts: the prompts, such as "3+4=". tokens: (n, P), int32, the tokenizer's start first, padded on the right. lengths: (n,),
    int32, tokens of each. answers: (n, L), int32, the right completion with the end token, padded on the right.
    """

    texts: list[str]
    tokens: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray


class TaskSpec(Spec):
    """Fields of all tasks: texts. A `TokenizedTask` has them in tokens.

    end: the text that ends an answer, of one token; without, it is the tokenizer's end token.
    """

    end: ClassVar[str] = ""

    max_length: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="tokens of a completion at most, with its end token; none = of the longest answer",
    )

    def questions(self) -> list[tuple[str, str]]:
        """Every prompt and its answer, in the order of the prompts' ids."""
        raise TypeError(f"{type(self).__name__} has no questions")

    @property
    def characters(self) -> str:
        """Those of prompts and answers: the vocabulary of a decoder that is trained here."""
        return "0123456789+=" + self.end

    @property
    def num_prompts(self) -> int:
        return len(self.questions())


class ModularTask(TaskSpec):
    """(a + b) mod p for all pairs of numbers below the modulus p: "8+7=" has the answer "4" with p = 11."""

    kind: Literal["modular_addition"] = "modular_addition"
    modulus: int = Field(11, ge=2, le=1000, description="p: the sum is taken modulo this")

    def questions(self) -> list[tuple[str, str]]:
        return [(f"{a}+{b}=", str((a + b) % self.modulus)) for a in range(self.modulus) for b in range(self.modulus)]


class AdditionTask(TaskSpec):
    """a + b for all pairs of numbers of two digits: "10+99=" has the answer "109"."""

    kind: Literal["addition"] = "addition"

    def questions(self) -> list[tuple[str, str]]:
        return [(f"{a}+{b}=", str(a + b)) for a in range(10, 100) for b in range(10, 100)]


class FewShotAdditionTask(TaskSpec):
    r"""a + b for all pairs of numbers below the limit, after examples: "3+4=7\n2+5=7\n8+1=" has the answer "9".

    A line break ends the answer, as a language model that was not taught this task continues the examples.
    """

    end: ClassVar[str] = "\n"

    kind: Literal["few_shot_addition"] = "few_shot_addition"
    limit: int = Field(10, ge=2, le=1000, description="numbers are below this")
    examples: tuple[tuple[int, int], ...] = Field(
        ((3, 4), (2, 5), (9, 6), (7, 0)), description="pairs whose sums stand before every question"
    )

    @model_validator(mode="after")
    def _examples_are_digits(self) -> Self:
        if any(number < 0 for pair in self.examples for number in pair):
            raise ValueError(f"examples must be pairs of numbers of at least 0; got {self.examples}; leave the others out")
        return self

    def questions(self) -> list[tuple[str, str]]:
        before = "".join(f"{a}+{b}={a + b}\n" for a, b in self.examples)
        return [(f"{before}{a}+{b}=", str(a + b)) for a in range(self.limit) for b in range(self.limit)]


AnyTask = Annotated[ModularTask | AdditionTask | FewShotAdditionTask, Field(discriminator="kind")]


class TokenizedTask(NamedTuple):
    """A task in the tokens of a policy: see `targets.policies.spec.PolicySpec.tokenized`.

    max_positions: tokens that the policy takes at most, a prompt with its completion; None = any number.
    """

    task: TaskSpec
    tokenizer: AnyTokenizer
    max_positions: int | None = None

    @property
    def end_token(self) -> int:
        """The token that ends an answer.

        Raises:
          InvalidInput: the task's end is not one token of this tokenizer.
        """
        if not self.task.end:
            return self.tokenizer.end
        token = self.tokenizer.encode("1" + self.task.end)[-1]
        if self.tokenizer.decode([token]) != self.task.end:
            raise InvalidInput(
                f"The text that ends an answer must be a token of its own; {self.task.end!r} is not one of this tokenizer's. "
                "Take another task."
            )
        return token

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a completion: `end_token`, and those with which a language model ends its texts."""
        if self.task.end and not isinstance(self.tokenizer, TextTokenizer):
            return (self.end_token,)  # a decoder that is trained here does not meet another
        return tuple(dict.fromkeys((self.end_token, *self.tokenizer.ends)))

    @property
    def max_length(self) -> int:
        """Tokens L of a completion at most: the task's, or those of the longest answer, with the end token."""
        return self.prompts().answers.shape[1]

    def prompts(self) -> Prompts:
        """All prompts of the task.

        Raises:
          InvalidInput: an answer is longer than the task's max_length, or a prompt with a completion than the policy's
            positions.
        """
        return self._prompts(self.task.questions(), self.task.max_length)

    def custom_prompts(self, texts: Sequence[str], answers: Sequence[str]) -> Prompts:
        """Prompts of one's own and their answers, with at most as many tokens as the task's.

        Raises:
          InvalidInput: an answer is too long, a character is not in the vocabulary, or see `prompts`.
        """
        return self._prompts(list(zip(texts, answers, strict=True)), self.max_length)

    def text(self, completion_L: Iterable[int]) -> str:
        """Text of a completion up to its end token, which is left out, as is what pads it."""
        ids, ends = [int(i) for i in completion_L], self.end_tokens
        return self.tokenizer.decode(itertools.takewhile(lambda token: token not in ends, ids))

    def _prompts(self, questions: Sequence[tuple[str, str]], max_length: int | None) -> Prompts:
        encode, end, ends = self.tokenizer.encode, self.end_token, self.end_tokens
        rows, answers = [], []
        for prompt, answer in questions:
            # Together, since some tokenizers begin a text on its own with other tokens than one in a text.
            row, whole = encode(prompt), encode(prompt + answer)
            if whole[: len(row)] != row or not set(ends).isdisjoint(whole[len(row) :]):
                raise InvalidInput(
                    f"The tokens of a prompt with its answer must be the prompt's, then the answer's without an end token; "
                    f"those of {prompt!r} and {answer!r} are not. Let prompts end where words do."
                )
            rows.append([*self.tokenizer.start, *row])
            answers.append([*whole[len(row) :], end])
        lengths = np.array([len(row) for row in rows], np.int32)
        longest, width = int(np.argmax([len(answer) for answer in answers])), max_length or max(map(len, answers))
        if len(answers[longest]) > width:
            raise InvalidInput(
                f"Answers must have at most {width} tokens with this task, the end token included; got "
                f"{len(answers[longest])} in {questions[longest][1]!r}. Shorten it, or raise task.max_length."
            )
        if self.max_positions is not None and max(lengths) + width > self.max_positions:
            raise InvalidInput(
                f"A prompt and its completion must have at most {self.max_positions} tokens, the positions that the model was "
                f"trained on; got {max(lengths)} of the prompt {questions[int(np.argmax(lengths))][0]!r} and up to {width}. "
                "Shorten it, or lower task.max_length."
            )
        return Prompts([prompt for prompt, _ in questions], padded(rows, max(lengths)), lengths, padded(answers, width))


def rewards(completions_BL: jax.Array, answers_BL: jax.Array, end_tokens: Any = (EOS,)) -> jax.Array:
    """1 for each completion that is the answer up to its end token, whichever of them it is, else 0, (B,), float32; both are
    padded with PAD after it."""
    ends = jnp.asarray(end_tokens, jnp.int32)

    def ended(tokens_BL: jax.Array) -> jax.Array:
        return jnp.where(jnp.isin(tokens_BL, ends), ends[0], tokens_BL)

    return jnp.all(ended(completions_BL) == ended(answers_BL), axis=1).astype(jnp.float32)
