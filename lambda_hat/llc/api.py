"""The LLC of a network in memory, in one call: `import lambda_hat as lh; lh.estimate_llc(loss_fn, params, data)`."""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from matplotlib.figure import Figure
from pydantic import ValidationError
from tqdm import tqdm

from lambda_hat.compute.chunks import Progress
from lambda_hat.llc.diagnostics import Diagnosis, diagnose
from lambda_hat.llc.estimates import to_arviz
from lambda_hat.llc.plan import SAMPLER
from lambda_hat.llc.plots import RUN_PLOTS, TARGET_PLOTS
from lambda_hat.llc.preflight import check_chains, usable_memory
from lambda_hat.llc.run import RunSpec, batches
from lambda_hat.llc.sampling import Run, lane_width, sample_runs
from lambda_hat.llc.trace import Trace
from lambda_hat.samplers.kinds import SamplerSpec
from lambda_hat.specs.settings import Runtime, explain, nearest
from lambda_hat.specs.spec import InvalidInput
from lambda_hat.specs.text import with_error
from lambda_hat.targets.selection import num_selected, select
from lambda_hat.targets.target import OBSERVABLE_SIZE, TRAIN, DataSpec, TargetSpec, mean_loss_float64
from lambda_hat.targets.wrap import LossFn, Wrapped, unweighted, wrap, wrap_like

T = TypeVar("T")

#: The arguments of `estimate_llc` but those that every call has.
ARGUMENTS = ("weights", "nbeta", "localization", "metric", "parameters", "observables", "progress")

#: What the library's fields are here, in what it says of them.
OWN_WORDS = {
    r"\b(posterior|sampler)\.": "",
    r"set target\.precision=float64": "give params in float64",
    r"data\.n_data": "the number of samples",
}


class InMemorySpec(TargetSpec):
    """A network that exists only in this process; its id is of its parameters and data, not of how they were made."""

    family: Literal["in_memory"] = "in_memory"
    data: DataSpec
    content: str
    observed: tuple[str, ...] = ()

    @property
    def observable_names(self) -> tuple[str, ...]:
        return self.observed


class InMemoryRun(RunSpec):
    """A run on such a network."""

    target: InMemorySpec  # type: ignore[assignment]  # no member of the union of targets that can be built from their specs


@dataclass(frozen=True)
class LLCEstimate:
    """An estimate of the local learning coefficient.

    diagnosis: every number and every finding, see `llc.diagnostics.Diagnosis`. draws: what was recorded, see
    `llc.sampling.Trace`. spec: what was run.
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
        """What to change, in the arguments of `estimate_llc`; empty where nothing is wrong."""
        return _own_words(self.diagnosis.remedy)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not wrong and should be known: how much of the llc the prior holds, an unusual temperature."""
        return tuple(map(_own_words, self.diagnosis.notes))

    @property
    def trace(self) -> Any:
        """The draws for ArviZ: InferenceData (ArviZ 0.x) or DataTree (1.x)."""
        return to_arviz(self.draws, self.spec.nbeta)

    def summary(self) -> dict[str, Any]:
        """What matters most, a row of a table: `pandas.DataFrame([one.summary(), another.summary()])`."""
        found = self.diagnosis
        return {
            "sampler": self.spec.sampler.kind, "nbeta": self.spec.nbeta, "llc": self.llc, "mcse": self.mcse,
            "ess": found.ess_bulk, "rhat": found.rhat, "seconds": found.seconds, "verdict": self.verdict, "remedy": self.remedy,
        }  # fmt: skip

    def plot(self, name: str = "trace") -> Figure:
        """One of `llc.plots.RUN_PLOTS`: trace, running_llc, rank, energy, llc_by_dataset, ...

        Raises:
          InvalidInput: there is no such plot, or this run did not record what it shows.
        """
        return _plot(RUN_PLOTS, name, self.spec, self.draws, self.diagnosis)

    def __repr__(self) -> str:
        found = self.diagnosis
        ess = "none" if found.ess_bulk is None else f"{found.ess_bulk:.0f}"
        llc = f"llc {with_error(found.llc, found.mcse)} by {self.spec.sampler.kind}"
        said = "; ".join(part for part in (f"verdict: {self.verdict}", self.remedy, *self.notes) if part)
        return f"LLCEstimate({llc}, ESS {ess}, {found.seconds:.1f} s, {said})"


