"""What a policy is: a task, a decoder, and how it is trained, first by imitation and then by its rewards."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import jax
import numpy as np
from pydantic import Field, model_validator

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.specs.spec import InvalidInput, Spec
from lambda_hat.targets.policies.decoder import Decoder, DecoderSpec, decoder
from lambda_hat.targets.policies.lora import LoraSpec, adapter_shapes
from lambda_hat.targets.policies.objective import RlSpec
from lambda_hat.targets.policies.policy import Policy, answer_loss, frozen
from lambda_hat.targets.policies.pretrained import PretrainedSpec, open_pretrained
from lambda_hat.targets.policies.tasks import AnyTask, ModularTask, TokenizedTask
from lambda_hat.targets.policies.tokenizer import Tokenizer
from lambda_hat.targets.target import Objective, Params, Save, Shapes, Target, TargetSpec, Unfinished


class WarmStartSpec(Spec):
    """Supervised training on the right answers with Adam, until the policy samples enough of them."""

    learning_rate: float = Field(3e-3, gt=0, description="of Adam")
    batch_size: int = Field(128, ge=1, le=10**6, description="prompts of a step, drawn with replacement")
    target_accuracy: float = Field(
        0.45, gt=0, le=1, description="stop after the first step whose batch has a mean probability of the answer this high"
    )
    max_steps: int = Field(3000, ge=0, le=2**30, description="stop after this many steps at the latest")


AnyModel = Annotated[DecoderSpec | PretrainedSpec, Field(discriminator="kind")]


class PolicySpec(TargetSpec):
    """A policy trained on a verifiable task.

    As a target its data are all prompts with their right answers, the loss of one is -sum_t log pi(token_t) over the answer's
    tokens, end token included, in nats; w* is the policy after the last update, and its checkpoints are those of the updates.
    With `lora` w* and the checkpoints are the adapters alone, and the network below, frozen after the warm start, is in the
    dataset's constants.
    """

    family: Literal["policy"] = "policy"
    task: AnyTask = ModularTask()
    model: AnyModel = DecoderSpec()
    lora: LoraSpec | None = Field(
        None, description="adapters that the updates train alone; none = they train the whole network"
    )
    warm_start: WarmStartSpec = WarmStartSpec()
    rl: RlSpec = RlSpec()

    @model_validator(mode="after")
    def _pretrained_is_warm(self) -> Self:
        if isinstance(self.model, PretrainedSpec) and self.warm_start.max_steps:
            raise ValueError(
                "warm_start.max_steps must be 0 for a pretrained model, which begins as it is; "
                f"got {self.warm_start.max_steps}; set it to 0"
            )
        return self

    @property
    def num_data(self) -> int:
        return self.task.num_prompts

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        return self.rl.saved_steps

    def decoder(self) -> Decoder:
        """The network; the same object for equal networks and vocabularies.

        Raises:
          InvalidInput: see `open_pretrained`.
        """
        if isinstance(self.model, DecoderSpec):
            return decoder(self.model, Tokenizer(self.task.characters).vocab_size)
        files = open_pretrained(self.model)
        return decoder(files.model, files.vocab_size)

    def initial(self, dtype: Any) -> Params:
        """The network's parameters before all training, on the host.

        Raises:
          InvalidInput: see `open_pretrained`.
        """
        if isinstance(self.model, DecoderSpec):
            return self.decoder().init((self.seed, 0), dtype)
        return open_pretrained(self.model).load(dtype)

    def tokenized(self) -> TokenizedTask:
        """The task in the network's tokens: characters, or the pieces of a pretrained model.

        Raises:
          InvalidInput: see `open_pretrained`.
        """
        if isinstance(self.model, DecoderSpec):
            return TokenizedTask(self.task, Tokenizer(self.task.characters))
        files = open_pretrained(self.model)
        return TokenizedTask(self.task, files.tokenizer, files.max_positions)

    def check_sources(self, built: bool) -> None:
        self.tokenized().prompts()  # of a pretrained model from its files, which its loss needs too

    def param_shapes(self) -> Shapes:
        network = self.decoder().shapes()
        shapes = network if self.lora is None else adapter_shapes(self.lora, network)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.dtype(self.precision)), shapes)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        """Trains the policy; see `TargetSpec.build`.

        Raises:
          FloatingPointError: the training diverges.
          InvalidInput: see `open_pretrained`; or `lora.matrices` has a name of no matrix.
        """
        from lambda_hat.targets.policies.train import to_target, train_policy

        return to_target(train_policy(self, progress, resume, save))

    def objective(self) -> Objective:
        return answer_loss(self.decoder(), self.lora)


def policy_of(target: Target) -> Policy:
    """The policy of a target: after its last update, or of a target loaded at a checkpoint, there.

    Raises:
      InvalidInput: the target is no policy.
    """
    spec = target.spec
    if not isinstance(spec, PolicySpec):
        raise InvalidInput(
            f"A target of family policy is needed here; {target.target_id} is a {type(spec).__name__}. Name one."
        )
    return Policy(spec.decoder(), frozen(spec.lora, target.dataset.constants), spec.lora, target.params_star)
