"""Settings: settings.toml, then `LAMBDA_HAT_*` environment variables, which win over it.

A variable names a setting of `store` or `runtime`, with two underscores between the parts:
LAMBDA_HAT_STORE__URI=s3://bucket/path, LAMBDA_HAT_RUNTIME__PRECISION=float64; tables are JSON
(LAMBDA_HAT_STORE__OPTIONS='{"anon": true}'). Presets and experiments decide what is computed, so only the file sets them.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource
from pydantic_settings.exceptions import SettingsError

from lambda_hat.specs.overrides import NAME
from lambda_hat.specs.spec import InvalidInput, Precision
from lambda_hat.specs.text import shortened

ENV_PREFIX = "LAMBDA_HAT_"
ENV_FILE = "LAMBDA_HAT_SETTINGS"


def _typeable(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"a name must be letters, digits, _ and -, starting with a letter; got {name!r}")
    return name


T = TypeVar("T")
Name = Annotated[str, AfterValidator(_typeable)]


class Section(BaseModel):
    """Base of the tables of the settings: unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Store(Section):
    """Where results are kept."""

    uri: str = Field(default="lambda_hat_store", min_length=1, description="a folder or any fsspec URI")
    options: dict[str, Any] = Field(default={}, description="passed to fsspec")
    cache: str = Field(default="~/.cache/lambda_hat/targets", description="folder of fetched targets; empty = none")


class Runtime(Section):
    """How runs are executed; of these only `precision` is part of a result's identity."""

    precision: Precision = Field(default="float32", description="precision of targets that do not set their own")
    platform: Literal["auto", "cpu", "gpu", "tpu"] = Field(default="auto", description="JAX platform; auto = the best there is")
    compilation_cache: str = Field(default="~/.cache/lambda_hat/jax", description="folder of compiled programs; empty = none")
    progress_seconds: float = Field(default=10.0, ge=0, description="seconds between progress lines; 0 = none")
    engine: Literal["threads", "processes", "dask", "slurm"] = Field(default="threads", description="where tasks run")
    max_workers: int = Field(default=2, ge=1, description="tasks at a time; a standing Dask cluster has its own number")
    dask_address: str = Field(default="", description="of engine dask: the scheduler of a standing cluster, tcp://host:port")
    slurm: dict[str, Any] = Field(default={}, description="of engine slurm: arguments of dask_jobqueue.SLURMCluster")
    task_timeout_seconds: float = Field(default=0.0, ge=0, description="after which a task fails; 0 = no limit")

    @model_validator(mode="after")
    def _engine_has_its_settings(self) -> Self:
        if self.engine == "dask" and not self.dask_address:
            raise ValueError("engine = 'dask' needs dask_address = 'tcp://host:port', the scheduler's; got ''")
        if self.engine == "slurm" and "memory" not in self.slurm:
            raise ValueError(f"engine = 'slurm' needs a table slurm with memory = '4GB' or so, of a worker; got {self.slurm}")
        return self


class Preset(BaseModel):
    """A named table of a spec's fields. They are validated when the preset is used."""

    model_config = ConfigDict(frozen=True, extra="allow")

    description: str = Field(default="", description="one line for the list of presets; not part of the spec")

    @property
    def fields(self) -> dict[str, Any]:
        return self.model_extra or {}


class Presets(Section):
    """Presets by name, one table for each part of a run.

    A target preset names its family, and for each of model, data and training a preset or an inline table.
    A sampler preset, and the preset of a study's task, names its kind.
    """

    model: dict[Name, Preset] = {}
    data: dict[Name, Preset] = {}
    training: dict[Name, Preset] = {}
    target: dict[Name, Preset] = {}
    task: dict[Name, Preset] = {}
    posterior: dict[Name, Preset] = {}
    sampler: dict[Name, Preset] = {}


class Experiment(Section):
    """A union of sweeps, each a list of overrides."""

    description: str = ""
    sweeps: list[list[str]] = Field(min_length=1)


class StudyExperiment(Experiment):
    """A batch-size study: a union of sweeps over trials, and what is made of them."""

    plots: tuple[str, ...] | None = Field(default=None, description="names of plots; not set = all that apply, [] = none")
    keep: bool = Field(default=False, description="whether trained networks are kept as targets")
    curvature: bool = Field(default=False, description="whether the curvature and the noise scale at the end are measured")
    target_loss: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="of critical batch sizes; none = one that most batch sizes reach"
    )


