"""The LLC of a network in memory, in one call: `import lambda_hat as lh; lh.estimate_llc(loss_fn, params, data)`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import ValidationError

from lambda_hat.arrays import pack_arrays
from lambda_hat.diagnostics import Diagnosis, diagnose
from lambda_hat.llc import to_arviz
from lambda_hat.plan import CLASSES
from lambda_hat.plots import RUN_PLOTS
from lambda_hat.posterior import Metric, PosteriorSpec, tensor_names
from lambda_hat.run import RunSpec
from lambda_hat.samplers import SamplerSpec
from lambda_hat.sampling import Trace, sample
from lambda_hat.settings import explain, lookup
from lambda_hat.spec import InvalidInput
from lambda_hat.target import Dataset, DataSpec, Objective, Params, TargetSpec, mean_loss_float64, num_params

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LossFn = Callable[[Any, Any], jax.Array]


class InMemorySpec(TargetSpec):
    """A network that exists only in this process; its id is of its parameters and data, not of how they were made."""

    family: Literal["in_memory"] = "in_memory"
    data: DataSpec
    content: str


@dataclass(frozen=True)
class LLCEstimate:
    """An estimate of the local learning coefficient.

    diagnosis: every number and every finding, see `lambda_hat.diagnostics.Diagnosis`. draws: what was recorded, see
    `lambda_hat.sampling.Trace`. spec: what was run.
    """

    diagnosis: Diagnosis
    draws: Trace
    spec: RunSpec

    @property
    def llc(self) -> float:
        """The estimate, nbeta (E[L_n(w)] - L_n(w*)), dimensionless; NaN where every chain diverged."""
        return float("nan") if self.diagnosis.llc is None else self.diagnosis.llc

    @property
    def mcse(self) -> float:
        """Its Monte Carlo standard error; NaN where the draws give none."""
        return float("nan") if self.diagnosis.mcse is None else self.diagnosis.mcse

    @property
    def verdict(self) -> str:
        """ "ok", or the worst of what is wrong."""
        return self.diagnosis.verdict

    @property
    def remedy(self) -> str:
        """What to change, in words; empty where nothing is wrong."""
        return self.diagnosis.remedy

    @property
    def trace(self) -> Any:
        """The draws for ArviZ: InferenceData (ArviZ 0.x) or DataTree (1.x)."""
        return to_arviz(self.draws, self.spec.nbeta)

    def plot(self, name: str = "trace") -> Figure:
        """A plot of the run: trace, rank, running_llc, energy, ...

        Raises:
          InvalidInput: there is no such plot, or this run did not record what it shows.
        """
        figure = lookup(RUN_PLOTS, "plot", name)(self.spec, self.draws, self.diagnosis)
        if figure is None:
            raise InvalidInput(f"The plot {name!r} shows what a run with sampler.observables records; this one recorded none.")
        return figure

    def __repr__(self) -> str:
        kind = self.spec.sampler.kind
        text = f"LLCEstimate(llc {with_error(self.diagnosis.llc, self.diagnosis.mcse)} by {kind}, verdict: {self.verdict}"
        return text + (f"; {self.remedy})" if self.remedy else ")")


def estimate_llc(
    loss_fn: LossFn,
    params: Params,
    data: Any,
    sampler: str | SamplerSpec = "sgld",
    *,
    nbeta: float | None = None,
    localization: float = 1.0,
    metric: Metric = "relative",
    parameters: Sequence[str] = ("*",),
    observables: Mapping[str, Any] | None = None,
    progress: bool = True,
    **fields: Any,
) -> LLCEstimate:
    """Estimates the local learning coefficient of a trained network at its parameters.

    llc = nbeta (E[L_n(w)] - L_n(w*)), w distributed as exp(-nbeta L_n(w) - localization/2 |u|^2), w = w* + scale * u.

    Args:
      loss_fn: (params, batch) -> the loss of each sample of the batch, (B,); or their mean, (), which costs more: it is then
        called for each sample alone.
      params: w*, any pytree (Haiku, Flax, Equinox, plain dicts). Its floating arrays move, all of one dtype; the rest stays.
      data: any pytree of arrays whose first axis is the sample, such as (x, y); all the training data.
      sampler: a kind ("sgld", "sghmc", "sgnht", "mala", "hmc", "nuts", "mclmc", "adjusted_mclmc", "vi", "smc") or a spec.
      nbeta: n times the inverse temperature; None = n / log n.
      localization, metric, parameters: strength of the pull towards w*, the units it is measured in, and the parameters that move;
        see `lambda_hat.posterior.PosteriorSpec`.
      observables: named data like `data`, whose samples' losses are recorded at every draw.
      progress: show a progress bar.
      fields: of the sampler's spec: seed, num_chains, num_draws, step_size, ...

    Raises:
      InvalidInput: an argument breaks a rule; nothing has been computed.
    """
    objective, params_star, dataset = _problem(loss_fn, params, data)
    datasets = {name: _dataset(part, dataset, name) for name, part in (observables or {}).items()}
    spec = RunSpec.model_construct(
        target=InMemorySpec(
            precision=jax.tree.leaves(params_star)[0].dtype.name, data=DataSpec(n_data=dataset.num_data),
            content=hashlib.sha256(pack_arrays(params_star)).hexdigest(),
        ),
        posterior=_posterior(nbeta, localization, metric, parameters),
        sampler=_sampler(sampler, fields, dataset.num_data, tuple(datasets)),
    )  # fmt: skip
    spec._parts_fit()
    run = functools.partial(
        sample, objective, params_star, dataset, spec.posterior, spec.sampler, metric=metric, observables=datasets
    )
    trace = _with_progress_bar(run) if progress else run()
    metrics = {
        "init_loss": mean_loss_float64(objective, params_star, dataset),
        "num_params": num_params(params_star),
        "num_data": dataset.num_data,
    }
    return LLCEstimate(diagnose(spec, trace, metrics), trace, spec)


def _problem(loss_fn: LossFn, params: Params, data: Any) -> tuple[Objective, dict[str, np.ndarray], Dataset]:
    """The loss, the parameters that move and the data, as the library handles them: dicts of arrays by name."""
    leaves, params_tree = jax.tree.flatten(params)
    names = tensor_names(params)
    moves = [_is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    star = {name: np.asarray(leaf) for name, leaf, moving in zip(names, leaves, moves, strict=True) if moving}
    dtypes = sorted({leaf.dtype.name for leaf in star.values()})
    if dtypes not in (["float32"], ["float64"]):
        raise InvalidInput(
            f"The floating arrays of params must all be float32, or all float64; got {', '.join(dtypes) or 'none'}. "
            "Convert them with jax.tree.map."
        )
    bad = [name for name, leaf in star.items() if not np.isfinite(leaf).all()]
    if bad:
        raise InvalidInput(f"params must be finite; got NaN or infinity in {', '.join(bad)}: train with a lower learning rate.")
    stays = {str(place): np.asarray(leaf) for place, leaf in enumerate(leaves) if not moves[place] and _is_array(leaf)}
    static = tuple((place, leaf) for place, leaf in enumerate(leaves) if not _is_array(leaf))
    places = tuple(name if moving else None for name, moving in zip(names, moves, strict=True))
    arrays, data_tree = jax.tree.flatten(data)
    if not arrays or not all(_is_array(array) and np.ndim(array) > 0 for array in arrays):
        raise InvalidInput("data must be a pytree of arrays whose first axis is the sample; got one without: pass (x, y).")
    lengths = {array.shape[0] for array in arrays}
    if len(lengths) > 1 or min(lengths) < 2:
        raise InvalidInput(f"All arrays of data must have one first axis, of at least 2 samples; got {sorted(lengths)}.")
    samples = {str(place): np.asarray(array) for place, array in enumerate(arrays)}
    dataset = Dataset(samples, stays)
    shape = _loss_shape(loss_fn, params_tree, places, static, data_tree, star, dataset)
    objective = _objective(loss_fn, params_tree, places, static, data_tree, shape == ())
    return objective, star, dataset


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | np.generic | jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _assemble(
    params_tree: Any, places: tuple[str | None, ...], static: tuple[tuple[int, Any], ...], data_tree: Any,
    params: Params, dataset: Dataset,
) -> tuple[Any, Any]:  # fmt: skip
    """The loss function's own (params, batch)."""
    still = dict(static)
    leaves = [
        params[name] if name is not None else still.get(place, dataset.constants.get(str(place)))
        for place, name in enumerate(places)
    ]
    batch = [dataset.samples[str(place)] for place in range(len(dataset.samples))]
    return jax.tree.unflatten(params_tree, leaves), jax.tree.unflatten(data_tree, batch)


