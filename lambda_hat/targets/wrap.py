"""Any pytree as the library's: a user's loss, parameters and data as an objective and dicts of arrays by name."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.specs.text import listed, shortened
from lambda_hat.targets.full_data import compiled_losses, fewest_copies
from lambda_hat.targets.loss_checks import check_gradient, check_independence, check_losses, loss_degree
from lambda_hat.targets.target import Dataset, Objective, Params
from lambda_hat.targets.user_arrays import WEIGHT, Leaf, parameter_leaves, sample_arrays, sample_weights

#: (params, batch) -> the losses of the batch's samples, (B,), or their mean, ().
LossFn = Callable[[Any, Any], jax.Array]

#: Samples of the batch on which a loss is traced, chosen at random.
TRACED = 32
#: Steps of loops up to which a loss is evaluated without compiling, which takes about a millisecond each.
MAX_PLAIN_STEPS = 1000


class Wrapped(NamedTuple):
    """A problem in the library's terms.

    params: the arrays that move, by name, all of one dtype. dataset: the data with their weights, and as constants the other
    arrays of the user's params. losses: of the samples at params, weighted, (n,). degree: that with which L_n rises from params
    (`targets.loss_checks.loss_degree`).
    """

    objective: Objective
    params: dict[str, np.ndarray]
    dataset: Dataset
    losses: np.ndarray
    degree: float


class _Problem(NamedTuple):
    """A loss and how its own (params, batch) are put together again; hashable, so that equal ones share compiled programs.

    moves: each leaf's name in params, None if it stays. static: place and value of the leaves that are no arrays. keys: place
    and kind of random keys. copies: of a sample, in the batch of which a mean is its loss; 0 if the loss is of each sample.
    program: a hash of what the loss is traced to, which holds whatever it closes over.
    """

    loss_fn: LossFn
    params_tree: Any
    moves: tuple[str | None, ...]
    static: tuple[tuple[int, Hashable], ...]
    keys: tuple[tuple[int, str], ...]
    data_tree: Any
    copies: int = 0
    program: str = ""

    def together(self, params: Mapping[str, Any], dataset: Dataset) -> Any:
        """What loss_fn returns for all samples at once."""
        kept = dict(self.static) | {int(place): array for place, array in dataset.constants.items()}
        kept |= {place: jax.random.wrap_key_data(kept[place], impl=impl) for place, impl in self.keys}
        leaves = [kept[place] if name is None else params[name] for place, name in enumerate(self.moves)]
        batch = [dataset.samples[str(place)] for place in range(self.data_tree.num_leaves)]
        return self.loss_fn(jax.tree.unflatten(self.params_tree, leaves), jax.tree.unflatten(self.data_tree, batch))

    def alone(self, params: Mapping[str, Any], dataset: Dataset) -> jax.Array:
        """The loss of each sample, (B,), of a loss that returns means."""

        def of_one(sample: dict[str, jax.Array]) -> Any:
            batch = {name: jnp.broadcast_to(x[None], (self.copies, *x.shape)) for name, x in sample.items()}
            return jnp.reshape(self.together(params, Dataset(batch, dataset.constants)), ())

        return jax.vmap(of_one)(dataset.samples)


def wrap(loss_fn: LossFn, params: Any, data: Any, weights: Any = None) -> Wrapped:
    """The problem as the library handles it, checked.

    Args:
      loss_fn: (params, batch) -> the losses of the batch's samples, (B,), or their mean, (). A mean is taken of one sample at a
        time, so that each has a loss of its own.
      params: pytree. Its floating arrays and Python floats move, named by their paths, "layers/0/w"; integers, booleans, random
        keys, functions, running statistics of normalisation and the Python floats of Equinox modules stay as they are.
      data: pytree of arrays whose first axis is the sample, n >= 2; floating ones are taken in the dtype of params.
      weights: of the samples, (n,), not negative: L_n(w) = sum_i weights_i l_i(w) / sum_i weights_i; None = all equal. Samples
        of weight 0 are left out.

    Raises:
      InvalidInput: one of them is not so, a loss or the gradient of their mean at params is not finite, or a sample's loss
        depends on the others of its batch.
    """
    if not callable(loss_fn):
        raise InvalidInput(
            f"loss_fn must be a function (params, batch) -> losses; got {shortened(loss_fn)}. Write the loss as a function."
        )
    leaves = parameter_leaves(params)
    star = {leaf.name: leaf.moves for leaf in leaves if leaf.moves is not None}
    dtype = next(iter(star.values())).dtype
    samples = sample_arrays("data", data, dtype, 2)
    samples |= sample_weights(weights, len(samples["0"]), dtype)
    if WEIGHT in samples:  # what counts nothing is left out: its own loss need not be a number
        samples = {name: array[samples[WEIGHT] > 0] for name, array in samples.items()}
        samples[WEIGHT] /= samples[WEIGHT].mean()
    dataset = Dataset(samples, {str(place): leaf.stays for place, leaf in enumerate(leaves) if leaf.stays is not None})
    problem = _Problem(
        _hashable(_unjitted(loss_fn)),
        jax.tree.structure(params),
        tuple(None if leaf.moves is None else leaf.name for leaf in leaves),
        tuple((place, leaf.static) for place, leaf in enumerate(leaves) if leaf.moves is None and leaf.stays is None),
        tuple((place, leaf.key_impl) for place, leaf in enumerate(leaves) if leaf.key_impl is not None),
        jax.tree.structure(data),
    )
    _check_hashable(problem)
    with jax.enable_x64(dtype == np.float64):
        few = dataset.take(np.random.default_rng(0).permutation(dataset.num_data)[:TRACED])
        _forget_stale(problem, star, few)
        text, is_mean = _traced(problem, star, few)
        _check_settings(problem, leaves, star, few, text)
        copies = 0
        if is_mean:
            copies = fewest_copies(lambda copies: jax.eval_shape(problem._replace(copies=copies).alone, star, few))
        problem = problem._replace(copies=copies, program=hashlib.sha256(text.encode()).hexdigest())
        objective = _objective(problem)
        with _failures_in_words(f"all {dataset.num_data} samples"):
            losses = np.asarray(compiled_losses(objective, star, dataset))
        check_losses(losses, copies > 0)
        with jax.default_matmul_precision("highest"):
            check_gradient(objective, star, dataset)
            check_independence(objective, problem.together if is_mean else None, star, dataset, "f16>" in text)
            degree = loss_degree(objective, star, dataset, losses)
    return Wrapped(objective, star, dataset, losses, degree)


def wrap_like(name: str, data: Any, like: Any, wrapped: Wrapped) -> Dataset:
    """The observable `name`: data for the same loss as those that `wrapped` was made of, `like`, without weights.

    Raises:
      InvalidInput: they are of other arrays.
    """
    samples = sample_arrays(f"the observable {name!r}", data, next(iter(wrapped.params.values())).dtype, 1)
    new, old = ([array.shape for array in of.values()] for of in (samples, unweighted(wrapped.dataset).samples))
    trees: list[Any] = [jax.tree.structure(data), jax.tree.structure(like)]
    if trees[0] != trees[1] or [shape[1:] for shape in new] != [shape[1:] for shape in old]:
        raise InvalidInput(
            f"An observable must be a pytree like data, whose arrays have shapes {old}, of any number of samples; "
            f"got {new} as {name!r}. Pass the same arrays of other samples."
        )
    return Dataset(samples, wrapped.dataset.constants)


def unweighted(dataset: Dataset) -> Dataset:
    """The samples with their own losses."""
    return Dataset({name: array for name, array in dataset.samples.items() if name != WEIGHT}, dataset.constants)


def _unjitted(loss_fn: LossFn) -> LossFn:
    """The function inside one that is jitted, by JAX or Equinox, which would keep what it closed over at its first call."""
    if isinstance(loss_fn, types.MethodType):
        return types.MethodType(_unjitted(loss_fn.__func__), loss_fn.__self__)
    return getattr(loss_fn, "__wrapped__", loss_fn) if hasattr(loss_fn, "lower") else loss_fn


def _hashable(loss_fn: LossFn) -> LossFn:
    """A function in place of a callable object that holds arrays, which has no hash."""
    try:
        hash(loss_fn)
    except TypeError:
        return lambda params, batch: loss_fn(params, batch)
    return loss_fn


@contextlib.contextmanager
def _failures_in_words(batch: str) -> Iterator[None]:
    """Around calls of the user's loss: what it raises, as the rule that it breaks.

    Raises:
      InvalidInput: it raised anything.
    """
    try:
        yield
    except InvalidInput:
        raise
    except Exception as error:
        said = shortened((str(error).strip() or "no message").splitlines()[0])
        raise InvalidInput(
            "loss_fn(params, batch) must be a function that JAX can compile and differentiate, for batches of any number of "
            f"samples; with {batch} it raised {type(error).__name__}: {said}. Use jax.numpy in place of numpy, jnp.where in "
            "place of if, sizes that do not depend on values, and no batch size of its own."
        ) from error


def _forget_stale(problem: _Problem, params: dict[str, np.ndarray], few: Dataset) -> None:
    """Makes JAX forget its programs if the loss, evaluated anew, is not what they say: functions that are jitted, checkpointed
    or looped over inside the loss keep what they closed over at their first call."""
    with contextlib.suppress(Exception):  # of a loss that cannot be evaluated so; the same words for all come later
        program = jax.make_jaxpr(lambda params: problem.together(params, few))(params)
        if _num_steps(program.jaxpr) > MAX_PLAIN_STEPS:
            return
        held = np.asarray(jaxpr_as_fun(program)(*jax.tree.leaves(params))[0], np.float64)
        with jax.disable_jit():
            anew = np.asarray(problem.together(params, few), np.float64)
        if not np.allclose(held, anew, rtol=1e-2, atol=1e-4 * float(np.mean(np.abs(anew))), equal_nan=True):
            jax.clear_caches()


def _num_steps(jaxpr: Any) -> float:
    """Steps of the loops of a program; infinite where their number depends on values."""
    total = 0.0
    for equation in jaxpr.eqns:
        inner = sum(_num_steps(getattr(sub, "jaxpr", sub)) for sub in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr)
                    if _is_jaxpr(sub))  # fmt: skip
        each = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += math.inf if equation.primitive.name == "while" else each * (inner + (each > 1))
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def _check_hashable(problem: _Problem) -> None:
    try:
        hash(problem)
    except TypeError as error:
        raise InvalidInput(
            f"loss_fn, and what is no array in params, must be hashable; got {error}. Pass a function as loss_fn, and let it "
            "close over the rest."
        ) from None


def _traced(problem: _Problem, params: dict[str, np.ndarray], few: Dataset) -> tuple[str, bool]:
    """The program that the loss is now, whatever it was at an earlier call, as text that holds the values of all it closes
    over; and whether the loss is a mean, by its shape.

    Raises:
      InvalidInput: it returns something else.
    """
    with _failures_in_words(f"a batch of {few.num_data}"):
        lowered = jax.jit(lambda params, few: problem.together(params, few)).lower(params, few)
    found = lowered.out_info
    shape = getattr(found, "shape", None)
    if shape not in ((), (few.num_data,)) or not jnp.issubdtype(found.dtype, jnp.floating):
        got = type(found).__name__ if shape is None else f"shape {shape} of {found.dtype}"
        raise InvalidInput(
            "loss_fn(params, batch) must return the losses of the batch's samples, (B,), or their mean, (), as floating "
            f"numbers; of {few.num_data} samples it returned {got}. Return that one array."
        )
    return lowered.as_text(), shape == ()


def _check_settings(problem: _Problem, leaves: list[Leaf], params: dict[str, np.ndarray], few: Dataset, text: str) -> None:
    """Refuses Python floats of Equinox modules that the loss depends on: whether they were trained is not known."""
    settings = {place: leaf for place, leaf in enumerate(leaves) if leaf.is_setting}
    others = {place: 1.5 * leaf.static + 0.1 for place, leaf in settings.items() if isinstance(leaf.static, float)}
    changed = tuple((place, others.get(place, value)) for place, value in problem.static)
    try:
        depends = bool(settings) and _traced(problem._replace(static=changed), params, few)[0] != text
    except Exception:  # of the user's code, which does not bear another number there
        depends = True
    if depends:
        raise InvalidInput(
            "The Python floats of Equinox modules are no parameters for Equinox, and the loss must not depend on them; got "
            f"{listed([f'{leaf.name} = {leaf.static}' for leaf in settings.values()])}. Make those that were trained arrays, "
            "with jnp.asarray, and the others static fields, with eqx.field(static=True)."
        )


@functools.lru_cache(maxsize=64)
def _objective(problem: _Problem) -> Objective:
    """The same object for equal problems, so that another estimate compiles nothing."""
    of_samples = problem.alone if problem.copies else problem.together

    def per_sample_loss(params: Params, dataset: Dataset) -> jax.Array:
        # In the dtype it is called with: the loss at w* is measured in float64 whatever the dtype of the sampling.
        losses = of_samples(params, unweighted(dataset)).astype(jax.tree.leaves(params)[0].dtype)
        return losses * dataset.samples[WEIGHT].astype(losses.dtype) if WEIGHT in dataset.samples else losses

    return Objective(per_sample_loss)
