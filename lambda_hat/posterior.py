"""The local tempered posterior around w*: exp(-nbeta L_n(w) - localization/2 |u|^2) of the offset u from w*."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from lambda_hat.spec import InvalidInput, Spec
from lambda_hat.target import Dataset, Objective, Params, chunk_size
from lambda_hat.text import listed, shortened

#: Samples whose losses are computed at a time where all the data are used: bounds memory, and is plenty for speed.
CHUNK_SAMPLES = 4096
#: Samples from which the relative metric is measured, and the random directions along which its curvature is.
METRIC_SAMPLES, METRIC_PROBES = 256, 4
#: How many times as strongly as localisation of 1 the data must hold the directions they identify, at nbeta = n / log n.
IDENTIFIED = 100.0

#: Times by which nbeta may differ from n / log n without a word: beta = 1 and the usual scans of temperatures are within.
FAR = 10.0

Metric = Literal["euclidean", "relative"]


class PosteriorSpec(Spec):
    """Temperature, localisation, and which parameters move.

    w = w* + scale * u on the selected parameters, and the density of u is exp(-nbeta L_n(w) - localization/2 |u|^2). With the
    euclidean metric scale = 1, the usual definition. The relative metric measures each parameter tensor in units of its own
    (`relative_scales`), so that the llc of a ReLU network does not change when its layers are rescaled against each other.
    """

    nbeta: float | None = Field(None, gt=0, description="n times the inverse temperature; none = n / log n")
    localization: float = Field(1.0, ge=0, description="strength gamma of the pull towards w*")
    metric: Metric | Literal["auto"] = Field(
        "auto", description="units of the offsets: euclidean, or relative to each tensor; auto = as suits the target"
    )
    parameters: tuple[str, ...] = Field(
        ("*",),
        min_length=1,
        description='the parameters that move, others stay at w*; patterns like "hidden_0/*" or "head/w[0]"',
    )

    def resolve_nbeta(self, num_data: int) -> float:
        """nbeta, or the WBIC choice n / log n (Watanabe 2013)."""
        return num_data / math.log(num_data) if self.nbeta is None else self.nbeta

    def doubt(self, num_data: int) -> str:
        """What is odd about nbeta, in a sentence; "" where nothing is."""
        usual = num_data / math.log(num_data)
        if self.nbeta is None or usual / FAR <= self.nbeta <= usual * max(FAR, math.log(num_data)):
            return ""
        return (
            f"posterior.nbeta is n times the inverse temperature beta, n / log n = {usual:.4g} where it is left out; got "
            f"{self.nbeta:.4g}, as of beta = {self.nbeta / num_data:.2g}"
        )


class Posterior(NamedTuple):
    """The posterior as functions of the flat offset u from w*, shape (d,).

    logdensity_fn: -nbeta (L_n(w) - L_n(w*)) - localization/2 |u|^2, scalar.
    minibatch_difference_and_grad: (u, rng_key, batch_size, control_variates=False) -> (L_B(w) - L_B(w*), g_B), on a fresh batch
      of samples drawn with replacement; g_B is the gradient of L_B with respect to u. The difference is paired (both losses on
      the same samples), so it is unbiased for L_n(w) - L_n(w*) and far less noisy than L_B(w) - L_n(w*). With control
      variates c = g_n(w*) - g_B(w*) the gradient is g_B(w) + c and the difference L_B(w) - L_B(w*) + c u: also unbiased, and
      exact to first order in u, for twice the work.
    num_data: number of samples n.
    """

    logdensity_fn: Callable[[jax.Array], jax.Array]
    minibatch_difference_and_grad: Callable[..., tuple[jax.Array, jax.Array]]
    nbeta: jax.Array
    localization: jax.Array
    num_data: int

    def loss_difference(self, position: jax.Array, logdensity: jax.Array) -> jax.Array:
        """L_n(w) - L_n(w*), recovered from the log density at u without another pass over the data."""
        pull = 0.5 * self.localization * jnp.sum(jnp.square(position))
        return -(logdensity + pull) / self.nbeta


class Centre(NamedTuple):
    """What is computed once around w* and shared by all chains.

    scales: units of the offsets, a scalar for each tensor of params_star. losses: of the samples at w*, (n,).
    gradient: of L_n at w* with respect to u, (d,); () where control variates do not need it.
    """

    params_star: Params
    scales: list[jax.Array]
    dataset: Dataset
    losses: jax.Array
    gradient: jax.Array

    def params(self, position: jax.Array, selection: Selection) -> Params:
        """w at the offset u, (d,), of the selected parameters."""
        return to_params(position, self.params_star, self.scales, selection)


#: For each tensor of the parameters: None if it stays, else which part moves, as the text of a NumPy index ("" for all of it).
Selection = tuple[str | None, ...]


def tensor_names(params: Params) -> list[str]:
    """Names of the parameter tensors in the order of their leaves, like "hidden_0/w"."""
    return [tensor_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def tensor_name(path: tuple[Any, ...]) -> str:
    """The name of the leaf at a path of JAX's keys."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def select(params: Params, patterns: Sequence[str]) -> Selection:
    """Which tensors, or parts of them, the patterns name: shell patterns of tensor names, with an optional index.

    Raises:
      InvalidInput: a pattern names nothing, an index does not fit, or two indices name parts of one tensor.
    """
    names, leaves = tensor_names(params), jax.tree.leaves(params)
    selection: list[str | None] = [None] * len(names)
    for pattern in patterns:
        match = re.fullmatch(r"(.*?)(?:\[([-\d:, ]+)\])?", pattern)
        glob, index = match.group(1), match.group(2) or ""  # type: ignore[union-attr]  # it matches anything
        matched = [place for place, name in enumerate(names) if fnmatch.fnmatchcase(name, glob)]
        if not matched:
            raise InvalidInput(
                f"Every pattern of posterior.parameters must name a parameter; got {shortened(pattern)}. "
                f"There are: {listed(names)}."
            )
        for place in matched:
            if selection[place] not in (None, index):
                raise InvalidInput(
                    f"posterior.parameters may name one part of a tensor; got two of {names[place]!r}: {listed(patterns)}. "
                    "Name the whole tensor or a range that holds both."
                )
            try:
                if np.empty(np.shape(leaves[place]), bool)[_index(index)].size == 0:
                    raise IndexError("it is empty")
            except (IndexError, TypeError, ValueError) as error:
                raise InvalidInput(
                    f"The index of {pattern!r} in posterior.parameters must fit the tensor {names[place]!r}, "
                    f"of shape {np.shape(leaves[place])}: {error}."
                ) from error
            selection[place] = index
    return tuple(selection)


