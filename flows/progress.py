"""Progress of tasks as log lines and progress artifacts, and how the end of their flow run reaches them."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from flows.ends import Stop
from lambda_hat.compute.chunks import Progress
from lambda_hat.specs.settings import Settings

ENDED = "The flow run was cancelled or has ended; run again with the same parameters, it goes on from here."

#: Seconds between two requests to the server about one task.
SERVER_SECONDS = 3.0


class Interrupted(Exception):
    """The user asked to stop; what is unfinished goes on from its checkpoint when the sweep is called again."""


_ended: set[UUID] = set()  # flow runs


def stop_tasks(flow_run_id: UUID) -> None:
    """Those of this process end with their current chunk: no signal reaches their threads, and the flow run waits for them."""
    _ended.add(flow_run_id)


class _Shown:
    """A task run's progress on the server: an artifact, once it has taken long enough to be looked at."""

    def __init__(self) -> None:
        context = TaskRunContext.get()
        self.task_run = context.task_run if context else None  # None: the task's function, called without Prefect
        self.artifact: Any = None  # its id
        self.last = time.monotonic()

    def update(self, percent: float | None) -> None:
        """Shows progress, where there is some to show, and asks whether the flow run goes on; rarely."""
        now, finished = time.monotonic(), percent == 100 and self.artifact is not None
        if self.task_run is None or self.task_run.flow_run_id is None or (now - self.last < SERVER_SECONDS and not finished):
            return
        self.last = now
        with suppress(Exception):  # a server that does not answer is no reason to stop sampling
            if percent is not None and self.artifact is None:
                self.artifact = create_progress_artifact(percent, description=self.task_run.name)
            with get_client(sync_client=True) as client:
                if percent is not None:
                    client.update_artifact(self.artifact, ArtifactUpdate(data=percent))
                state = client.read_flow_run(self.task_run.flow_run_id).state
            # A signal reaches neither the threads of a flow run nor workers elsewhere, and who cancels may not send one.
            if state and (state.is_cancelling() or state.is_final()):
                _ended.add(self.task_run.flow_run_id)

    def check(self) -> None:
        """Raises Interrupted if this flow run is known to have ended."""
        if self.task_run and self.task_run.flow_run_id in _ended:
            raise Interrupted(Stop.current.sentence if Stop.current else ENDED)


def log_progress(settings: Settings) -> Progress:
    """Progress as lines in the run's log, at most one every `runtime.progress_seconds`, and as a ring in the UI.

    Raises:
      Interrupted: from the callback, within seconds after the flow run was cancelled or has ended, by Ctrl-C say.
    """
    logger, last, shown = get_run_logger(), time.monotonic(), _Shown()
    interval = settings.runtime.progress_seconds
    first: tuple[int, float] | None = None  # work done and time at the first report, which follows compilation

    def progress(done: int, total: int, unit: str, note: str) -> None:
        nonlocal last, first
        shown.update(100 * done / total if interval else None)
        shown.check()
        now = time.monotonic()
        first = first or (done, now)
        if not interval or now - last < interval:
            return
        last = now
        filled = 20 * done // total
        bar = "█" * filled + "░" * (20 - filled)
        left = f", about {(now - first[1]) * (total - done) / (done - first[0]):.0f} s left" if done > first[0] else ""
        logger.info("%s %3.0f %% of %d %s, %s%s", bar, 100 * done / total, total, unit, note, left)

    return progress
