"""The house's plan: each room imports only from those above it, and the library never imports Prefect."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "lambda_hat"

# From the foundation up: a file imports from folders above its own in this list, and from its own without circles.
FOLDERS = ["specs", "store", "compute", "targets", "samplers", "studies", "llc", "batch_size", "entropy"]
# Side by side: none imports another, but that each may sample its networks through the doors of the first.
WINGS = ["llc", "batch_size", "entropy"]
DOORS = {"lambda_hat.llc.artifacts", "lambda_hat.llc.plan", "lambda_hat.llc.run"}
# What stands beside the folders.
AT_THE_ROOT = {"__init__", "cli"}

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in LIBRARY.rglob("*.py")
}


def _imports(path: Path) -> set[str]:
    """Modules a file names, at any depth of its code, but for types alone."""
    found = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & FILES.keys()) or {str(node.module)}
    return found


IMPORTS = {module: _imports(path) for module, path in FILES.items()}


def _folder(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_file_is_in_a_folder():
    assert {path.name for path in LIBRARY.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)
    assert {path.stem for path in LIBRARY.glob("*.py")} == AT_THE_ROOT


@pytest.mark.parametrize("module", sorted(FILES))
def test_import_direction(module):
    folder = _folder(module)
    for other in IMPORTS[module]:
        assert other.split(".")[0] not in ("prefect", "flows"), f"{module} imports {other}"
        if folder in FOLDERS and other in FILES and _folder(other) in FOLDERS:
            assert FOLDERS.index(_folder(other)) <= FOLDERS.index(folder), f"{folder} is above {other} and may not import it"
            beside = folder in WINGS and _folder(other) in WINGS and folder != _folder(other)
            assert not beside or other in DOORS, f"{module} imports {other}, of another wing and none of its doors"


def test_no_circles():
    def reached(module: str, seen: set[str]) -> set[str]:
        for other in IMPORTS.get(module, ()):
            if other in FILES and other not in seen and other != "lambda_hat":
                seen.add(other)
                reached(other, seen)
        return seen

    assert [module for module in FILES if module in reached(module, set())] == []


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