def _loss_shape(
    loss_fn: LossFn, params_tree: Any, places: Any, static: Any, data_tree: Any, params: Params, dataset: Dataset
) -> tuple[int, ...]:
    """() or (B,).

    Raises:
      InvalidInput: it is another.
    """
    few = Dataset({name: array[:2] for name, array in dataset.samples.items()}, dataset.constants)
    with jax.enable_x64(jax.tree.leaves(params)[0].dtype == np.float64):
        out = jax.eval_shape(lambda p, d: loss_fn(*_assemble(params_tree, places, static, data_tree, p, d)), params, few)
    shape = getattr(out, "shape", None)
    if shape not in ((), (2,)):
        raise InvalidInput(
            "loss_fn(params, batch) must return the loss of each sample, (B,), or their mean, (); "
            f"for a batch of 2 it returned {shape if shape is not None else type(out).__name__}."
        )
    return shape


@functools.lru_cache(maxsize=64)
def _objective(loss_fn: LossFn, params_tree: Any, places: Any, static: Any, data_tree: Any, is_mean: bool) -> Objective:
    """Cached, so that another estimate of the same loss compiles nothing."""

    def losses(params: Params, dataset: Dataset) -> jax.Array:
        return loss_fn(*_assemble(params_tree, places, static, data_tree, params, dataset))

    if not is_mean:
        return Objective(losses)

    def of_one(params: Params, sample: dict[str, jax.Array], constants: dict[str, jax.Array]) -> jax.Array:
        return losses(params, Dataset({name: array[None] for name, array in sample.items()}, constants))

    return Objective(lambda params, dataset: jax.vmap(of_one, (None, 0, None))(params, dataset.samples, dataset.constants))


