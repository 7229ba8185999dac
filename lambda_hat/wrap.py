"""Any pytree as the library's: a user's loss, parameters and data as an objective and dicts of arrays by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lambda_hat.posterior import compiled_losses, tensor_names
from lambda_hat.spec import InvalidInput
from lambda_hat.target import Dataset, Objective, Params

#: (params, batch) -> the losses of the batch's samples, (B,), or their mean, ().
LossFn = Callable[[Any, Any], jax.Array]

#: Samples whose losses are computed together and one at a time, to see that they do not depend on one another; and how far the
#: two may differ, relative to the largest and in nats. A loss of zero is all rounding.
FEW, RELATIVE, ABSOLUTE = 8, 1e-2, 1e-4


class Wrapped(NamedTuple):
    """A problem in the library's terms.

    params: the arrays that move, by name, all of one dtype. dataset: the data, and as constants the other arrays of the user's
    params. losses: of the samples at params, (n,).
    """

    objective: Objective
    params: dict[str, np.ndarray]
    dataset: Dataset
    losses: np.ndarray


class _Problem(NamedTuple):
    """A loss and how its own (params, batch) are put together again; hashable, so that equal ones share compiled programs.

    moves: each leaf's name in params, None if it stays. static: place and value of the leaves that are no arrays. keys: place
    and kind of random keys.
    """

    loss_fn: LossFn
    params_tree: Any
    moves: tuple[str | None, ...]
    static: tuple[tuple[int, Hashable], ...]
    keys: tuple[tuple[int, str], ...]
    data_tree: Any

    def together(self, params: Mapping[str, Any], dataset: Dataset) -> Any:
        """What loss_fn returns for all samples at once."""
        kept = dict(self.static) | {int(place): array for place, array in dataset.constants.items()}
        kept |= {place: jax.random.wrap_key_data(kept[place], impl=impl) for place, impl in self.keys}
        leaves = [kept[place] if name is None else params[name] for place, name in enumerate(self.moves)]
        batch = [dataset.samples[str(place)] for place in range(len(dataset.samples))]
        return self.loss_fn(jax.tree.unflatten(self.params_tree, leaves), jax.tree.unflatten(self.data_tree, batch))

    def apart(self, params: Mapping[str, Any], dataset: Dataset) -> Any:
        """What it returns for each sample alone, along a first axis."""

        def of_one(sample: dict[str, jax.Array]) -> Any:
            return self.together(params, Dataset({name: x[None] for name, x in sample.items()}, dataset.constants))

        return jax.vmap(of_one)(dataset.samples)


def wrap(loss_fn: LossFn, params: Any, data: Any) -> Wrapped:
    """The problem as the library handles it, checked.

    Args:
      loss_fn: (params, batch) -> the losses of the batch's samples, (B,), or their mean, (). A mean is taken of one sample at a
        time, so that each has a loss of its own.
      params: pytree. Its floating arrays move, named by their paths, "layers/0/w"; integers, booleans, random keys, functions
        and Python numbers stay as they are.
      data: pytree of arrays whose first axis is the sample, n >= 2; floating ones are taken in the dtype of params.

    Raises:
      InvalidInput: one of them is not so, a loss is not finite, or a sample's loss depends on the others of its batch.
    """
    leaves, tree = jax.tree.flatten(params)
    names = [name or "value" for name in tensor_names(params)]
    moves = [_is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    named = [(name, np.asarray(leaf)) for name, leaf, moving in zip(names, leaves, moves, strict=True) if moving]
    star = dict(named)
    _check_params([name for name, _ in named], star)

    keys = {place: leaf for place, leaf in enumerate(leaves) if _is_key(leaf)}
    stays = {place: leaf for place, leaf in enumerate(leaves) if _is_array(leaf) and not moves[place]}
    stays |= {place: jax.random.key_data(key) for place, key in keys.items()}
    problem = _Problem(
        loss_fn,
        tree,
        tuple(name if moving else None for name, moving in zip(names, moves, strict=True)),
        tuple((place, leaf) for place, leaf in enumerate(leaves) if not moves[place] and place not in stays),
        tuple((place, str(jax.random.key_impl(key))) for place, key in keys.items()),
        jax.tree.structure(data),
    )
    try:
        hash(problem)
    except TypeError as error:
        raise InvalidInput(
            f"loss_fn, and what is no array in params, must be hashable; got {error}. Pass a function as loss_fn, and let it "
            "close over the rest."
        ) from None
    dtype = next(iter(star.values())).dtype
    dataset = Dataset(_samples("data", data, dtype, 2), {str(place): np.asarray(leaf) for place, leaf in stays.items()})
    with jax.enable_x64(dtype == np.float64):
        few = Dataset({name: array[:FEW] for name, array in dataset.samples.items()}, dataset.constants)
        objective = _objective(problem, _is_mean(problem, star, few))
        losses = np.asarray(compiled_losses(objective, star, dataset))
        _check_losses(losses)
        with jax.default_matmul_precision("highest"):
            _check_independence(*_together_and_apart(problem, star, few))
    return Wrapped(objective, star, dataset, losses)


def wrap_like(name: str, data: Any, like: Any, wrapped: Wrapped) -> Dataset:
    """The observable `name`: data for the same loss as those that `wrapped` was made of, `like`.

    Raises:
      InvalidInput: they are of other arrays.
    """
    samples = _samples(f"the observable {name!r}", data, next(iter(wrapped.params.values())).dtype, 1)
    new, old = ([array.shape for array in of.values()] for of in (samples, wrapped.dataset.samples))
    trees: list[Any] = [jax.tree.structure(data), jax.tree.structure(like)]
    if trees[0] != trees[1] or [shape[1:] for shape in new] != [shape[1:] for shape in old]:
        raise InvalidInput(
            f"An observable must be a pytree like data, whose arrays have shapes {old}, of any number of samples; "
            f"got {new} as {name!r}. Pass the same arrays of other samples."
        )
    return Dataset(samples, wrapped.dataset.constants)


def _is_array(leaf: Any) -> bool:
    """Whether it is an array of numbers: no random keys, no objects."""
    array = isinstance(leaf, np.ndarray | np.generic | jax.Array)
    return array and (jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == np.bool_)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _check_params(names: list[str], star: dict[str, np.ndarray]) -> None:
    dtypes = sorted({leaf.dtype.name for leaf in star.values()})
    if dtypes not in (["float32"], ["float64"]):
        raise InvalidInput(
            f"The floating arrays of params must be all float32 or all float64; got {' and '.join(dtypes) or 'none'}. "
            "Convert them with jax.tree.map."
        )
    if len(names) > len(star):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInput(f"Each array of params must have a path of its own; got two named {twice!r}. Rename a key.")
    bad = [name for name, leaf in star.items() if not np.isfinite(leaf).all()]
    if bad:
        raise InvalidInput(f"params must be finite; got NaN or infinity in {', '.join(bad)}. Train with a lower learning rate.")


def _samples(what: str, data: Any, dtype: np.dtype, least: int) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves(data)
    wrong = [type(leaf).__name__ for leaf in leaves if not _is_array(leaf) or np.ndim(leaf) == 0]
    if wrong or not leaves:
        raise InvalidInput(
            f"The leaves of {what} must be arrays of numbers whose first axis is the sample; got {', '.join(wrong) or 'none'}. "
            "Pass arrays, like (x, y), and let loss_fn close over what the samples share."
        )
    lengths = sorted({len(leaf) for leaf in leaves})
    if len(lengths) > 1 or lengths[0] < least:
        raise InvalidInput(
            f"The arrays of {what} must have one first axis, of {least} or more samples; "
            f"got {' and '.join(map(str, lengths))}. Let loss_fn close over what the samples share."
        )
    arrays = [np.asarray(leaf) for leaf in leaves]
    return {
        str(place): array.astype(dtype, copy=False) if jnp.issubdtype(array.dtype, jnp.floating) else array
        for place, array in enumerate(arrays)
    }


def _is_mean(problem: _Problem, params: dict[str, np.ndarray], few: Dataset) -> bool:
    """Whether the loss is a mean, by its shape."""
    found = jax.eval_shape(problem.together, params, few)
    shape = getattr(found, "shape", None)
    if shape not in ((), (few.num_data,)) or not jnp.issubdtype(found.dtype, jnp.floating):
        got = type(found).__name__ if shape is None else f"shape {shape} of {found.dtype}"
        raise InvalidInput(
            "loss_fn(params, batch) must return the losses of the batch's samples, (B,), or their mean, (), as floating "
            f"numbers; of {few.num_data} samples it returned {got}. Return that one array."
        )
    return shape == ()


@functools.lru_cache(maxsize=64)
def _objective(problem: _Problem, is_mean: bool) -> Objective:
    """The same object for equal problems, so that another estimate compiles nothing."""
    losses = problem.apart if is_mean else problem.together

    def per_sample_loss(params: Params, dataset: Dataset) -> jax.Array:
        # In the dtype it is called with: the loss at w* is measured in float64 whatever the dtype of the sampling.
        return losses(params, dataset).astype(jax.tree.leaves(params)[0].dtype)

    return Objective(per_sample_loss)


@functools.partial(jax.jit, static_argnums=0)
def _together_and_apart(problem: _Problem, params: dict[str, np.ndarray], few: Dataset) -> tuple[jax.Array, jax.Array]:
    return problem.together(params, few), jnp.ravel(problem.apart(params, few))


def _check_losses(losses: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise InvalidInput(
            f"loss_fn must be finite at params; got {losses[bad[0]]} for {len(bad)} of {len(losses)} samples, first for sample "
            f"{bad[0]}. Look at that sample, or train with a lower learning rate."
        )


def _check_independence(together: jax.Array, apart: jax.Array) -> None:
    both, alone = (np.atleast_1d(np.asarray(losses, np.float64)) for losses in (together, apart))
    if together.ndim == 0:
        alone = np.mean(alone, keepdims=True)
    worst = np.argmax(np.abs(both - alone))
    if np.abs(both - alone)[worst] > ABSOLUTE + RELATIVE * np.max(np.abs(alone)):
        raise InvalidInput(
            "A sample's loss must not depend on the rest of its batch, and a scalar loss must be the mean over it; got "
            f"{both[worst]:.4g} for a batch of {len(apart)} and {alone[worst]:.4g} one at a time. Evaluate the network as it "
            "is used (no dropout, batch normalisation by its running averages), and take the mean of the losses."
        )
