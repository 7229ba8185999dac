"""Curvature of a target's loss at w*: the Hessian of the mean loss over all the data, by products with vectors alone.

The products are forward over reverse, on bounded memory: `targets.full_data.CHUNK_SAMPLES` samples at a time. Everything is
in the target's precision. A Krylov basis of m vectors takes m d numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.full_data import reduce_chunks
from lambda_hat.targets.target import Dataset, Objective, Params, Target, num_params

#: Products on the device between two looks at whether the eigenvalues have converged.
BLOCK = 8
#: Vectors multiplied together.
VECTORS = 8
#: Numbers that the Krylov bases built together may hold: 256 MB in float32.
BASIS_NUMBERS = 2**26
#: Points of a density.
GRID_POINTS = 1000


class Eigenvalues(NamedTuple):
    """Extreme eigenvalues, each with its residual |H v - theta v|: within that of theta there is an eigenvalue of H.

    No residual is below the rounding of the largest eigenvalue. largest: descending, (n,). smallest: the lowest, negative
    at a saddle.
    """

    largest: np.ndarray
    largest_errors: np.ndarray
    smallest: float
    smallest_error: float
    num_products: int


class Trace(NamedTuple):
    """tr H and its standard error."""

    value: float
    error: float


class Density(NamedTuple):
    """Spectral density: the share of eigenvalues per unit, whose integral is 1.

    nodes, weights: each probe's quadrature, (probes, iterations); a probe's weights sum to 1, and the mean over the probes of
    sum_i weights_i f(nodes_i) estimates tr f(H) / d. grid, density: the nodes broadened by Gaussians of standard deviation
    `width`, (points,).
    """

    grid: np.ndarray
    density: np.ndarray
    width: float
    nodes: np.ndarray
    weights: np.ndarray


class Curvature(NamedTuple):
    """What `curvature` measures; see `Eigenvalues`, `Trace` and `Density`."""

    eigenvalues: Eigenvalues
    trace: Trace
    density: Density

    @property
    def sharpness(self) -> float:
        """The largest eigenvalue of the Hessian."""
        return float(self.eigenvalues.largest[0])


def curvature(
    target: Target, key: jax.Array, num_eigenvalues: int = 10, num_probes: int = 4, num_iterations: int = 64
) -> Curvature:
    """The largest eigenvalues, trace and spectral density of the Hessian of L_n at w*.

    Args:
      key: of the random vectors. num_probes, num_iterations: of the density, see `spectral_density`.

    Raises:
      FloatingPointError: the Hessian is not finite.
    """
    keys = jax.random.split(key, 3)
    return Curvature(
        top_eigenvalues(target, min(num_eigenvalues, num_params(target.params_star)), keys[0]),
        hessian_trace(target, keys[1]),
        spectral_density(target, keys[2], num_probes, num_iterations),
    )


def hvp(objective: Objective, params: Params, dataset: Dataset, vector: jax.Array) -> jax.Array:
    """H v for the Hessian H of the mean loss over the dataset at params, forward over reverse; v and H v are (d,).

    The d numbers are those of `jax.flatten_util.ravel_pytree(params)`.
    """
    flat, unravel = ravel_pytree(params)
    return jax.jvp(jax.grad(lambda flat: mean_loss(objective, unravel(flat), dataset)), (flat,), (vector,))[1]


def mean_loss(objective: Objective, params: Params, dataset: Dataset) -> jax.Array:
    """L_n, less a constant where the objective knows it in closed form; in bounded memory."""
    if objective.loss is not None:
        return objective.loss(params, dataset)
    total = reduce_chunks(
        lambda part, _: jnp.sum(objective.per_sample_loss(params, part)),
        dataset, jnp.zeros(dataset.num_data, jax.tree.leaves(params)[0].dtype),
        lambda parts, rest: jnp.sum(parts) + (0 if rest is None else rest),
    )  # fmt: skip
    return total / dataset.num_data


# --- Lanczos -----------------------------------------------------------------------------------------------------------


class _Krylov(NamedTuple):
    """Lanczos' vectors, (probes, m + 1, d), 0 where not yet computed, and the tridiagonal matrices' entries, (probes, m)."""

    basis: jax.Array
    alphas: jax.Array
    betas: jax.Array


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _advance(
    objective: Objective, krylov: _Krylov, params: Params, dataset: Dataset, random: jax.Array, start: int, end: int
) -> _Krylov:
    """Iterations `start` to `end` of Lanczos with full reorthogonalisation, each probe on its own.

    Where a Krylov space is exhausted, beta is 0 and a random vector orthogonal to it, of `random`, (probes, d), begins the
    next one: the Ritz values go on to further eigenvalues, and those of more than one direction are found more than once.
    """
    flat, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda flat: mean_loss(objective, unravel(flat), dataset))
    epsilon = jnp.finfo(flat.dtype).eps

    def iteration(k: jax.Array, krylov: _Krylov) -> _Krylov:
        products = jax.vmap(lambda v: jax.jvp(gradient, (flat,), (v,))[1])(krylov.basis[:, k])
        fresh = jnp.roll(random, k, axis=1)  # as good as new, and drawing in the loop would double the time to compile

        def of_probe(krylov: _Krylov, product: jax.Array, fresh: jax.Array) -> _Krylov:
            basis = krylov.basis
            alpha = basis[k] @ product
            rest = _orthogonal(product, basis)
            beta = jnp.linalg.norm(rest)
            scale = jnp.maximum(jnp.max(jnp.abs(krylov.alphas)), jnp.maximum(jnp.max(krylov.betas), jnp.abs(alpha)))
            exhausted = beta <= 10 * epsilon * scale
            # The second time after scaling: or a short rest would keep the rounding of a long product.
            following = jnp.where(exhausted, fresh / jnp.linalg.norm(fresh), rest / jnp.where(exhausted, 1, beta))
            following = _orthogonal(following, basis)
            following = following / jnp.linalg.norm(following)
            return _Krylov(
                basis.at[k + 1].set(following),
                krylov.alphas.at[k].set(alpha),
                krylov.betas.at[k].set(jnp.where(exhausted, 0, beta)),
            )

        return jax.vmap(of_probe)(krylov, products, fresh)

    return jax.lax.fori_loop(start, end, iteration, krylov)


def _orthogonal(vector: jax.Array, basis: jax.Array) -> jax.Array:
    """The part of the vector, (d,), that is orthogonal to the rows of the basis, (m, d)."""
    return vector - (basis @ vector) @ basis


def _lanczos(
    target: Target, key: jax.Array, num_probes: int, num_iterations: int, enough: Callable[[list[_Ritz]], bool]
) -> list[_Ritz]:
    """Each probe's Ritz values after `num_iterations` products, or at the first look at which there are `enough`."""
    dim = num_params(target.params_star)
    with jax.enable_x64(target.spec.precision == "float64"), jax.default_matmul_precision("highest"):
        params, dataset = jax.device_put((target.params_star, target.dataset))
        dtype = jax.tree.leaves(params)[0].dtype
        first_key, fresh_key = jax.random.split(key)
        first = jax.random.normal(first_key, (num_probes, dim), dtype)
        fresh = jax.random.normal(fresh_key, (num_probes, dim), dtype)
        basis = jnp.zeros((num_probes, num_iterations + 1, dim), dtype)
        basis = basis.at[:, 0].set(first / jnp.linalg.norm(first, axis=1, keepdims=True))
        krylov = _Krylov(basis, *(jnp.zeros((num_probes, num_iterations), dtype) for _ in range(2)))
        for start in range(0, num_iterations, BLOCK):
            end = min(start + BLOCK, num_iterations)
            krylov = _advance(target.spec.objective(), krylov, params, dataset, fresh, start, end)
            alphas, betas = (np.asarray(entries, np.float64)[:, :end] for entries in krylov[1:])
            _check_finite(alphas, target)
            ritz = [_ritz(*entries) for entries in zip(alphas, betas, strict=True)]
            if enough(ritz):
                break
    return ritz


