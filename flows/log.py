"""What a command prints of its log: lines. Tracebacks go to a file, made where there is one, which the last sentence names."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import PrefectConsoleHandler


class _Lines(logging.Formatter):
    """A record in one line, as another formatter has it."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)  # other handlers, like that of the UI, show all of it
        record.exc_info = record.exc_text = record.stack_info = None
        return " ".join(self.formatter.format(record).split("\n"))


class Tracebacks:
    """While this is entered, tracebacks go to `file` in place of the terminal."""

    def __init__(self) -> None:
        name = f"lambda_hat-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        self.file = Path(tempfile.gettempdir(), name)
        self._handler = logging.FileHandler(self.file, delay=True, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._handler.addFilter(lambda record: record.exc_info is not None)

    def __enter__(self) -> Self:
        setup_logging()
        names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "prefect"]
        loggers = [logging.root, *map(logging.getLogger, names)]
        console = {handler for logger in loggers for handler in logger.handlers if isinstance(handler, PrefectConsoleHandler)}
        self._before = [(handler, handler.formatter) for handler in console if handler.formatter is not None]
        for handler, formatter in self._before:
            handler.setFormatter(_Lines(formatter))
        # Those that hand their records to no other one, which would write them twice.
        self._loggers = [logger for logger in loggers if logger is logging.root or not logger.propagate]
        for logger in self._loggers:
            logger.addHandler(self._handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for logger in self._loggers:
            logger.removeHandler(self._handler)
        for handler, formatter in self._before:
            handler.setFormatter(formatter)
        self._handler.close()

    def where(self) -> str:
        """A sentence, where there are any."""
        return f"Tracebacks are in {self.file}." if self.file.exists() else ""
