"""What one trial of a batch-size study is: a task, a network, an optimizer, and how long they are together."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.targets.target import Objective, Save, Shapes, Target, TargetSpec, Unfinished, shaped
from lambda_hat.targets.trials.loss import Loss, centred_loss
from lambda_hat.targets.trials.network import Parameterization, output_scale
from lambda_hat.targets.trials.task import AnyTask, ImagesTask

#: Steps are counted in 32 bits.
MAX_STEPS = 2**30

#: Fields that only one optimizer has.
_FIELDS_OF = {"momentum": "sgd", "beta1": "adam", "beta2": "adam"}


class TrialSpec(TargetSpec):
    """Training of a ReLU network without biases (`targets.trials.network`) on a task, with a constant learning rate.

    Its prediction is centred: f(theta; x) - f(theta_0; x), so that every training starts at 0. The loss of a sample is the mean
    over outputs of the squared residual (mse), or -log softmax(prediction)_y (cross_entropy), in nats.

    The learning rate of weights W_l is eta * g(richness) * w_l(N). For sgd, g = richness^2 up to 1 and richness^(2/L) above,
    w = N with mup and 1 with sp. For adam, g = richness up to 1 and richness^(1/L) above, w = 1/sqrt(N) of weights between
    hidden layers with mup, else 1. rate_rule "original" has w = sqrt(N) of all weights with adam and mup, which does not
    carry over from one width to another; "raw" leaves g out.
    """

    rivals: ClassVar = {"num_steps": ("num_epochs",), "num_epochs": ("num_steps",)}

    family: Literal["trial"] = "trial"
    task: AnyTask = ImagesTask()
    loss: Loss = Field("mse", description="mse, of one-hot labels where they are classes, or cross_entropy")
    parameterization: Parameterization = Field(
        "mup", description="scale of the output: sp = 1/(richness sqrt(N)), mup = 1/(richness N)"
    )
    depth: int = Field(2, ge=2, le=100, description="weight layers L")
    width: int = Field(64, ge=1, description="units N in each hidden layer")
    richness: float = Field(1.0, gt=0, description="gamma: small = lazy, large = rich")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="Optax optimizer; adam with an epsilon near 0")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd: gradients add up with this decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="of adam: decay of the mean of the gradients")
    beta2: float = Field(0.999, ge=0, lt=1, description="of adam: decay of the mean of their squares")
    eta: float = Field(1.0, gt=0, description="learning rate, before the factors of rate_rule")
    rate_rule: Literal["standard", "original", "raw"] = Field(
        "standard", description="how the learning rate depends on richness and width"
    )
    batch_size: int = Field(64, ge=1, description="samples B of a step")
    num_steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="optimizer steps")
    num_epochs: int | None = Field(None, ge=1, description="or: passes over the data, of n_data // batch_size steps each")
    points_per_doubling: int = Field(
        32, ge=1, le=1000, description="points of the loss curve while the steps double, evenly spaced; first one a step"
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        for name, optimizer in _FIELDS_OF.items():
            value = getattr(self, name)
            if self.optimizer != optimizer and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is a field of {optimizer}; got {value} with optimizer={self.optimizer}")
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError(
                "a trial's length is either num_steps or num_epochs; "
                f"got num_steps={self.num_steps} and num_epochs={self.num_epochs}: give one"
            )
        if self.num_epochs is not None and self.total_steps > MAX_STEPS:
            raise ValueError(
                f"a trial has at most {MAX_STEPS} steps; num_epochs={self.num_epochs} are {self.total_steps}: lower num_epochs"
            )
        if self.loss == "cross_entropy" and self.task.kind != "images":
            raise ValueError(f"loss=cross_entropy is of classes; got it with task.kind={self.task.kind}: set loss=mse")
        if self.batch_size > self.task.n_data and not (self.task.fresh and self.num_steps):
            raise ValueError(
                f"batch_size must be at most task.n_data, {self.task.n_data}; got {self.batch_size}: "
                "lower batch_size or raise task.n_data"
            )
        return self

    @property
    def num_data(self) -> int:
        return self.task.n_data

    @property
    def observable_names(self) -> tuple[str, ...]:
        return ("test",)

    @property
    def total_steps(self) -> int:
        """Optimizer steps, however the length is given."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_epochs is not None
        return self.num_epochs * (self.task.n_data // self.batch_size)

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of the input, the hidden layers and the output."""
        return (self.task.input_dim, *(self.width,) * (self.depth - 1), self.task.output_dim)

    @property
    def scale(self) -> float:
        """f over the raw output of the network."""
        return output_scale(self.parameterization, self.width, self.richness)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rate of each layer's weights, from the input on."""
        rate, sqrt_width = self.eta, math.sqrt(self.width)
        if self.rate_rule != "raw":
            power = 2 if self.optimizer == "sgd" else 1
            rate *= self.richness ** (power if self.richness <= 1 else power / self.depth)
        if self.parameterization == "sp":
            return (rate,) * self.depth
        if self.optimizer == "sgd":
            return (rate * self.width,) * self.depth
        if self.rate_rule == "original":
            return (rate * sqrt_width,) * self.depth
        return (rate, *(rate / sqrt_width,) * (self.depth - 2), rate)

    @property
    def course_id(self) -> str:
        """The same for trials that differ in nothing but their length: the id of the one that ends after a step."""
        return self.model_copy(update={"num_steps": 1, "num_epochs": None}).target_id

    def static(self) -> TrialSpec:
        """This spec with eta, richness and seed at fixed values: trials of equal ones are trained together."""
        return self.model_copy(update={"eta": 1.0, "richness": 1.0, "seed": 0, "checkpoint": None})

    def check_sources(self, built: bool) -> None:
        if not built and self.task.kind == "images":
            self.task.load(self.precision)

    @property
    def sample_size(self) -> int:
        return self.task.input_dim + self.task.output_dim

    def param_shapes(self) -> Shapes:
        layers = enumerate(itertools.pairwise(self.widths))
        return shaped({f"layer_{layer}": {"w": shape} for layer, shape in layers}, self.precision)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        """Trains this trial alone, by the engine that trains many; see `TargetSpec.build`.

        Raises:
          FloatingPointError: the training diverges, so there is no w*.
        """
        from lambda_hat.targets.trials.engine import train_trials
        from lambda_hat.targets.trials.result import to_target

        return to_target(train_trials([self], progress, resume, save)[0])

    def objective(self) -> Objective:
        return centred_loss(self.loss)
