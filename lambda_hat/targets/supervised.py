"""Regression targets: an MLP student trained on the noisy outputs of an MLP teacher."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.targets.data import RegressionData, draw_inputs, draw_noise
from lambda_hat.targets.networks import ModelSpec, input_shapes, mlp
from lambda_hat.targets.target import (
    OBSERVABLE_SIZE,
    Dataset,
    Objective,
    Params,
    Save,
    Shapes,
    Target,
    Unfinished,
    mean_loss_float64,
)
from lambda_hat.targets.training import TrainedSpec, TrainingSpec, Untrained, train_target

#: Fresh samples whose mean loss is the test loss.
TEST_SIZE = 1000


class TeacherData(RegressionData):
    """y = teacher(x) + noise, the teacher's outputs scaled to unit variance; without a teacher y is the noise alone."""

    teacher: ModelSpec | None = Field(ModelSpec(depth=1, width=4), description="the teacher network; none = labels are noise")


class MlpSpec(TrainedSpec):
    """Teacher-student regression by a multilayer perceptron.

    l(w; x, y) = 1/2 |f(x; w) - y|^2."""

    family: Literal["mlp"] = "mlp"
    model: ModelSpec = ModelSpec()
    data: TeacherData = TeacherData()
    training: TrainingSpec = TrainingSpec()

    @property
    def observable_names(self) -> tuple[str, ...]:
        return ("test",)

    @property
    def sample_size(self) -> int:
        return self.data.input_dim + self.data.output_dim

    def param_shapes(self) -> Shapes:
        return input_shapes(mlp(self.model, self.data.output_dim), self.data.input_dim, self.precision)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        teacher_key, student_key, training_key = jax.random.split(jax.random.key(self.seed), 3)
        with jax.enable_x64(self.precision == "float64"):
            x, x_test = (
                draw_inputs(self.data, self.seed, stream, size).astype(self.precision)
                for stream, size in enumerate((self.data.n_data, TEST_SIZE))
            )
            clean, clean_test = self._teach(teacher_key, x, x_test)
            noise, noise_test = (draw_noise(self.data, self.seed, stream, inputs) for stream, inputs in enumerate((x, x_test)))
            dataset = Dataset({"x": x, "y": (clean + noise).astype(self.precision)}, {})
            test = Dataset({"x": x_test, "y": (clean_test + noise_test).astype(self.precision)}, {})
            params = jax.jit(mlp(self.model, self.data.output_dim).init)(student_key, x[:1])
        objective = self.objective()
        return train_target(
            self,
            Untrained(
                params, dataset, training_key,
                observables={"test": test.take(np.arange(OBSERVABLE_SIZE))},
                measure=lambda params: {
                    "init_loss": mean_loss_float64(objective, params, dataset),
                    "test_loss": mean_loss_float64(objective, params, test),
                },
                # What the teacher itself would have.
                metrics={"noise_loss": 0.5 * float(np.mean(np.sum(np.square(noise), axis=1)))},
            ),
            progress, resume, save,
        )  # fmt: skip

    def _teach(self, key: jax.Array, x: np.ndarray, x_test: np.ndarray) -> list[np.ndarray]:
        """The teacher's outputs, divided by their standard deviation over the training inputs x; 0 without a teacher."""
        if self.data.teacher is None:
            return [np.zeros((len(inputs), self.data.output_dim)) for inputs in (x, x_test)]
        teacher = mlp(self.data.teacher, self.data.output_dim)
        params = jax.jit(teacher.init)(key, x[:1])
        outputs = [np.asarray(teacher.apply(params, inputs)) for inputs in (x, x_test)]
        return [output / np.maximum(outputs[0].std(), 1e-6) for output in outputs]

    def objective(self) -> Objective:
        return squared_error(self.model, self.data.output_dim)


@functools.cache
def squared_error(model: ModelSpec, output_dim: int) -> Objective:
    """1/2 |f(x) - y|^2, summed over the outputs: the negative log likelihood of unit-variance noise, less a constant."""
    network = mlp(model, output_dim)

    def per_sample_loss(params: Params, dataset: Dataset) -> jax.Array:
        residual = network.apply(params, dataset.samples["x"]) - dataset.samples["y"]
        return 0.5 * jnp.sum(jnp.square(residual), axis=1)

    return Objective(per_sample_loss)
