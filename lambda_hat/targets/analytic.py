"""Targets whose learning coefficient is known exactly: a quadratic, deep linear networks and reduced-rank regression."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from lambda_hat.compute.chunks import Progress, no_progress
from lambda_hat.specs.spec import Precision
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
from lambda_hat.targets.theory import deep_linear_llc


class QuadraticData(DataSpec):
    """Samples e_j ~ N(0, noise_scale^2 I) around which each sample's loss is a parabola."""

    noise_scale: float = Field(1.0, ge=0, description="spread of the samples, hence of minibatch gradients; 0 = none")


class QuadraticSpec(TargetSpec):
    """Quadratic loss with minibatch noise, exact llc d/2.

    The mean of per-sample parabolas l_j(w) = 1/2 sum_i h_i (w_i - e_ji)^2, so that
    L_n(w) - L_n(w*) = 1/2 sum_i h_i (w_i - w*_i)^2. w* is the samples' mean; the curvatures h are spaced evenly in log from
    1/condition_number to 1.
    """

    metric: ClassVar[Literal["euclidean", "relative"]] = "euclidean"

    family: Literal["quadratic"] = "quadratic"
    data: QuadraticData = QuadraticData(n_data=1000)
    dim: int = Field(10, ge=2, description="number of parameters d")
    condition_number: float = Field(10.0, ge=1, description="largest over smallest curvature")

    def curvatures(self) -> np.ndarray:
        """h, shape (d,), descending."""
        return np.geomspace(1.0, 1.0 / self.condition_number, self.dim)

    @property
    def sample_size(self) -> int:
        return self.dim

    def param_shapes(self) -> Shapes:
        return shaped({"w": (self.dim,)}, self.precision)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        samples = data.normal((self.seed, 0), (self.data.n_data, self.dim), self.data.noise_scale).astype(self.precision)
        mean = np.mean(samples, axis=0, dtype=np.float64).astype(self.precision)
        curvatures = self.curvatures().astype(self.precision)
        dataset = Dataset({"e": samples}, {"h": curvatures, "mean": mean})
        params = {"w": mean}
        metrics = {
            "init_loss": mean_loss_float64(self.objective(), params, dataset),
            "num_params": self.dim, "num_data": self.data.n_data, "true_llc": f"{self.dim}/2",
        }  # fmt: skip
        return Target(self, params, dataset, metrics)

    def objective(self) -> Objective:
        return _QUADRATIC


def _quadratic_per_sample(params: Params, dataset: Dataset) -> jax.Array:
    return 0.5 * jnp.square(params["w"][None, :] - dataset.samples["e"]) @ dataset.constants["h"]


def _quadratic_mean(params: Params, dataset: Dataset) -> jax.Array:
    return 0.5 * jnp.sum(dataset.constants["h"] * jnp.square(params["w"] - dataset.constants["mean"]))


_QUADRATIC = Objective(_quadratic_per_sample, _quadratic_mean)


class DeepLinearData(DataSpec):
    """Inputs x ~ U(-input_bound, input_bound) and noise-free labels y = W0 x, as in arXiv 2308.12108."""

    input_bound: float = Field(10.0, ge=1e-3, le=1e3, description="inputs are uniform between minus and plus this")


class DeepLinearSpec(TargetSpec):
    """Deep linear network at an exact zero of its loss, exact llc by Aoyagi (2024).

    f(x) = W_L ... W_1 x with l(w; x) = 1/2 |f(x) - W0 x|^2. Every layer of w* has rank exactly `rank` (w* = 0 for rank 0),
    the condition under which Aoyagi's lambda is the local value: layer s is V_{s+1} D_s V_s^T, with V_s an orthonormal
    basis of `rank` directions of layer s's space and D_s diagonal in [0.5, 1.5].
    """

    metric: ClassVar[Literal["euclidean", "relative"]] = "euclidean"

    family: Literal["dln"] = "dln"
    data: DeepLinearData = DeepLinearData(n_data=1_000_000)
    widths: tuple[int, ...] = Field((5, 3, 5), min_length=2, description="layer widths from input to output")
    rank: int = Field(0, ge=0, description="rank r of every layer and of the product")

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        _check_deep_linear(self.widths, self.rank, self.data.n_data)
        return self

    @property
    def sample_size(self) -> int:
        return self.widths[0]

    def param_shapes(self) -> Shapes:
        return _layer_shapes(self.widths, self.precision)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        rng = np.random.default_rng(self.seed)
        bases = [np.linalg.qr(rng.standard_normal((width, max(self.rank, 1))))[0][:, : self.rank] for width in self.widths]
        layers = [outer @ np.diag(rng.uniform(0.5, 1.5, self.rank)) @ inner.T for inner, outer in itertools.pairwise(bases)]
        params = {f"layer_{s}": layer.astype(self.precision) for s, layer in enumerate(layers)}
        shape = (self.data.n_data, self.widths[0])
        x = rng.uniform(-self.data.input_bound, self.data.input_bound, shape).astype(self.precision)
        # L_n depends on the inputs only through their second moment, so the full-data loss costs nothing in n.
        second_moment = np.asarray(x.T, np.float64) @ x / len(x)
        constants = {
            # Of the layers as rounded, so that the loss at w* is zero but for the rounding of the product.
            "teacher": functools.reduce(
                lambda product, layer: layer @ product, [layer.astype(np.float64) for layer in params.values()]
            ).astype(self.precision),
            "cholesky": np.linalg.cholesky(second_moment).astype(self.precision),
        }
        dataset = Dataset({"x": x}, constants)
        exact = deep_linear_llc(self.widths, self.rank)
        metrics = {
            "init_loss": mean_loss_float64(self.objective(), params, dataset),
            "num_params": num_params(params), "num_data": self.data.n_data,
            "true_llc": str(exact.llc), "multiplicity": exact.multiplicity,
        }  # fmt: skip
        return Target(self, params, dataset, metrics)

    def objective(self) -> Objective:
        return _DEEP_LINEAR


