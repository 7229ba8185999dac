"""What a measurement of an update is: a policy at a checkpoint, the sequences of the update, and those that measure it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lambda_hat.entropy.estimators import Integrand
from lambda_hat.entropy.exact import check_enumerable
from lambda_hat.specs.spec import Spec, content_id
from lambda_hat.targets.policies.decoder import DecoderSpec
from lambda_hat.targets.policies.spec import PolicySpec

#: More sequences in an update, or in an evaluation batch, are a typing error.
MAX_SEQUENCES = 1_000_000


class PromptsSpec(Spec):
    """Where prompts come from: the task's, drawn with replacement, unless some are named or written out."""

    num_prompts: int = Field(8, ge=1, description="prompts, drawn with replacement")
    prompt_ids: tuple[int, ...] = Field((), description="these of the task's prompts instead, by number")
    prompts: tuple[str, ...] = Field((), description="these texts instead")
    answers: tuple[str, ...] = Field((), description="the right answers to `prompts`")

    @model_validator(mode="after")
    def _prompts_are_one_thing(self) -> Self:
        if self.prompt_ids and self.prompts:
            raise ValueError("prompts must be named by prompt_ids or written out in prompts; got both: leave one out")
        if len(self.prompts) != len(self.answers):
            raise ValueError(
                f"prompts must have an answer each; got {len(self.prompts)} prompts and {len(self.answers)} answers"
            )
        if any(number < 0 for number in self.prompt_ids):
            raise ValueError(f"prompt_ids must be numbers from 0 on; got {min(self.prompt_ids)}")
        return self

    @property
    def count(self) -> int:
        """How many prompts there are."""
        return len(self.prompt_ids) or len(self.prompts) or self.num_prompts


class SequenceSpec(Spec):
    """A sequence written out."""

    prompt: str = Field(description="text of the prompt")
    completion: str = Field(description="text of the completion; its end token is added")
    reward: float = Field(description="reward")


class UpdateSpec(PromptsSpec):
    """The update batch U: completions of some prompts and their group-relative advantages."""

    num_completions: int = Field(8, ge=2, description="completions G of each prompt")
    tolerance: float = Field(1e-6, ge=0, description="a group whose advantages are all at most this teaches nothing: redrawn")
    max_resample_attempts: int = Field(20, ge=0, description="times such groups are redrawn; what is left is reported")
    sequences: tuple[SequenceSpec, ...] = Field(
        (), description="the whole batch written out instead, num_completions for each prompt, one prompt after the other"
    )

    @model_validator(mode="after")
    def _sequences_are_groups(self) -> Self:
        texts = [sequence.prompt for sequence in self.sequences]
        groups = [texts[start : start + self.num_completions] for start in range(0, len(texts), self.num_completions)]
        if any(len(group) != self.num_completions or len(set(group)) != 1 for group in groups):
            raise ValueError(
                f"sequences must be num_completions={self.num_completions} for each prompt, one prompt after the other; "
                f"got {len(texts)} for {len(set(texts))} prompts"
            )
        return self

    @property
    def num_sequences(self) -> int:
        """N_U."""
        return len(self.sequences) or self.count * self.num_completions


class EvaluationSpec(PromptsSpec):
    """Evaluation batches E: one completion of each prompt, drawn from the policy at temperature 1."""

    num_prompts: int = Field(256, ge=2, description="prompts N_E of a batch, drawn with replacement")
    num_batches: int = Field(1, ge=1, le=99, description="independent batches")

    @property
    def num_sequences(self) -> int:
        """N_E, of a batch."""
        return self.count


class EntropySpec(Spec):
    """One update of a policy at a checkpoint, with the state its optimizer has there, taken apart and measured."""

    target: PolicySpec
    update: UpdateSpec = UpdateSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    etas: tuple[float, ...] = Field(
        (3e-5, 1e-4, 3e-4, 1e-3), min_length=1, description="learning rates at which the change is measured"
    )
    integrand: Integrand = Field(
        "entropy", description="what is averaged over sequences: entropy, surprisal, entropy_per_token"
    )
    clip: float | None = Field(None, gt=0, description="log-weights are cut to +- this; none = not")
    exact: bool = Field(False, description="also by enumeration of every completion, of short answers and few tokens")
    forward: Literal["full", "bfloat16"] = Field(
        "full",
        description="numbers of gradients and derivatives; log-probabilities, entropies and their changes at an eta, which "
        "bfloat16 would round away, stay in the policy's own precision",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of prompts and completions")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.target.checkpoint is None:
            saved = self.target.checkpoint_steps
            raise ValueError(f"target.checkpoint must be an update after which the policy was kept, of {saved}; got none")
        if any(not eta > 0 for eta in self.etas) or len(set(self.etas)) != len(self.etas):
            raise ValueError(f"etas must be different numbers above 0; got {self.etas}")
        for name, batch in (("update", self.update), ("evaluation", self.evaluation)):
            if batch.num_sequences > MAX_SEQUENCES:
                raise ValueError(f"{name} must have at most {MAX_SEQUENCES} sequences; got {batch.num_sequences}")
            wrong = [number for number in batch.prompt_ids if number >= self.target.num_data]
            if wrong:
                raise ValueError(
                    f"{name}.prompt_ids must be below the task's number of prompts, {self.target.num_data}; got {wrong[0]}"
                )
        if self.exact:
            if not isinstance(self.target.model, DecoderSpec):
                raise ValueError("exact must be false for a language model: it has too many completions to enumerate; got true")
            task, prompts = self.target.tokenized(), self.evaluation.prompt_ids or self.evaluation.prompts
            check_enumerable(len(prompts) or self.target.num_data, task.tokenizer.vocab_size, task.max_length)
        if self.evaluation.num_sequences < 2:
            raise ValueError("evaluation must have at least 2 prompts, or there is no standard error; got 1")
        return self

    @property
    def entropy_id(self) -> str:
        return content_id("ent", self.model_dump(mode="json"))