class _Ritz(NamedTuple):
    """Ritz values, ascending, their residuals, and the squares of their vectors' overlaps with the first one; each (m,)."""

    values: np.ndarray
    residuals: np.ndarray
    weights: np.ndarray


def _ritz(alphas: np.ndarray, betas: np.ndarray) -> _Ritz:
    from scipy.linalg import eigh_tridiagonal

    values, vectors = eigh_tridiagonal(alphas, betas[:-1])
    return _Ritz(values, betas[-1] * np.abs(vectors[-1]), np.square(vectors[0]))


def _check_finite(values: np.ndarray, target: Target) -> None:
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"Curvature is of a loss with finite derivatives at finite parameters; the Hessian of {target.target_id} is not "
            "finite. Leave out trials that diverged, or take precision=float64."
        )


def top_eigenvalues(
    target: Target, num_eigenvalues: int, key: jax.Array, tolerance: float = 1e-3, max_products: int = 128
) -> Eigenvalues:
    """The largest eigenvalues of the Hessian, and its smallest, by Lanczos from one random vector.

    It stops when all their residuals are at most `tolerance` times the largest eigenvalue in absolute value, or after
    `max_products` products with the residuals reached by then. An eigenvalue's error is at most its residual and, where it
    is well apart from the others, of the order of the residual's square. Eigenvalues that are exactly equal are found once,
    unless the whole Krylov space is exhausted.

    Raises:
      InvalidInput: there are fewer parameters than eigenvalues asked for. FloatingPointError: the Hessian is not finite.
    """
    dim = num_params(target.params_star)
    if not 1 <= num_eigenvalues <= dim:
        raise InvalidInput(
            f"num_eigenvalues must be from 1 to the number of parameters, {dim}; got {num_eigenvalues}. Ask for fewer."
        )
    budget = min(dim, max(max_products, 2 * num_eigenvalues))
    wanted = [*range(-1, -num_eigenvalues - 1, -1), 0]

    def converged(ritz: list[_Ritz]) -> bool:
        (found,) = ritz
        if len(found.values) <= num_eigenvalues:
            return False
        return bool(np.max(found.residuals[wanted]) <= tolerance * np.max(np.abs(found.values)))

    (found,) = _lanczos(target, key, 1, budget, converged)
    rounding = np.finfo(target.spec.precision).eps * np.max(np.abs(found.values))
    values, residuals = found.values[wanted], np.maximum(found.residuals[wanted], rounding)
    return Eigenvalues(values[:-1], residuals[:-1], float(values[-1]), float(residuals[-1]), len(found.values))


