"""Runs of flows, and what the server and the store know of them."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId

from flows.orchestration import RunsFailed
from lambda_hat.store.store import Store


def runner(flow: Any, settings_file: str) -> Callable[..., SimpleNamespace]:
    """Runs a flow with overrides into a store: its state, result (of a failed one too) and exception."""

    def run(store: Store, *overrides: str, **arguments: Any) -> SimpleNamespace:
        arguments = {"overrides": list(overrides), "store_uri": store.uri, "settings_file": settings_file, **arguments}
        state = flow(**arguments, return_state=True)
        result = state.result(raise_on_failure=False)
        error = result if isinstance(result, Exception) else None
        if error is not None:
            result = error.result if isinstance(error, RunsFailed) else None
        return SimpleNamespace(state=state, error=error, result=result)

    return run


def tasks(outcome: SimpleNamespace, count: int) -> dict[str, str]:
    """Name -> state of the `count` task runs of a flow run; the server learns of them by and by."""
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[outcome.state.state_details.flow_run_id]))
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            runs = client.read_task_runs(flow_run_filter=of_run)
            if len(runs) >= count and all(run.state and (run.state.is_final() or run.state.name == "NotReady") for run in runs):
                break
            time.sleep(0.1)
    assert len(runs) == count
    states = {run.name: run.state.name for run in runs}
    assert len(states) == count, "task runs of one name cannot be told apart"
    return states


def ui_artifacts(outcome: SimpleNamespace) -> dict[str, Any]:
    """Key -> artifact of a flow run, as the UI gets them."""
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[outcome.state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        # Prefect's own, of what a flow run returned, have no key.
        return {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=of_run) if artifact.key}


def made(store: Store) -> dict[str, str]:
    """Folder -> time of publication of everything in a store: what is recomputed gets a new time."""
    return {manifest.address.folder: manifest.created_at for manifest in store.manifests(store.addresses())}
