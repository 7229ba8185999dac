"""What the documents show as code runs: ```sh as commands, ```python as a script, ```toml as settings, and the notebooks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lambda_hat.batch_size.plan import check_studies
from lambda_hat.entropy.plan import check_entropy
from lambda_hat.llc.plan import check_presets
from lambda_hat.specs.settings import load_settings

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def blocks(language: str) -> list[tuple[str, str]]:
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(path.name, text) for path in DOCUMENTS for text in fence.findall(path.read_text())]


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """A folder to work in and an environment that leaves the user's own alone."""
    folder = tmp_path_factory.mktemp("docs")
    environment = os.environ | {
        "PREFECT_HOME": str(folder / "prefect"),
        "LAMBDA_HAT_SETTINGS": str(ROOT / "settings.toml"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    return folder, environment


def test_commands(surroundings):
    """In the order in which a reader meets them; the store is the first ones' results."""
    folder, environment = surroundings
    ran = 0
    for name, text in blocks("sh"):
        for line in text.splitlines():
            command = line.replace("python flows/", f"{sys.executable} {ROOT}/flows/")
            done = subprocess.run(
                ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, f"{name}: {line}\n{done.stdout}\n{done.stderr}"
            assert done.stdout.strip() or "--output" in line, line
            ran += 1
    assert ran >= 8
    assert (folder / "results.parquet").exists()


@pytest.mark.parametrize(("name", "text"), blocks("python"), ids=lambda value: value if value.endswith(".md") else "")
def test_python(name, text, surroundings):
    folder, environment = surroundings
    subprocess.run([sys.executable, "-c", text], cwd=folder, env=environment, check=True, timeout=300)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning")  # Jupyter's own
def test_notebook(path, tmp_path, monkeypatch):
    """It holds no outputs, runs, and shows its figures."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "clear the outputs before committing"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    for cell in code:
        if ".plot" in cell.source.splitlines()[-1]:
            assert "image/png" in cell.outputs[-1].data, cell.source


@pytest.mark.parametrize(("name", "text"), blocks("toml"), ids=lambda value: value if value.endswith(".md") else "")
def test_settings(name, text, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    settings = load_settings(path)
    for check in (check_presets, check_studies, check_entropy):
        check(settings)


def test_links_and_pictures_exist():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
