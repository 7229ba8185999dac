"""Units of the offsets from w*: each tensor's own, in which a network whose layers are rescaled has the same posterior."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lambda_hat.targets.full_data import CHUNK_SAMPLES, Centre, euclidean_centre, fewest_copies, params_gradient
from lambda_hat.targets.target import Dataset, Objective, Params

#: Samples from which the relative metric is measured, and the random directions along which its curvature is.
METRIC_SAMPLES, METRIC_PROBES = 256, 4


#: How many times as strongly as localisation of 1 the data must hold the directions they identify, at nbeta = n / log n.
IDENTIFIED = 100.0
#: How far from an exact fit its gradients are measured, relative to each tensor's size.
NEAR = 1e-2


Metric = Literal["euclidean", "relative"]


def usual_nbeta(num_data: int) -> float:
    """n / log n (Watanabe 2013)."""
    return num_data / math.log(num_data)


def relative_scales(objective: Objective, centre: Centre) -> list[np.ndarray]:
    """Units of each tensor's offsets in the relative metric, scalars.

    scale_t^2 = c / F_t, with F_t the mean square of the per-sample loss gradients in tensor t (the diagonal of the empirical
    Fisher information, averaged) and c the mean of rms_t^2 F_t over all parameters, rms_t the root mean square of w* in the
    tensor. A tensor that is multiplied by a has its F divided by a^2 and rms^2 multiplied by it: c stays and its scale is
    multiplied by a, so a network whose layers are rescaled against each other has the same posterior of u. A tensor near zero,
    like an intercept, takes no more from c than its own share of the parameters.
    Where F is zero a tensor's unit is its rms; where that is zero too, 1. At an exact fit, where F is zero everywhere, it is
    that of parameters nearby.

    A model whose parameters are all near zero is no smaller for it. So c is raised, where needed, until the data hold the
    directions that they identify `IDENTIFIED` times as strongly as localisation of 1 does, at nbeta = n / log n.
    """
    params, dataset = centre.params_star, centre.dataset
    fisher, rms2 = (np.asarray(values, np.float64) for values in jax.device_get(_mean_squares(objective, params, dataset)))
    if not fisher.any():
        rng = np.random.default_rng(0)
        leaves, structure = jax.tree.flatten(params)
        units = NEAR * np.where(rms2 > 0, np.sqrt(rms2), 1.0)
        near = [
            (leaf + unit * rng.choice([-1.0, 1.0], leaf.shape)).astype(leaf.dtype)
            for leaf, unit in zip(leaves, units, strict=True)
        ]
        moved = jax.tree.unflatten(structure, near)
        fisher = np.asarray(jax.device_get(_mean_squares(objective, moved, dataset)[0]), np.float64)
    sizes = np.asarray([leaf.size for leaf in jax.tree.leaves(params)])
    known = (fisher > 0) & np.isfinite(fisher)
    scale2 = np.where(rms2 > 0, rms2, 1.0)
    if (rms2[known] > 0).any():
        scale2[known] = np.average((rms2 * fisher)[known], weights=sizes[known]) / fisher[known]
    nbeta = usual_nbeta(dataset.num_data)
    held = nbeta * _identified_curvature(objective, centre, np.sqrt(scale2), nbeta)
    scale2[known] *= max(1.0, IDENTIFIED / held)
    return [np.asarray(value, centre.losses.dtype) for value in np.sqrt(scale2)]


def _identified_curvature(objective: Objective, centre: Centre, scales: np.ndarray, nbeta: float) -> float:
    """tr(H^2) / tr(H), H the Hessian of L_n at w* with respect to u: the mean curvature of the directions of u, each weighted
    by its own, so that flat ones do not count. Infinite where there is none.

    H v is a difference of gradients at w* -+ a scale v, v of random signs, of the losses of up to CHUNK_SAMPLES samples. The
    amplitude a is where the loss at the temperature nbeta tells w from w*, so that neither rounding nor the flatness of a
    singular w* at a point decides.
    """
    if objective.loss is None and centre.dataset.num_data > CHUNK_SAMPLES:
        centre = euclidean_centre(objective, centre.params_star, centre.dataset.spread(CHUNK_SAMPLES))
    leaves, structure = jax.tree.flatten(centre.params_star)
    rng = np.random.default_rng(0)
    probes = [[scale * rng.choice([-1.0, 1.0], leaf.shape) for scale, leaf in zip(scales, leaves, strict=True)]
              for _ in range(METRIC_PROBES)]  # fmt: skip

    def product(probe: list[np.ndarray], amplitude: float) -> list[np.ndarray]:
        """scale H scale v, for each tensor."""
        ends = []
        for sign in (1, -1):
            moved = [leaf + (sign * amplitude * v).astype(leaf.dtype) for leaf, v in zip(leaves, probe, strict=True)]
            gradient = params_gradient(objective, jax.tree.unflatten(structure, moved), centre)
            ends.append([np.asarray(g, np.float64) for g in jax.tree.leaves(gradient)])
        return [s * (p - m) / (2 * amplitude) for s, p, m in zip(scales, *ends, strict=True)]

    for amplitude in 10.0 ** np.arange(-2, 13):
        products = [product(probe, amplitude) for probe in probes]
        along = sum(float(np.sum(v / s * h)) for probe, hv in zip(probes, products, strict=True)
                    for v, s, h in zip(probe, scales, hv, strict=True))  # fmt: skip
        square = sum(float(np.sum(np.square(h))) for hv in products for h in hv)
        if not math.isfinite(square):
            break
        if nbeta * amplitude**2 / 2 * along / METRIC_PROBES >= 1:
            return square / along
    return math.inf


@functools.partial(jax.jit, static_argnums=0)
def _mean_squares(objective: Objective, params: Params, dataset: Dataset) -> tuple[list, list]:
    """For each tensor: the mean squares of per-sample gradients, on evenly spaced samples, and of w*."""
    count = min(dataset.num_data, METRIC_SAMPLES)
    indices = jnp.arange(count) * dataset.num_data // count

    def of_one(params: Params, index: jax.Array, copies: int) -> jax.Array:
        return objective.per_sample_loss(params, dataset.take(jnp.broadcast_to(index, copies)))[0]

    copies = fewest_copies(lambda copies: jax.eval_shape(functools.partial(of_one, copies=copies), params, indices[0]))

    def add(total: Any, index: jax.Array) -> tuple[Any, None]:
        gradient = jax.grad(of_one)(params, index, copies)
        return [t + jnp.mean(jnp.square(g)) / count for t, g in zip(total, jax.tree.leaves(gradient), strict=True)], None

    leaves = jax.tree.leaves(params)
    fisher, _ = jax.lax.scan(add, [jnp.zeros((), leaf.dtype) for leaf in leaves], indices)
    return fisher, [jnp.mean(jnp.square(leaf)) for leaf in leaves]