def estimate_llc(
    loss_fn: LossFn,
    params: Any,
    data: Any,
    sampler: str | SamplerSpec = "sgld",
    *,
    weights: Any = None,
    nbeta: float | None = None,
    localization: float = 1.0,
    metric: Literal["relative", "euclidean"] = "relative",
    parameters: str | Sequence[str] = "*",
    observables: Mapping[str, Any] | None = None,
    progress: bool = True,
    **fields: Any,
) -> LLCEstimate:
    """Estimates the local learning coefficient of a trained network at its parameters.

    llc = nbeta (E[L_n(w)] - L_n(w*)), w distributed as exp(-nbeta L_n(w) - localization/2 |u|^2), w = w* + scale * u.
    A second call with the same function compiles nothing, unless what the function closes over has changed: pass one that is
    defined once, not a new lambda each time.

    Args:
      loss_fn: (params, batch) -> the losses of the batch's samples, (B,); or their mean, (), which is then taken of one sample
        at a time and may be slower. A sample's loss must not depend on the others of its batch.
      params: w*, any pytree (Haiku, Flax, Equinox, plain dicts). Its floating arrays move, all float32 or all float64, in which
        the sampling is done, and Python floats in dicts, lists and tuples with them; all else stays, also the running
        statistics of batch normalisation.
      data: any pytree of arrays whose first axis is the sample, such as (x, y): all the training data.
      sampler: "sgld", "sghmc", "sgnht", "mala", "hmc", "nuts", "mclmc", "adjusted_mclmc", "vi", "smc", or a spec of one.
      weights: what the samples count, (n,), such as the numbers of tokens of rows or class weights: L_n(w) is then
        sum_i weights_i l_i(w) / sum_i weights_i, and a loss_fn that returns a mean may weight it so; samples of weight 0
        are left out. None = all the same.
      nbeta: n times the inverse temperature; None = n / log n.
      localization, metric, parameters: strength of the pull towards w*, the units it is measured in, and patterns of the names
        of the parameters that move, like "layers/0/*"; see `samplers.posterior.PosteriorSpec`.
      observables: named data like `data`, whose samples' losses are recorded at every draw. With any mapping, an empty one
        included, comes "train", up to 100 of the training samples, unless it has a "train" of its own.
      progress: show a progress bar.
      fields: of the sampler: seed, num_chains, num_draws, step_size, ...; see `lambda_hat.samplers.kinds`.

    Raises:
      InvalidInput: an argument breaks a rule; nothing has been sampled.
    """
    setting = {
        "sampler": sampler, "nbeta": nbeta, "localization": localization, "metric": metric, "parameters": parameters,
    }  # fmt: skip
    return estimate_llcs(
        loss_fn, params, data, [setting | fields], weights=weights, observables=observables, progress=progress
    )[0]