def _index(text: str) -> tuple[int | slice, ...]:
    """The NumPy index of its text, like "0" or "2:4, 1"; "" is all."""
    parts = [part.strip() for part in text.split(",")] if text else []
    return tuple(slice(*(int(i) if i else None for i in part.split(":"))) if ":" in part else int(part) for part in parts)


def _shapes(params: Params, selection: Selection) -> list[tuple[int, ...]]:
    """Shapes of the selected parts, in order."""
    pairs = zip(jax.tree.leaves(params), selection, strict=True)
    return [np.empty(leaf.shape, bool)[_index(index)].shape for leaf, index in pairs if index is not None]


def num_selected(params: Params, selection: Selection) -> int:
    """The number of parameters that move, d."""
    return sum(math.prod(shape) for shape in _shapes(params, selection))


def to_params(position: jax.Array, params_star: Params, scales: Sequence[jax.Array], selection: Selection) -> Params:
    """w = w* + scale * u on the selected parameters."""
    leaves, structure = jax.tree.flatten(params_star)
    shapes = _shapes(params_star, selection)
    # Not slices, whose gradients are additions to the whole vector.
    parts = jax.lax.split(position, [math.prod(shape) for shape in shapes])
    moving = [place for place, index in enumerate(selection) if index is not None]
    for place, part, shape in zip(moving, parts, shapes, strict=True):
        offset = scales[place] * part.reshape(shape)
        index = _index(selection[place] or "")
        leaves[place] = leaves[place] + offset if not index else jnp.asarray(leaves[place]).at[index].add(offset)
    return jax.tree.unflatten(structure, leaves)


def reduce_chunks(function: Callable[[Dataset, jax.Array], Any], dataset: Dataset, losses: jax.Array, combine: Any) -> Any:
    """`function` of (samples, their losses at w*) on at most CHUNK_SAMPLES at a time, under `combine` of (the results of full
    chunks, the rest's): memory is bounded by a chunk's, in gradients too."""
    n = losses.shape[0]
    size = chunk_size(n, CHUNK_SAMPLES)
    if n == size:
        return function(dataset, losses)
    whole = n // size * size

    @jax.checkpoint
    def of_part(samples: Any, own_losses: jax.Array) -> Any:
        return function(Dataset(samples, dataset.constants), own_losses)

    def of_chunk(start: jax.Array) -> Any:
        # Sliced one by one: the data cut into chunks beforehand would be a copy of them.
        return of_part(*jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), (dataset.samples, losses)))

    results = jax.lax.map(of_chunk, jnp.arange(0, whole, size))
    if whole == n:
        return combine(results, None)
    return combine(results, of_part(*jax.tree.map(lambda x: x[whole:], (dataset.samples, losses))))


def per_sample_losses(objective: Objective, params: Params, dataset: Dataset) -> jax.Array:
    """The losses of all samples, (n,), in bounded memory."""
    none = jnp.zeros(dataset.num_data, jax.tree.leaves(params)[0].dtype)
    return reduce_chunks(
        lambda part, _: objective.per_sample_loss(params, part),
        dataset, none,
        lambda parts, rest: parts.reshape(-1) if rest is None else jnp.concatenate([parts.reshape(-1), rest]),
    )  # fmt: skip


compiled_losses = jax.jit(per_sample_losses, static_argnums=0)


