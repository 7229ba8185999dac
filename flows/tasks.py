"""The tasks of the corridor: target, draws, diagnosis, comparison. Each makes or finds an artifact, and is cached on its id."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.schemas import TaskRun
from prefect.states import State
from prefect.task_engine import TaskRunTimeoutError
from prefect.tasks import exponential_backoff

from flows.ends import Stop
from flows.progress import log_progress
from lambda_hat.batch_size import artifacts as studies
from lambda_hat.compute.runtime import configure
from lambda_hat.entropy import artifacts as policies
from lambda_hat.entropy.spec import EntropySpec
from lambda_hat.llc import artifacts
from lambda_hat.llc.run import RunSpec
from lambda_hat.specs.settings import Settings, load_settings
from lambda_hat.store.manifest import Manifest, StoreUnavailable
from lambda_hat.store.store import Store
from lambda_hat.targets.policies.spec import PolicySpec
from lambda_hat.targets.trials.spec import TrialSpec

#: Names of a store and a settings file, None for the default ones. A task is told no more, so no credential is recorded.
Place = dict[str, str | None]


def open_place(place: Place) -> tuple[Settings, Store]:
    """The settings and the store of a place."""
    settings = load_settings(place["settings_file"])
    uri = settings.store.uri if place["store_uri"] is None else place["store_uri"]
    return settings, Store(uri, settings.store.options, settings.store.cache)


def begin(store_uri: str, settings_file: str) -> tuple[Settings, Store, Place]:
    """The settings and the store that a flow's parameters name, and their place for its tasks, in whatever folder they run."""
    if Stop.current is not None:
        Stop.current.listen()
    settings, store = open_place({"store_uri": store_uri or None, "settings_file": settings_file or None})
    configure(settings.runtime, computes=settings.runtime.engine == "threads")
    file = str(Path(settings_file).absolute()) if settings_file else None
    return settings, store, {"store_uri": store.uri, "settings_file": file}


def _enter(place: Place) -> tuple[Settings, Store]:
    """The settings and the store of a task, whose process may be a worker's."""
    settings, store = open_place(place)
    configure(settings.runtime)
    return settings, store


def _key(context: Any, parameters: dict[str, Any]) -> str:
    """A result belongs to the artifact it names and the store that holds it, whichever flow run made it."""
    where = hashlib.sha256(parameters["place"]["store_uri"].encode()).hexdigest()[:16]
    return f"{context.task.name}-{parameters['artifact_id']}-{where}"


def worth_retrying(task: Any, task_run: TaskRun, state: State) -> bool:
    """Whether the same call may succeed later: after errors of storage and network, not after those of input or code."""
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionError, HTTPClientError

    error: Any = state.data
    if isinstance(error, StoreUnavailable):
        error = error.__cause__
    lasting = FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, TaskRunTimeoutError
    return isinstance(error, OSError | ClientError | ConnectionError | HTTPClientError) and not isinstance(error, lasting)


#: A task that makes the artifact named by its parameter `artifact_id` in the store at its parameter `place`. Its result, a
#: small JSON reference, is cached on that id; submit it with `refresh_cache=not store.exists(...)`, so that the cached
#: result counts only while the artifact exists. Errors of storage and network are tried again for half a minute.
artifact_task: Any = functools.partial(
    task, cache_policy=CacheKeyFnPolicy(cache_key_fn=_key), persist_result=True, result_serializer="json",
    retries=4, retry_delay_seconds=exponential_backoff(2), retry_jitter_factor=0.3, retry_condition_fn=worth_retrying,
)  # fmt: skip


@artifact_task(name="build-target", task_run_name="build {label}")
def build_target(artifact_id: str, label: str, spec: dict[str, Any], place: Place) -> dict[str, Any]:
    settings, store = _enter(place)
    return artifacts.build_target(RunSpec.from_dict(spec).target, store, log_progress(settings)).summary


@artifact_task(name="sample", task_run_name="sample {label}")
def sample(artifact_id: str, label: str, specs: list[dict[str, Any]], place: Place) -> list[dict[str, Any]]:
    """A batch: runs that one program can sample together."""
    settings, store = _enter(place)
    manifests = artifacts.sample_batch([RunSpec.from_dict(spec) for spec in specs], store, log_progress(settings))
    return [manifest.summary for manifest in manifests]


@artifact_task(name="diagnose", task_run_name="diagnose {label}")
def diagnose(artifact_id: str, label: str, spec: dict[str, Any], place: Place) -> dict[str, Any]:
    _, store = _enter(place)
    return artifacts.diagnose_run(RunSpec.from_dict(spec), store).summary


@artifact_task(name="train", task_run_name="train {label}")
def train(artifact_id: str, label: str, specs: list[dict[str, Any]], keep: bool, place: Place) -> dict[str, Any]:
    """Trials that one program can train together."""
    settings, store = _enter(place)
    return studies.train_batch([TrialSpec.from_dict(spec) for spec in specs], store, keep, log_progress(settings)).summary


@artifact_task(name="measure", task_run_name="measure {label}")
def measure(artifact_id: str, label: str, spec: dict[str, Any], curvature: bool, place: Place) -> dict[str, Any]:
    """A trial's network as a target, and its curvature if asked for."""
    settings, store = _enter(place)
    made = artifacts.build_target(TrialSpec.from_dict(spec), store, log_progress(settings))
    return studies.measure_curvature(artifact_id, store).summary if curvature else made.summary


@artifact_task(name="measure-update", task_run_name="measure {label}")
def measure_update(artifact_id: str, label: str, spec: dict[str, Any], chunks: tuple[int, int], place: Place) -> dict[str, Any]:
    """An update of a policy in the store, taken apart: its batches, its parts, what they do to the entropy."""
    settings, store = _enter(place)
    return policies.measure_update(EntropySpec.from_dict(spec), store, *chunks, log_progress(settings)).summary


@artifact_task(name="train-policy", task_run_name="train {label}")
def train_policy(artifact_id: str, label: str, spec: dict[str, Any], place: Place) -> dict[str, Any]:
    """A policy, with its checkpoints and its optimizer's states."""
    settings, store = _enter(place)
    return artifacts.build_target(PolicySpec.from_dict(spec), store, log_progress(settings)).summary


@artifact_task(name="compare", task_run_name="compare {label}")
def compare(artifact_id: str, label: str, publish: Callable[[], Manifest], place: Place) -> dict[str, Any]:
    """The plots and the report of what is finished; in the flow's own process, since `publish` is a function."""
    return publish().summary
