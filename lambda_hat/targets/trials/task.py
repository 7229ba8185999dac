"""Tasks of batch-size studies: images to classify, a polynomial or a network to imitate."""

from __future__ import annotations

import functools
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from lambda_hat.specs.spec import Precision, Spec
from lambda_hat.targets import data
from lambda_hat.targets.trials.network import Parameterization, forward, init_params, output_scale

NUM_CLASSES = 10

#: Images of each dataset that can be used for training and, where they are apart, for testing.
_IMAGES = {"digits": (1797, 0), "fashion-mnist": (60_000, 10_000), "mnist1m": (1_000_000, 0)}


class TaskData(NamedTuple):
    """x, (n, D), and y, (n, out), of training and test samples, host arrays that are shared and must not be changed.

    y is the label's one-hot vector for images, the value itself, out = 1, for synthetic tasks.
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class _Task(Spec):
    n_data: int = Field(1024, ge=2, description="number of training samples n")
    n_test: int = Field(512, ge=1, description="number of test samples")

    def load(self, precision: Precision) -> TaskData:
        """The data, in the precision asked for; those of the last few calls are kept."""
        return _load(self, precision)

    def draw(self) -> TaskData:
        """The data in float64, or float32 where they are images."""
        raise TypeError(f"{type(self).__name__} has no data")


class ImagesTask(_Task):
    """Images of ten classes: the first n_data to train; to test the next n_test, or the first where there is a test set.

    digits: scikit-learn's 1797 of 8x8 pixels, shuffled. fashion-mnist: 28x28 (arXiv 1708.07747). mnist1m: a million of 28x28,
    see `targets.data.process_mnist1m`. Pixels are scaled to [0, 1].
    """

    kind: Literal["images"] = "images"
    dataset: Literal["digits", "fashion-mnist", "mnist1m"] = Field("digits", description="the images")

    fresh: ClassVar[bool] = False
    output_dim: ClassVar[int] = NUM_CLASSES

    @property
    def input_dim(self) -> int:
        return 64 if self.dataset == "digits" else 784

    @model_validator(mode="after")
    def _fits(self) -> Self:
        most, most_test = _IMAGES[self.dataset]
        if most_test and (self.n_data > most or self.n_test > most_test):
            raise ValueError(
                f"n_data must be at most {most} and n_test at most {most_test} with dataset={self.dataset}; "
                f"got {self.n_data} and {self.n_test}: lower them"
            )
        if not most_test and self.n_data + self.n_test > most:
            raise ValueError(
                f"n_data and n_test must be at most {most} together with dataset={self.dataset}; "
                f"got {self.n_data} and {self.n_test}: lower one"
            )
        return self

    def draw(self) -> TaskData:
        n, end = self.n_data, self.n_data + self.n_test
        if self.dataset == "fashion-mnist":
            (x, y), (x_test, y_test) = (data.fashion_mnist(part) for part in ("train", "t10k"))
            x, y, x_test, y_test = x[:n], y[:n], x_test[: self.n_test], y_test[: self.n_test]
        else:
            x, y = data.digits(0) if self.dataset == "digits" else data.mnist1m(end)
            x, y, x_test, y_test = x[:n], y[:n], x[n:end], y[n:end]
        one_hot = np.eye(NUM_CLASSES, dtype=np.float32)
        return TaskData(x, one_hot[y], x_test, one_hot[y_test])


class SyntheticTask(_Task):
    """y = teacher(x) of x ~ N(0, I_D), without noise.

    fresh: every step of training draws new samples ("fixed time": the pool of samples is used once and then replaced), and
      the n_data samples are those on which a trained network is measured and sampled; otherwise ("fixed data") training goes
      through the n_data samples again and again.
    """

    input_dim: int = Field(16, ge=1, description="dimension D of the inputs")
    n_data: int = Field(1024, ge=2, description="number of samples P")
    fresh: bool = Field(False, description="whether every step draws new samples; otherwise epochs over n_data of them")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the data and the teacher, the same for all trials of a study")

    output_dim: ClassVar[int] = 1

    def teacher(self) -> Any:
        """Arrays of the teacher, float64."""
        raise TypeError(f"{type(self).__name__} has no teacher")

    def label(self, teacher: Any, x: jax.Array) -> jax.Array:
        """y, (B, 1), of inputs x, (B, D), in the dtype of both."""
        raise TypeError(f"{type(self).__name__} has no labels")

    def draw(self) -> TaskData:
        x, x_test = (data.normal((self.seed, part), (n, self.input_dim)) for part, n in enumerate((self.n_data, self.n_test)))
        with jax.enable_x64(True):
            y, y_test = (np.asarray(self.label(self.teacher(), jnp.asarray(inputs))) for inputs in (x, x_test))
        return TaskData(x, y, x_test, y_test)


class PolynomialTask(SyntheticTask):
    """y = (x . w)^K with a random w of length 1."""

    kind: Literal["polynomial"] = "polynomial"
    degree: int = Field(3, ge=1, le=20, description="degree K of the polynomial")

    def teacher(self) -> np.ndarray:
        w = data.normal((self.seed, 2), (self.input_dim, 1))
        return w / np.linalg.norm(w)

    def label(self, teacher: Any, x: jax.Array) -> jax.Array:
        return (x @ teacher) ** self.degree


class TeacherTask(SyntheticTask):
    """y = f(x) of a random network as in `targets.trials.network`, with a width, depth and richness of its own."""

    kind: Literal["teacher"] = "teacher"
    width: int = Field(16, ge=1, description="units N in each hidden layer of the teacher")
    depth: int = Field(2, ge=2, le=100, description="weight layers L of the teacher")
    richness: float = Field(1.0, gt=0, description="the teacher's gamma")
    parameterization: Parameterization = Field("sp", description="the teacher's")

    def teacher(self) -> Any:
        widths = (self.input_dim, *(self.width,) * (self.depth - 1), 1)
        params = init_params((self.seed, 2), widths, "float64")
        scale = output_scale(self.parameterization, self.width, self.richness)
        params[f"layer_{self.depth - 1}"]["w"] *= scale
        return params

    def label(self, teacher: Any, x: jax.Array) -> jax.Array:
        return forward(teacher, x)


AnyTask = Annotated[ImagesTask | PolynomialTask | TeacherTask, Field(discriminator="kind")]


@functools.lru_cache(maxsize=4)
def _load(task: _Task, precision: Precision) -> TaskData:
    return TaskData(*(np.ascontiguousarray(array, precision) for array in task.draw()))