def full_difference(objective: Objective, params: Params, centre: Centre) -> jax.Array:
    """L_n(w) - L_n(w*) on all the data, in bounded memory."""
    if objective.loss is not None:
        return objective.loss(params, centre.dataset) - objective.loss(centre.params_star, centre.dataset)
    total = reduce_chunks(
        lambda part, losses: jnp.sum(objective.per_sample_loss(params, part) - losses),
        centre.dataset, centre.losses,
        lambda parts, rest: jnp.sum(parts) + (0 if rest is None else rest),
    )  # fmt: skip
    return total / centre.losses.shape[0]


def relative_scales(objective: Objective, centre: Centre) -> list[np.ndarray]:
    """Units of each tensor's offsets in the relative metric, scalars.

    scale_t^2 = c / F_t, with F_t the mean square of the per-sample loss gradients in tensor t (the diagonal of the empirical
    Fisher information, averaged) and c the mean of rms_t^2 F_t over all parameters, rms_t the root mean square of w* in the
    tensor. A tensor that is multiplied by a has its F divided by a^2 and rms^2 multiplied by it: c stays and its scale is
    multiplied by a, so a network whose layers are rescaled against each other has the same posterior of u. A tensor near zero,
    like an intercept, takes no more from c than its own share of the parameters.
    Where F is zero a tensor's unit is its rms; where that is zero too, 1.

    A model whose parameters are all near zero is no smaller for it. So c is raised, where needed, until the data hold the
    directions that they identify `IDENTIFIED` times as strongly as localisation of 1 does, at nbeta = n / log n.
    """
    params, dataset = centre.params_star, centre.dataset
    fisher, rms2 = (np.asarray(values, np.float64) for values in jax.device_get(_mean_squares(objective, params, dataset)))
    sizes = np.asarray([leaf.size for leaf in jax.tree.leaves(params)])
    known = (fisher > 0) & np.isfinite(fisher)
    scale2 = np.where(rms2 > 0, rms2, 1.0)
    if (rms2[known] > 0).any():
        scale2[known] = np.average((rms2 * fisher)[known], weights=sizes[known]) / fisher[known]
    nbeta = PosteriorSpec().resolve_nbeta(dataset.num_data)
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
def params_gradient(objective: Objective, params: Params, centre: Centre) -> Params:
    """The gradient of L_n at `params`, which need not be those of `centre`, in bounded memory."""
    return jax.grad(lambda params: full_difference(objective, params, centre))(params)


def fewest_copies(try_with: Callable[[int], Any]) -> int:
    """Copies of a sample that are the smallest batch on which a loss works, where the loss of that sample alone is wanted: more
    than one if it drops axes of length one or cuts its batch into parts."""
    for copies in (1, 2, 4, 8, 16):
        with contextlib.suppress(Exception):  # whatever a user's code raises
            try_with(copies)
            return copies
    return 32


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


def make_centre(
    objective: Objective, params_star: Params, dataset: Dataset, metric: Metric, selection: Selection, with_gradient: bool
) -> Centre:
    """What chains around `params_star` share, computed on the device."""
    params_star, dataset = jax.device_put((params_star, dataset))
    centre = euclidean_centre(objective, params_star, dataset)
    if metric == "relative":
        centre = centre._replace(scales=[jnp.asarray(scale) for scale in relative_scales(objective, centre)])
    if not with_gradient:
        return centre
    gradient = jax.tree.leaves(params_gradient(objective, params_star, centre))
    parts = [
        scale * leaf[_index(index)].reshape(-1)
        for leaf, scale, index in zip(gradient, centre.scales, selection, strict=True)
        if index is not None
    ]
    return centre._replace(gradient=jnp.concatenate(parts))


def euclidean_centre(objective: Objective, params_star: Params, dataset: Dataset) -> Centre:
    """What is computed around `params_star` in the euclidean metric, without the gradient."""
    losses = compiled_losses(objective, params_star, dataset)
    ones = [jnp.ones((), losses.dtype) for _ in jax.tree.leaves(params_star)]
    return Centre(params_star, ones, dataset, losses, jnp.zeros((), losses.dtype))


def make_posterior(
    objective: Objective, centre: Centre, selection: Selection, nbeta: jax.Array, localization: jax.Array
) -> Posterior:
    """The posterior around `centre` at one temperature and localisation."""

    def logdensity_fn(position: jax.Array) -> jax.Array:
        pull = 0.5 * localization * jnp.sum(jnp.square(position))
        return -nbeta * full_difference(objective, centre.params(position, selection), centre) - pull

    def difference(position: jax.Array, batch: Dataset, losses: jax.Array) -> jax.Array:
        return jnp.mean(objective.per_sample_loss(centre.params(position, selection), batch) - losses)

    def minibatch(
        position: jax.Array, rng_key: jax.Array, batch_size: int, control_variates: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        indices = jax.random.randint(rng_key, (batch_size,), 0, centre.losses.shape[0])
        batch, losses = centre.dataset.take(indices), centre.losses[indices]
        value, gradient = jax.value_and_grad(difference)(position, batch, losses)
        if control_variates:
            correction = centre.gradient - jax.grad(difference)(jnp.zeros_like(position), batch, losses)
            value, gradient = value + correction @ position, gradient + correction
        return value, gradient

    return Posterior(logdensity_fn, minibatch, nbeta, localization, centre.losses.shape[0])
