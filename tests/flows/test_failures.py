"""How commands end that fail: with a sentence that helps, and tracebacks in a file that it names."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows.ends import Stop
from flows.orchestration import Command, command_line

CHECKOUT = Path(__file__).parents[2]

SETTINGS = """
[presets.target.broken]
family = "custom"
path = "broken_target:build"
data = {n_data = 10}
[presets.sampler.hmc]
kind = "hmc"
"""


def named_file(stderr: str) -> Path:
    """The file of the last sentence."""
    found = re.search(r"Tracebacks are in (.*\.log)\.$", stderr.rstrip().splitlines()[-1])
    assert found is not None, stderr
    return Path(found[1])


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_target_that_raises(tmp_path, options):
    (tmp_path / "broken_target.py").write_text("def build(seed=0):\n    raise RuntimeError('no luck\\nat all')\n")
    (tmp_path / "settings.toml").write_text(SETTINGS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "LAMBDA_HAT_"))}
    environment |= {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{CHECKOUT}", "TMPDIR": str(tmp_path), "PREFECT_HOME": str(tmp_path / "prefect"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "flows/sweep.py", "target=broken", "sampler=hmc", "--store", str(tmp_path / "store"),
         "--settings", str(tmp_path / "settings.toml"), *options],
        cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback (most" not in done.stdout + done.stderr
    assert "RuntimeError: no luck at all" in done.stdout
    assert done.stdout.startswith("[" if options else "\n")
    content = named_file(done.stderr).read_text()
    assert "broken_target.py" in content
    assert "RuntimeError: no luck" in content


def test_an_error_that_nobody_expects(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def plan(*_):
        raise RuntimeError("a fault of ours")

    command = Command(None, plan, *[None] * 5)
    options = argparse.Namespace(store=str(tmp_path / "store"), settings="", list=False, dry_run=True, json=False)
    assert command_line(command, options, Stop()) == 1
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("error: RuntimeError: 'a fault of ours'. Tracebacks are in ")
    assert "Traceback (most" not in printed
    assert "in plan" in named_file(printed).read_text()