def _layer_shapes(widths: tuple[int, ...], precision: Precision) -> Shapes:
    pairs = enumerate(itertools.pairwise(widths))
    return shaped({f"layer_{s}": (outer, inner) for s, (inner, outer) in pairs}, precision)


def _check_deep_linear(widths: tuple[int, ...], rank: int, n_data: int) -> None:
    """Raises ValueError where the exact llc does not hold."""
    if min(widths) < 1:
        raise ValueError(f"every width must be at least 1; got widths={list(widths)}")
    if rank > min(widths):
        raise ValueError(f"rank must be at most the smallest width, {min(widths)}; got rank={rank}")
    if n_data < 10 * widths[0]:
        raise ValueError(
            f"data.n_data must be at least ten times the first width, {10 * widths[0]}, or the inputs do not span "
            f"their space and the exact llc does not hold; got {n_data}"
        )


class ReducedRankSpec(TargetSpec):
    """Reduced-rank regression: a deep linear network of two layers, exact llc by Aoyagi and Watanabe (2005).

    f(x) = B A x with A (hidden_dim, input_dim) and B (output_dim, hidden_dim), l(w; x) = 1/2 |f(x) - B0 A0 x|^2; else as `dln`.
    """

    metric: ClassVar[Literal["euclidean", "relative"]] = "euclidean"

    family: Literal["reduced_rank"] = "reduced_rank"
    data: DeepLinearData = DeepLinearData(n_data=1_000_000)
    input_dim: int = Field(5, ge=1, description="dimension of x")
    hidden_dim: int = Field(4, ge=1, description="largest rank the model can have")
    output_dim: int = Field(5, ge=1, description="dimension of f(x)")
    rank: int = Field(2, ge=0, description="rank r of the true map, and of A and of B at w*")

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        _check_deep_linear(self._widths, self.rank, self.data.n_data)
        return self

    @property
    def _widths(self) -> tuple[int, ...]:
        return self.input_dim, self.hidden_dim, self.output_dim

    @property
    def sample_size(self) -> int:
        return self.input_dim

    def param_shapes(self) -> Shapes:
        return _layer_shapes(self._widths, self.precision)

    def build(self, progress: Progress = no_progress, resume: Unfinished | None = None, save: Save | None = None) -> Target:
        spec = DeepLinearSpec(seed=self.seed, precision=self.precision, data=self.data, widths=self._widths, rank=self.rank)
        return dataclasses.replace(spec.build(), spec=self)

    def objective(self) -> Objective:
        return _DEEP_LINEAR


def _product(params: Params) -> jax.Array:
    """W_L ... W_1, shape (out, in)."""
    return functools.reduce(lambda product, s: params[f"layer_{s}"] @ product, range(1, len(params)), params["layer_0"])


def _deep_linear_per_sample(params: Params, dataset: Dataset) -> jax.Array:
    # The product first: for batches larger than the widths this is far less work than layer by layer.
    residual = dataset.samples["x"] @ (_product(params) - dataset.constants["teacher"]).T
    return 0.5 * jnp.sum(jnp.square(residual), axis=1)


def _deep_linear_mean(params: Params, dataset: Dataset) -> jax.Array:
    residual = (_product(params) - dataset.constants["teacher"]) @ dataset.constants["cholesky"]
    return 0.5 * jnp.sum(jnp.square(residual))


_DEEP_LINEAR = Objective(_deep_linear_per_sample, _deep_linear_mean)