class EntropyExperiment(Experiment):
    """An entropy study: a union of sweeps over updates of policies, and how they are measured and shown."""

    plots: tuple[str, ...] | None = Field(default=None, description="names of plots; not set = all that apply, [] = none")
    grad_chunk_size: int = Field(default=0, ge=0, description="training sequences held together; 0 = as memory allows")
    tf_batch_size: int = Field(default=0, ge=0, description="sequences in a forward pass; 0 = as memory allows")


class Settings(BaseSettings):
    """All settings. The environment wins over arguments; `load_settings` passes the file's content as arguments."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_nested_delimiter="__", nested_model_default_partial_update=True
    )

    store: Store = Store()
    runtime: Runtime = Runtime()
    presets: Presets = Presets()
    experiments: dict[Name, Experiment] = {}
    studies: dict[Name, StudyExperiment] = {}
    entropy: dict[Name, EntropyExperiment] = {}

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        return env_settings, init_settings


def load_settings(path: str | Path | None = None) -> Settings:
    """Settings from `path`, else $LAMBDA_HAT_SETTINGS, else ./settings.toml, else the settings.toml of this checkout.

    Raises:
      InvalidInput: no such file, no TOML, an unknown key or variable, or a value of the wrong type or range.
    """
    file = _find(path)
    _check_environment()
    try:
        return Settings(**TomlConfigSettingsSource(Settings, file)())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file} must be TOML; {error}. Correct the file there.") from None
    except SettingsError as error:
        raise InvalidInput(f"A variable that sets a whole table must be JSON; {error}. Set its fields one by one.") from None
    except ValidationError as error:
        raise explain(error, Settings, lambda path: f"Correct {_origin(path, file)}.") from None


def _find(path: str | Path | None) -> Path:
    named = path or os.environ.get(ENV_FILE)
    places = [Path(named).expanduser()] if named else [Path("settings.toml"), Path(__file__).parents[2] / "settings.toml"]
    for place in places:
        if place.is_file():
            return place
    raise InvalidInput(
        f"The settings must be a file; there is none at {' or '.join(map(str, places))}. "
        f"Give the path of a settings.toml as argument or in {ENV_FILE}."
    )


def _variable(path: str) -> str:
    return ENV_PREFIX + path.replace(".", "__").upper()


def _origin(path: str, file: Path) -> str:
    """Where the setting at `path` was set."""
    return f"the variable {_variable(path)}" if _variable(path) in os.environ else str(file)


def _check_environment() -> None:
    """Refuses variables with the prefix that name no setting: a misspelt one would be ignored."""
    fields = {_variable(f"store.{name}") for name in Store.model_fields} | {
        _variable(f"runtime.{name}") for name in Runtime.model_fields
    }
    known = fields | {ENV_FILE, _variable("store"), _variable("runtime")}
    for name in sorted(os.environ):
        upper = name.upper()
        if upper.startswith(ENV_PREFIX) and upper not in known and not upper.startswith(_variable("store.options.")):
            raise InvalidInput(
                f"{name} names no setting that the environment sets. {nearest(upper, known)} Otherwise unset it."
            )


#: What other programs and papers call our fields.
OTHER_NAMES = {
    "localization": ("localisation", "gamma", "elasticity"),
    "nbeta": ("beta", "n_beta", "temperature", "inverse_temperature"),
    "step_size": ("lr", "learning_rate", "epsilon", "eps", "stepsize"),
    "num_draws": ("draws", "num_samples", "samples", "n_draws", "n_samples"),
    "num_chains": ("chains", "n_chains"),
    "num_burnin_steps": ("burnin", "burn_in", "num_burnin", "warmup", "num_warmup", "tune"),
    "num_steps_bw_draws": ("thinning", "thin", "num_steps_between_draws"),
    "seed": ("rng_key", "random_state", "init_seed", "key", "rng", "random_seed"),
    "weights": ("sample_weight", "sample_weights", "class_weights"),
    "parameters": ("mask", "weight_restrictions", "param_names"),
    "richness": ("gamma",),
    "n_data": ("num_data", "num_samples", "n"),
    "target": ("target_id",),
    "inputs": ("x_dist",),
    "noise": ("noise_model",),
    "skip": ("skip_connections",),
    "preconditioner": ("precond",),
}


def nearest(name: str, names: Iterable[str]) -> str:
    """The remedy for an unknown name: what it is called here, the nearest known one, or all of them; of very many, their first
    parts."""
    names = sorted(names)
    last = name.rpartition(".")[2].lower()
    ours = [known for known in names if last in OTHER_NAMES.get(known.rpartition(".")[2], ())]
    if ours:
        known = min(ours, key=lambda known: known.rpartition(".")[0] != name.rpartition(".")[0])
        meaning = ", n times the inverse temperature" if known.endswith("nbeta") else ""
        return f"Did you mean {known!r}{meaning}?"
    close = difflib.get_close_matches(name.lower(), lowered := {known.lower(): known for known in names}, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {lowered[close[0]]!r}?"
    if len(names) > 20:
        return f"Known names begin with {', '.join(sorted({name.split('.')[0] for name in names}))}."
    return f"Known: {', '.join(names)}." if names else "There are none."


def lookup(table: Mapping[str, T], what: str, name: Any) -> T:
    """table[name].

    Raises:
      InvalidInput: there is no such `what`.
    """
    if not isinstance(name, str) or name not in table:
        raise InvalidInput(f"The {what} must be a known name; got {name!r}. {nearest(str(name), table)} --list shows all.")
    return table[name]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models an annotation is of, alone or as members of a union; not those in a list."""
    members = () if get_origin(annotation) is tuple else (annotation, *get_args(annotation))
    return [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]


