"""What the accuracy benchmarks share: results kept line by line, so that a run that was stopped goes on, and their tables."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: Where results are kept unless --results says otherwise.
FOLDER = Path(tempfile.gettempdir()) / "lambda_hat_benchmarks"

Row = dict[str, Any]


class Results:
    """Results by key in a JSON-lines file, each written as soon as it is there and never computed again.

    Keys name everything that decides the numbers, such as a run_id; a line that was cut off by a kill is left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Row] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self.rows[row["key"]] = row

    def get(self, key: str, compute: Callable[[], Row]) -> Row:
        """The row of `key`, computed now if it is not there."""
        if key not in self.rows:
            row = {"key": key} | compute()
            with self.path.open("a") as file:
                file.write("\n" * self._cut_off() + json.dumps(row) + "\n")
            self.rows[key] = row
        return self.rows[key]

    def _cut_off(self) -> bool:
        content = self.path.read_bytes() if self.path.exists() else b""
        return bool(content) and not content.endswith(b"\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