def estimate_llcs(
    loss_fn: LossFn,
    params: Any,
    data: Any,
    settings: Sequence[Mapping[str, Any]],
    *,
    weights: Any = None,
    observables: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> list[LLCEstimate]:
    """Estimates by several settings, such as `[{"nbeta": 10}, {"nbeta": 20}]`; those that differ in numbers and seeds alone are
    sampled together, in one program.

    Args:
      settings: of each estimate the arguments of `estimate_llc` (sampler, nbeta, localization, metric, parameters, and the
        sampler's fields); what is left out has its default. The other arguments are those of `estimate_llc`.

    Raises:
      InvalidInput: as `estimate_llc`.
    """
    if observables is not None and not isinstance(observables, Mapping):
        raise InvalidInput(
            f"observables must be a mapping of names to data; got {type(observables).__name__}. Pass for example "
            "{'test': (x_test, y_test)}; {} follows training samples."
        )
    wrapped = wrap(loss_fn, params, data, weights)
    followed = {name: wrap_like(name, part, data, wrapped) for name, part in (observables or {}).items()}
    names = () if observables is None else tuple(dict.fromkeys([TRAIN, *followed]))
    if observables is not None:
        followed.setdefault(TRAIN, unweighted(wrapped.dataset.spread(OBSERVABLE_SIZE)))
    target = InMemorySpec(
        precision="float64" if wrapped.losses.dtype == np.float64 else "float32",
        data=DataSpec(n_data=wrapped.dataset.num_data), content=_content(wrapped),
        observed=tuple(name for name in followed if name != TRAIN),
    )  # fmt: skip
    specs = [_run_spec(target, observables=names, **setting) for setting in settings]
    nums_params = [_num_params(spec, wrapped) for spec in specs]
    for spec, count in zip(specs, nums_params, strict=True):
        _in_own_words(check_chains, spec, count, usable_memory(Runtime()))
    for doubt in dict.fromkeys(spec.posterior.doubt(wrapped.dataset.num_data) for spec in specs):
        if doubt:
            warnings.warn(_own_words(doubt), stacklevel=3)
    init_loss = _init_loss(wrapped)
    estimates: dict[int, LLCEstimate] = {}
    for batch in batches(specs):
        width = lane_width(len(batch), wrapped.params, specs[batch[0]].sampler.num_chains)
        for indices in (batch[start : start + width] for start in range(0, len(batch), width)):
            with _bar(progress) as report:
                traces = sample_runs(
                    wrapped.objective, wrapped.params, wrapped.dataset,
                    [Run(specs[index].posterior, specs[index].sampler) for index in indices],
                    metric=specs[batch[0]].metric, observables=followed, lanes=(range(len(indices)), width), progress=report,
                )  # fmt: skip
            for index, trace in zip(indices, traces, strict=True):
                metrics = {
                    "init_loss": init_loss, "num_params": nums_params[index], "num_data": wrapped.dataset.num_data,
                    "loss_degree": wrapped.degree,
                }  # fmt: skip
                estimates[index] = LLCEstimate(diagnose(specs[index], trace, metrics), trace, specs[index])
    return [estimates[index] for index in range(len(specs))]


def plot_estimates(estimates: Sequence[LLCEstimate], name: str = "llc_convergence") -> Figure:
    """One of `llc.plots.TARGET_PLOTS`, of several estimates on one network: llc_convergence, temperature (of several
    nbeta), calibration (of a grid of step_size and localization or nbeta).

    Raises:
      InvalidInput: there is no such plot, or these estimates do not make one.
    """
    return _plot(TARGET_PLOTS, name, [(estimate.spec, estimate.draws, estimate.diagnosis) for estimate in estimates])


def _plot(plots: Mapping[str, Callable[..., Figure | None]], name: str, *content: Any) -> Figure:
    if name not in plots:
        raise InvalidInput(f"A plot must have a known name; got {name!r}. {nearest(name, plots)}")
    figure = plots[name](*content)
    if figure is None:
        raise InvalidInput(
            f"A plot must find what it shows; there is nothing for {name!r} here. Plots of datasets need observables, a "
            "calibration map or a temperature curve estimates with several settings."
        )
    return figure


def _run_spec(
    target: InMemorySpec,
    sampler: str | SamplerSpec = "sgld",
    *,
    nbeta: float | None = None,
    localization: float = 1.0,
    metric: str = "relative",
    parameters: str | Sequence[str] = "*",
    observables: tuple[str, ...],
    **fields: Any,
) -> InMemoryRun:
    """The run of one setting.

    Raises:
      InvalidInput: a field is unknown, or its value breaks a rule.
    """
    posterior = {
        "nbeta": nbeta, "localization": localization, "metric": metric,
        "parameters": (parameters,) if isinstance(parameters, str) else parameters,
    }  # fmt: skip
    given = sampler.model_dump() if isinstance(sampler, SamplerSpec) else {"kind": sampler}
    kind = SAMPLER.classes.get(str(given["kind"]))
    if kind is not None:
        known = {*ARGUMENTS, *kind.model_fields} - {"kind"}
        for name in fields:
            if name not in known:
                raise InvalidInput(
                    f"{name} is no argument of estimate_llc and no field of {given['kind']}. {nearest(name, known)}"
                )
    if kind is not None and "batch_size" in kind.model_fields:
        given = {"batch_size": min(target.num_data, kind.model_fields["batch_size"].default)} | given
    content = {"target": target, "posterior": posterior, "sampler": given | fields | {"observables": observables}}
    try:
        return InMemoryRun.model_validate(content)
    except ValidationError as error:
        raise InvalidInput(_own_words(str(explain(error, InMemoryRun, lambda _: "Correct the argument.")))) from None


def _num_params(spec: RunSpec, wrapped: Wrapped) -> int:
    """How many move.

    Raises:
      InvalidInput: the patterns of parameters name none.
    """
    return num_selected(wrapped.params, _in_own_words(select, wrapped.params, spec.posterior.parameters))


def _in_own_words(check: Callable[..., T], *arguments: Any) -> T:
    """What the check returns; its refusals in the words of this interface."""
    try:
        return check(*arguments)
    except InvalidInput as error:
        raise InvalidInput(_own_words(str(error))) from None


def _init_loss(wrapped: Wrapped) -> float:
    """L_n(w*), in float64 unless the loss has float32 written into it."""
    try:
        return mean_loss_float64(wrapped.objective, wrapped.params, wrapped.dataset)
    except Exception:  # what JAX or the user's own code raises where dtypes do not fit
        return float(np.mean(wrapped.losses, dtype=np.float64))


def _own_words(text: str) -> str:
    for pattern, words in OWN_WORDS.items():
        text = re.sub(pattern, words, text)
    return text


def _content(wrapped: Wrapped) -> str:
    """A hash of the parameters and the data."""
    content = hashlib.sha256()
    for array in [*wrapped.params.values(), *wrapped.dataset.samples.values(), *wrapped.dataset.constants.values()]:
        content.update(f"{array.dtype}{array.shape}".encode())
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


@contextlib.contextmanager
def _bar(progress: bool) -> Iterator[Progress]:
    """A bar that terminals and notebooks show alike, without widgets."""
    with tqdm(unit=" draws", leave=False, disable=not progress) as bar:

        def report(done: int, total: int, unit: str, note: str) -> None:
            bar.total = total
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield report
