"""Everything the documents show as code runs: ```sh as commands, ```python as a script, ```toml as settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lambda_hat.plan import check_presets
from lambda_hat.settings import load_settings

ROOT = Path(__file__).parent.parent
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
    subprocess.run([sys.executable, "-c", text], cwd=folder, env=environment, check=True, timeout=120)


@pytest.mark.parametrize(("name", "text"), blocks("toml"), ids=lambda value: value if value.endswith(".md") else "")
def test_settings(name, text, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    check_presets(load_settings(path))


def test_links_and_pictures_exist():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