def explain(error: ValidationError, model: type[BaseModel], remedy: Callable[[str], str], prefix: str = "") -> InvalidInput:
    """The error in words: for each wrong field its path under `prefix`, the rule, the value received and the remedy.

    `remedy` maps a field's path (without the prefix) to a sentence.
    """
    rules: dict[str, list[str]] = {}
    remedies: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        path, names = _resolve(model, problem["loc"])
        where = ".".join(part for part in (prefix, path) if part)
        remedies[where] = remedy(path)
        if problem["type"] == "extra_forbidden":
            rule, remedies[where] = " is no field that exists", nearest(str(problem["loc"][-1]), names)
        elif problem["type"] == "missing":
            rule = " must be given"
        elif problem["type"] == "union_tag_not_found":
            rule = f" must name its {problem['ctx']['discriminator']}"
        elif problem["type"] == "union_tag_invalid":
            rule = " must have {discriminator} one of {expected_tags}; got ".format(**problem["ctx"])
            rule += shortened(problem["ctx"]["tag"])
        elif problem["type"] == "value_error":
            # Our own validators say what they received.
            rule = f": {problem['ctx']['error']}"
        else:
            rule = f" {_rule(problem['msg'])}; got {shortened(problem['input'])}"
        rules.setdefault(where, []).append(rule)
    return InvalidInput("\n".join(f"{where}{' or'.join(rules[where])}. {remedies[where]}" for where in rules))


def _rule(message: str) -> str:
    """pydantic's "Input should be ..." as "must be ...", in the words of TOML."""
    rule = re.sub(r"(an object|a valid dictionary.*)$", "a table of fields", message.replace("should", "must"))
    rule = re.sub(r" after validation, not \d+", "", rule).replace("Invalid JSON:", "must be JSON;")
    return rule[max(rule.find("must"), 0) :]


def _resolve(annotation: Any, location: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The location as the user writes it, without the parts pydantic adds for members of unions, and the names valid there."""
    path = ""
    names: list[str] = []
    for part in location:
        models = models_in(annotation)
        if part == "[key]":
            continue
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        elif isinstance(part, int):
            annotation = get_args(annotation)[0]
        elif len(models) == 1:
            names = list(models[0].model_fields)
            annotation = models[0].model_fields[part].annotation if part in names else None
        else:
            # A member of a union: of several models, the one whose discriminator has this value.
            tagged = (model for model in models if any(field.default == part for field in model.model_fields.values()))
            annotation = next(tagged, None)
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path, names