def spectral_density(
    target: Target, key: jax.Array, num_probes: int = 4, num_iterations: int = 64, width: float | None = None
) -> Density:
    """The density of the Hessian's eigenvalues by stochastic Lanczos quadrature (Ubaru et al. 2017; Ghorbani et al. 2019).

    A probe v, uniform on the sphere, sees the density sum_i (v q_i)^2 delta(x - lambda_i), whose mean over probes is that of
    the d eigenvalues; `num_iterations` of Lanczos give the Gaussian quadrature of it with as many nodes.

    Args:
      width: standard deviation of the Gaussians; none = 1/100 of the distance between the extreme nodes.

    Raises:
      FloatingPointError: the Hessian is not finite.
    """
    dim = num_params(target.params_star)
    num_iterations = min(num_iterations, dim)
    together = max(1, min(num_probes, BASIS_NUMBERS // ((num_iterations + 1) * dim)))
    ritz: list[_Ritz] = []
    while len(ritz) < num_probes:
        part = jax.random.fold_in(key, len(ritz))
        ritz += _lanczos(target, part, min(together, num_probes - len(ritz)), num_iterations, lambda _: False)
    nodes, weights = np.stack([probe.values for probe in ritz]), np.stack([probe.weights for probe in ritz])
    low, high = float(nodes.min()), float(nodes.max())
    if width is None:
        width = (high - low) / 100 or max(abs(high), 1.0) / 100
    grid = np.linspace(low - 4 * width, high + 4 * width, GRID_POINTS)
    gaussians = np.exp(-0.5 * np.square((grid[:, None] - nodes.reshape(1, -1)) / width)) / (width * math.sqrt(2 * math.pi))
    return Density(grid, gaussians @ weights.reshape(-1) / num_probes, width, nodes, weights)


# --- Trace -------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _products(objective: Objective, params: Params, dataset: Dataset, vectors: jax.Array) -> jax.Array:
    """H v for each row v, (k, d)."""
    return jax.lax.map(lambda v: hvp(objective, params, dataset, v), vectors, batch_size=VECTORS)


def hessian_trace(target: Target, key: jax.Array, num_probes: int = 32) -> Trace:
    """tr H = E[z H z] over random signs z (Hutchinson), exactly on the range of H S and by probes on the rest.

    The few large eigenvalues of a network's Hessian are nearly all of the variance of z H z. With Q an orthonormal basis of
    H S for random signs S, tr H = tr(Q' H Q) + E[z P H P z] with P = I - Q Q' (Hutch++, Meyer et al. 2021): unbiased as
    Hutchinson's estimate is, and the standard error is that of the mean over the probes. 3 `num_probes` products; for no
    more parameters than probes the trace is exact, by a product for each.

    Raises:
      InvalidInput: fewer than two probes have no standard error. FloatingPointError: the Hessian is not finite.
    """
    if num_probes < 2:
        raise InvalidInput(f"num_probes must be at least 2, to have a standard error; got {num_probes}. Take some 32.")
    dim = num_params(target.params_star)
    with jax.enable_x64(target.spec.precision == "float64"), jax.default_matmul_precision("highest"):
        params, dataset = jax.device_put((target.params_star, target.dataset))
        dtype = jax.tree.leaves(params)[0].dtype

        def products(vectors: jax.Array) -> jax.Array:
            return _products(target.spec.objective(), params, dataset, vectors)

        def forms(vectors: jax.Array) -> np.ndarray:
            """v H v for each row v."""
            values = np.asarray(jnp.sum(vectors * products(vectors), axis=1), np.float64)
            _check_finite(values, target)
            return values

        if dim <= num_probes:
            return Trace(float(forms(jnp.eye(dim, dtype=dtype)).sum()), 0.0)
        sketch, probes = jax.random.rademacher(key, (2, num_probes, dim), dtype)
        rows = jnp.linalg.qr(products(sketch).T)[0].T
        rest = forms(probes - (probes @ rows.T) @ rows)
        return Trace(float(forms(rows).sum() + rest.mean()), float(np.std(rest, ddof=1)) / math.sqrt(num_probes))
