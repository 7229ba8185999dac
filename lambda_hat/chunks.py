"""Long device loops, cut into chunks of a few seconds: between chunks there is time for progress, saving and stopping."""

from __future__ import annotations

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
    after_chunk: Callable[[Any, int], None] | None = None,
    max_count: int = 2**20,
) -> tuple[Any, float]:
    """Advances `carry` from step `start` to step `total` in device calls of about `CHUNK_SECONDS`.

    Args:
      advance: (carry, start, count) -> carry, running `count` steps; `start` and `count` are traced, so all chunk lengths share
        one compiled program and the result does not depend on how the loop is cut.
      after_chunk: called with (carry, steps done) after every chunk.
      max_count: the most steps `advance` takes in a call.

    Returns:
      The final carry, and the seconds the first call took beyond its share: compilation.
    """
    count, compile_seconds, first = 1, 0.0, True
    while start < total:
        count = min(count, total - start, max_count)
        began = time.perf_counter()
        carry = jax.block_until_ready(advance(carry, start, count))
        elapsed = time.perf_counter() - began
        start += count
        if first:  # nearly all of it is compilation; the next call is timed to choose the chunk
            compile_seconds, first, next_count = elapsed, False, 4
        else:
            next_count = max(1, min(16 * count, int(count * CHUNK_SECONDS / max(elapsed, 1e-6))))
        if after_chunk is not None:
            after_chunk(carry, start)
        count = next_count
    return carry, compile_seconds
