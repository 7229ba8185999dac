"""Progress of tasks as log lines, and how Ctrl-C reaches them."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from prefect.logging import get_run_logger
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from lambda_hat.chunks import Progress
from lambda_hat.settings import Settings

STOPPED = "Stopped by Ctrl-C; the same command goes on from here."


class Interrupted(Exception):
    """The user asked to stop; what is unfinished goes on from its checkpoint when the sweep is called again."""


_interrupt = threading.Event()


def on_interrupt(signum: int, frame: Any) -> None:
    """For SIGINT: running tasks end with their current chunk; with the embedded server, everything ends at once."""
    if get_current_settings().api.url is None:
        # The same Ctrl-C has ended the embedded server, and Prefect would try for minutes to send it its last events.
        # Nothing is lost: artifacts are published whole, and sampling has a recent checkpoint.
        print(STOPPED, file=sys.stderr, flush=True)
        SubprocessASGIServer().stop()
        os._exit(130)
    _interrupt.set()  # for the tasks' threads, which no signal reaches
    raise KeyboardInterrupt


def log_progress(settings: Settings) -> Progress:
    """Progress as lines in the run's log (terminal and UI), at most one every `runtime.progress_seconds`.

    Raises:
      Interrupted: from the callback, after Ctrl-C.
    """
    logger, last = get_run_logger(), time.monotonic()
    first: tuple[int, float] | None = None  # work done and time at the first report, which follows compilation

    def progress(done: int, total: int, unit: str, note: str) -> None:
        nonlocal last, first
        if _interrupt.is_set():
            raise Interrupted(STOPPED)
        now = time.monotonic()
        first = first or (done, now)
        interval = settings.runtime.progress_seconds
        if not interval or now - last < interval:
            return
        last = now
        filled = 20 * done // total
        bar = "█" * filled + "░" * (20 - filled)
        left = f", about {(now - first[1]) * (total - done) / (done - first[0]):.0f} s left" if done > first[0] else ""
        logger.info("%s %3.0f %% of %d %s, %s%s", bar, 100 * done / total, total, unit, note, left)

    return progress
