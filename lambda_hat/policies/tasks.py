"""Verifiable tasks: prompts with one right answer each, so that a completion's reward is known without a judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from lambda_hat.policies.tokenizer import AnyTokenizer, padded
from lambda_hat.spec import InvalidInput, Spec


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
    """A task in the tokens of a policy: see `lambda_hat.policies.spec.PolicySpec.tokenized`."""

    task: TaskSpec
    tokenizer: AnyTokenizer

    @property
    def end_token(self) -> int:
        """The token that ends a completion.

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
    def max_length(self) -> int:
        """Tokens L of a completion at most: of the longest answer, with the end token."""
        return self.prompts().answers.shape[1]

    def prompts(self) -> Prompts:
        """All prompts of the task."""
        return self._prompts(self.task.questions())

    def custom_prompts(self, texts: Sequence[str], answers: Sequence[str]) -> Prompts:
        """Prompts of one's own and their answers, with at most as many tokens as the task's.

        Raises:
          InvalidInput: an answer is too long, or a character is not in the vocabulary.
        """
        prompts, width = self._prompts(list(zip(texts, answers, strict=True))), self.max_length
        if prompts.answers.shape[1] > width:
            raise InvalidInput(
                f"Answers must have at most {width} tokens with this task, the end token included; got "
                f"{max(answers, key=len)!r}. Shorten it."
            )
        return prompts._replace(answers=np.pad(prompts.answers, ((0, 0), (0, width - prompts.answers.shape[1]))))

    def text(self, completion_L: Iterable[int]) -> str:
        """Text of a completion up to its end token, which is left out, as is what pads it."""
        ids, end = [int(i) for i in completion_L], self.end_token
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)

    def _prompts(self, questions: Sequence[tuple[str, str]]) -> Prompts:
        encode, end = self.tokenizer.encode, self.end_token
        rows, answers = [], []
        for prompt, answer in questions:
            # Together, since some tokenizers begin a text on its own with other tokens than one in a text.
            row, whole = encode(prompt), encode(prompt + answer)
            if whole[: len(row)] != row or end in whole[len(row) :]:
                raise InvalidInput(
                    f"The tokens of a prompt with its answer must be the prompt's, then the answer's without the end token; "
                    f"those of {prompt!r} and {answer!r} are not. Let prompts end where words do."
                )
            rows.append([*self.tokenizer.start, *row])
            answers.append([*whole[len(row) :], end])
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = padded(rows, max(lengths))
        return Prompts([prompt for prompt, _ in questions], tokens, lengths, padded(answers, max(map(len, answers))))


def rewards(completions_BL: jax.Array, answers_BL: jax.Array) -> jax.Array:
    """1 for each completion that is the answer up to its end token, else 0, (B,), float32; both padded with PAD after it."""
    return jnp.all(completions_BL == answers_BL, axis=1).astype(jnp.float32)
