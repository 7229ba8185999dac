"""What tests of running programs share: where they run, in which environment, on which ports, how they are waited for."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]

#: Of a row, what does not depend on the time it took.
NUMBERS = ("run_id", "llc", "mcse", "llc_per_chain", "ess_bulk", "rhat", "acceptance_rate", "init_loss", "verdict")


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Nothing of this process's settings; a home for Prefect in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "LAMBDA_HAT_", "JAX_"))}
    return kept | {"PREFECT_HOME": str(folder / "prefect")} | more


def free_ports(count: int) -> list[int]:
    """All different: each is held until the last is found."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 180) -> None:
    """Until the condition holds, while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended before what was waited for:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"waited in vain:\n{log.read_text()[-3000:]}"
        time.sleep(0.01)