def _dataset(data: Any, like: Dataset, name: str) -> Dataset:
    arrays = [np.asarray(array) for array in jax.tree.leaves(data)]
    shapes = [array.shape[1:] for array in arrays], [array.shape[1:] for array in like.samples.values()]
    if shapes[0] != shapes[1] or len({len(array) for array in arrays}) != 1:
        raise InvalidInput(
            f"An observable must be like data, with shapes (m, ...) and {shapes[1]} after m; got {name!r}: {shapes[0]}."
        )
    return Dataset({str(place): array for place, array in enumerate(arrays)}, like.constants)


def _posterior(nbeta: float | None, localization: float, metric: Metric, parameters: Sequence[str]) -> PosteriorSpec:
    if isinstance(parameters, str):
        parameters = (parameters,)
    fields = {"nbeta": nbeta, "localization": localization, "metric": metric, "parameters": tuple(parameters)}
    return _checked(PosteriorSpec, fields, "posterior")


def _sampler(sampler: str | SamplerSpec, fields: dict[str, Any], num_data: int, observables: tuple[str, ...]) -> SamplerSpec:
    if isinstance(sampler, SamplerSpec):
        return _checked(
            type(sampler), sampler.model_dump() | fields | {"observables": sampler.observables + observables}, "sampler"
        )
    cls = lookup(CLASSES["sampler"], "sampler", sampler)
    if "batch_size" in cls.model_fields:
        fields = {"batch_size": min(num_data, cls.model_fields["batch_size"].default)} | fields
    return _checked(cls, {"observables": observables} | fields, "sampler")


def _checked(cls: type[Any], fields: dict[str, Any], where: str) -> Any:
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise explain(error, cls, lambda _: "Correct the argument.", where) from None


def _with_progress_bar(run: Callable[..., Trace]) -> Trace:
    from rich.progress import Progress as Bar

    with Bar(transient=True) as bar:
        task = bar.add_task("sampling", total=None)

        def report(done: int, total: int, unit: str, note: str) -> None:
            bar.update(task, completed=done, total=total, description=note)

        return run(progress=report)
