"""Small singular targets at w* = 0 whose learning coefficient is known exactly: normal crossings and a tanh network."""

from __future__ import annotations

import functools
import math
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeInt, model_validator

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.targets import data
from lambda_hat.targets.target import (
    Dataset,
    DataSpec,
    Objective,
    Params,
    Save,
    Shapes,
    Target,
    TargetSpec,
    Unfinished,
    mean_loss_float64,
    num_params,
    shaped,
)
from lambda_hat.targets.theory import LearningCoefficient, normal_crossing_llc, tanh_llc


class NormalCrossingData(DataSpec):
    """Samples t_j ~ N(0, noise_scale^2 I), less their mean: what minibatch gradients have for noise."""

    noise_scale: float = Field(0.0, ge=0, description="spread of the samples' gradients; 0 = every sample has the mean loss")


class NormalCrossingSpec(TargetSpec):
    """Monomial loss at w* = 0, exact llc min 1/(2 a_i), and at finite nbeta by quadrature.

    l_j(w) = prod_i w_i^(2 a_i) + t_j . w with sum_j t_j = 0, so that L_n(w) = prod_i w_i^(2 a_i): the local form of every loss
    after a resolution of its singularities (Watanabe 2009). A perfect sampler returns `theory.finite_normal_crossing_llc`.
    """

    metric: ClassVar[Literal["euclidean", "relative"]] = "euclidean"

    family: Literal["normal_crossing"] = "normal_crossing"
    data: NormalCrossingData = NormalCrossingData(n_data=1000)
    exponents: tuple[NonNegativeInt, ...] = Field((1, 1), min_length=1, max_length=1000, description="a_i of every parameter")

    @model_validator(mode="after")
    def _is_no_constant(self) -> Self:
        if not any(self.exponents):
            raise ValueError(f"one exponent at least must be above 0, or the loss is constant; got {list(self.exponents)}")
        return self

    @property
    def sample_size(self) -> int:
        return len(self.exponents)

    def param_shapes(self) -> Shapes:
        return shaped({"w": (len(self.exponents),)}, self.precision)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        tilts = data.normal((self.seed, 0), (self.data.n_data, len(self.exponents)), self.data.noise_scale)
        dataset = Dataset({"tilt": (tilts - tilts.mean(axis=0)).astype(self.precision)}, {})
        params = {"w": np.zeros(len(self.exponents), self.precision)}
        return _target_at_zero(self, params, dataset, normal_crossing_llc(self.exponents))

    def objective(self) -> Objective:
        return _normal_crossing(self.exponents)


@functools.cache
def _normal_crossing(exponents: tuple[int, ...]) -> Objective:
    def loss(params: Params, dataset: Dataset) -> jax.Array:
        return math.prod(params["w"][i] ** (2 * a) for i, a in enumerate(exponents) if a > 0)  # type: ignore[return-value]

    def per_sample_loss(params: Params, dataset: Dataset) -> jax.Array:
        return loss(params, dataset) + dataset.samples["tilt"] @ params["w"]

    return Objective(per_sample_loss, loss)


class TanhData(DataSpec):
    """Inputs x ~ U(-input_bound, input_bound), labels 0."""

    n_data: int = Field(10_000, ge=2, description="number of training samples n")
    input_bound: float = Field(1.0, ge=1e-3, le=1e3, description="inputs are uniform between minus and plus this")


class TanhSpec(TargetSpec):
    """A 1-H-1 tanh network learning the zero function, at w* = 0, exact llc by Aoyagi and Watanabe.

    f(x) = sum_h b_h tanh(a_h x) with l(w; x) = 1/2 f(x)^2. A perfect sampler returns `theory.finite_tanh_llc`.
    """

    metric: ClassVar[Literal["euclidean", "relative"]] = "euclidean"

    family: Literal["tanh"] = "tanh"
    data: TanhData = TanhData()
    hidden: int = Field(2, ge=1, description="number of hidden units H")

    @model_validator(mode="after")
    def _data_suffice(self) -> Self:
        if self.data.n_data < 10 * self.hidden:
            raise ValueError(
                f"data.n_data must be at least ten times the hidden units, {10 * self.hidden}, or the data do not determine "
                f"the function and the exact llc does not hold; got {self.data.n_data}"
            )
        return self

    @property
    def sample_size(self) -> int:
        return 1

    def param_shapes(self) -> Shapes:
        return shaped(dict.fromkeys(("a", "b"), (self.hidden,)), self.precision)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        bound = self.data.input_bound
        x = np.random.default_rng((self.seed, 0)).uniform(-bound, bound, self.data.n_data).astype(self.precision)
        params = {name: np.zeros(self.hidden, self.precision) for name in ("a", "b")}
        return _target_at_zero(self, params, Dataset({"x": x}, {}), tanh_llc(self.hidden))

    def objective(self) -> Objective:
        return _TANH


def _tanh_per_sample(params: Params, dataset: Dataset) -> jax.Array:
    return 0.5 * jnp.square(jnp.tanh(dataset.samples["x"][:, None] * params["a"][None, :]) @ params["b"])


_TANH = Objective(_tanh_per_sample)


def _target_at_zero(spec: TargetSpec, params: Params, dataset: Dataset, exact: LearningCoefficient) -> Target:
    metrics = {
        "init_loss": mean_loss_float64(spec.objective(), params, dataset),
        "num_params": num_params(params), "num_data": dataset.num_data,
        "true_llc": str(exact.llc), "multiplicity": exact.multiplicity,
    }  # fmt: skip
    return Target(spec, params, dataset, metrics)
