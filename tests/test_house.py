"""The house's plan: each room imports only from those above it, and the library never imports Prefect."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the foundation up. A folder stands for all files in it, which may import one another's bases.
ROOMS = [
    "spec", "text", "overrides", "settings", "arrays", "manifest", "storage", "store", "chunks", "random",
    "theory", "target", "data", "networks", "training", "trials", "policies",
    "selection", "full_data", "metric", "posterior", "user_arrays", "loss_checks", "wrap",
    "targets", "samplers",
    "run", "plan", "trace", "program", "sampling", "llc", "observables", "remedies", "diagnostics", "plots",
    "api", "html", "artifacts", "preflight", "gallery", "report", "study_views", "batch_size", "entropy", "runtime", "cli",
]  # fmt: skip


def _imports(path: Path) -> set[str]:
    """Modules a file names, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "lambda_hat" and len(parts) > 1 and parts[1] in ROOMS else None


FILES = sorted((ROOT / "lambda_hat").rglob("*.py"))


def test_every_file_is_a_room():
    assert {path.relative_to(ROOT / "lambda_hat").parts[0].removesuffix(".py") for path in FILES} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_direction(path):
    room = path.relative_to(ROOT / "lambda_hat").parts[0].removesuffix(".py")
    below = ROOMS[ROOMS.index(room) :] if room in ROOMS else []
    for module in _imports(path):
        assert module.split(".")[0] not in ("prefect", "flows"), f"{path.name} imports {module}"
        other = _room(module)
        assert other is None or other == room or other not in below, f"{room} is above {other} and may not import it"


def test_flows_hold_no_mathematics():
    for path in (ROOT / "flows").glob("*.py"):
        assert len(path.read_text().splitlines()) < 150, path
        assert not {"jax", "jax.numpy", "numpy", "blackjax", "optax", "arviz"} & _imports(path), path


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("lambda_hat", ["numpy", "pydantic"]),
        ("lambda_hat.cli", ["jax", "pandas", "prefect", "arviz", "matplotlib"]),
        ("lambda_hat.llc.plan", ["pandas", "prefect", "arviz", "matplotlib", "sklearn"]),
    ],
)
def test_importing_stays_light(module, heavy):
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
