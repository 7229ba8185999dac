"""How a command ends when it is stopped: soon, with one sentence, and its temporary Prefect server with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, Self

from prefect.settings import get_current_settings

STOPPED = "Stopped; the same command goes on from here."
NOT_KEPT = "Stopped; of a run with --no-save nothing is kept, and the same command begins anew."

#: Seconds that a flow run on a standing server has, from the signal on, to end its tasks and to tell the server.
STOP_SECONDS = 8.0


class Stop:
    """Ctrl-C and SIGTERM, while this is entered: the command ends, within ten seconds whatever its tasks do.

    sentence: what the command says then. clean: removes what it does not keep, called last.
    """

    current: ClassVar[Stop | None] = None  # of this process, where it is a command

    def __init__(self, sentence: str = STOPPED, clean: Callable[[], object] = lambda: None) -> None:
        self.sentence, self.clean = sentence, clean
        self.signum = 0  # of the first signal
        self._ends = self._said = False

    def __enter__(self) -> Self:
        self._before = Stop.current, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        Stop.current = self
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        Stop.current, handlers = self._before
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Handles the signals. A flow run sets a handler of SIGTERM that waits for its tasks: call it again inside."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        first, self.signum = self.signum == 0, self.signum or signum
        if get_current_settings().api.url is None or not first:
            # Ctrl-C ends the temporary server too, and Prefect would try for minutes to send it its last events.
            # Nothing is lost: artifacts are published whole, and sampling has a recent checkpoint.
            self.end()
            return
        timer = threading.Timer(STOP_SECONDS, self.end)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    def end(self) -> None:
        """Ends the process at once, and with it the temporary server (`flows.server`)."""
        if self._ends:  # a signal while this ends it, or the timer
            return
        self._ends = True
        self.clean()
        self.say()
        os._exit(128 + self.signum)

    def say(self) -> None:
        """Prints the sentence, once."""
        if not self._said:
            self._said = True
            print(self.sentence, file=sys.stderr, flush=True)
