"""Long device loops: compiled once for all threads, and cut into chunks of a few seconds, between which there is time for
progress, saving and stopping."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

#: Seconds one uninterruptible device call aims to take.
CHUNK_SECONDS = 2.0


#: Receives progress of long work: (done, total, unit, note).
Progress = Callable[[int, int, str, str], None]


def no_progress(done: int, total: int, unit: str, note: str) -> None:
    """Shows nothing."""


def run_in_chunks(
    advance: Callable[[Any, int, int], Any],
    carry: Any,
    start: int,
    total: int,
    after_chunk: Callable[[Any, int], None],
    max_count: int = 2**20,
) -> Any:
    """Advances `carry` from step `start` to step `total` in device calls of about `CHUNK_SECONDS`; returns the final carry.

    Args:
      advance: (carry, start, count) -> carry, running `count` steps; `start` and `count` are traced, so all chunk lengths share
        one compiled program and the result does not depend on how the loop is cut.
      after_chunk: called with (carry, steps done) after every chunk.
      max_count: the most steps `advance` takes in a call.
    """
    count, compiled = 1, False
    while start < total:
        count = min(count, total - start, max_count)
        began = time.perf_counter()
        carry = jax.block_until_ready(advance(carry, start, count))
        elapsed = time.perf_counter() - began
        start += count
        after_chunk(carry, start)
        if compiled:
            count = max(1, min(16 * count, int(CHUNK_SECONDS * count / elapsed)))
        else:  # the first call's time is mostly compilation and says nothing of a step's
            count, compiled = 4, True
    return carry


class Compiled:
    """A jitted function that worker threads may call: compiled by the first caller, since threads do not share JAX's settings.

    On CPUs with the widest vectors there are, where LLVM would choose half of them.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.programs: dict[Any, Any] = {}

    def prepare(self, single: bool, *arguments: Any) -> Callable[..., Any]:
        """The program for arguments like these; `single`: its matrix products keep to the thread that calls it, on CPUs."""
        leaves, structure = jax.tree.flatten(arguments)
        key = (single, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self.programs:
            on_cpu = jax.default_backend() == "cpu"
            options = {"xla_cpu_prefer_vector_width": "512", "xla_cpu_multi_thread_eigen": not single} if on_cpu else {}
            self.programs[key] = self.function.lower(*arguments).compile(compiler_options=options)
        return self.programs[key]


class Pace:
    """Calls a function that saves as often as saving takes at most a tenth of the time, the first time at once."""

    def __init__(self) -> None:
        self._saved = self._seconds = 0.0

    def __call__(self, save: Callable[[], None]) -> None:
        now = time.perf_counter()
        if now - self._saved > 10 * self._seconds:
            save()
            self._saved = time.perf_counter()
            self._seconds = self._saved - now


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CompileClock(threading.local):
    """Seconds this thread has spent compiling, by JAX's own events."""

    seconds = 0.0


compile_clock = CompileClock()


def _add_compile_seconds(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith("/jax/core/compile/") and "trace" not in event:  # traces nest, and would count twice
        compile_clock.seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_add_compile_seconds)
