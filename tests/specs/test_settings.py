"""Settings: file, environment, precedence, and refusal of what is misspelt."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lambda_hat.specs.settings import load_settings
from lambda_hat.specs.spec import InvalidInput

CHECKOUT = Path(__file__).parents[2]

FILE = """
[store]
uri = "from-file"
options = { a = 1, nested = { b = 2 } }
[runtime]
platform = "cpu"
max_workers = 3
"""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("LAMBDA_HAT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def settings_file(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(FILE)
    return path


def test_file_over_defaults(settings_file):
    settings = load_settings(settings_file)
    assert (settings.store.uri, settings.runtime.platform, settings.runtime.max_workers) == ("from-file", "cpu", 3)
    assert (settings.runtime.precision, settings.runtime.compilation_cache) == ("float32", "~/.cache/lambda_hat/jax")
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_environment_over_file(settings_file, monkeypatch):
    monkeypatch.setenv("LAMBDA_HAT_RUNTIME__PRECISION", "float64")
    monkeypatch.setenv("LAMBDA_HAT_RUNTIME__MAX_WORKERS", "8")
    monkeypatch.setenv("LAMBDA_HAT_RUNTIME__COMPILATION_CACHE", "")
    monkeypatch.setenv("LAMBDA_HAT_RUNTIME__SLURM", '{"memory": "4GB", "job_cpu": 8}')
    monkeypatch.setenv("LAMBDA_HAT_STORE__OPTIONS", '{"anon": true}')
    monkeypatch.setenv("LAMBDA_HAT_STORE__OPTIONS__NESTED__C", "text")
    settings = load_settings(settings_file)
    assert settings.runtime.precision == "float64"
    assert settings.runtime.max_workers == 8
    assert settings.runtime.slurm == {"memory": "4GB", "job_cpu": 8}
    assert settings.runtime.compilation_cache == ""
    # What the environment does not name stays as the file has it.
    assert (settings.runtime.platform, settings.store.uri) == ("cpu", "from-file")
    assert settings.store.options == {"a": 1, "anon": True, "nested": {"b": 2, "c": "text"}}


def test_where_the_file_is(tmp_path, monkeypatch, settings_file):
    monkeypatch.chdir(tmp_path)
    assert load_settings() == load_settings(CHECKOUT / "settings.toml")
    (tmp_path / "settings.toml").write_text('store.uri = "here"')
    assert load_settings().store.uri == "here"
    monkeypatch.setenv("LAMBDA_HAT_SETTINGS", str(settings_file))
    assert load_settings().store.uri == "from-file"
    assert load_settings(str(tmp_path / "settings.toml")).store.uri == "here"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("store.uri = \n", ["must be TOML", "line 1", "my.toml"]),
        ("[store]\nuri = 'a'\nuri = 'b'\n", ["must be TOML", "line 3"]),
        ("[stoer]\nuri = 'a'", ["stoer is no field", "Did you mean 'store'?"]),
        ("[store]\nurl = 'a'", ["store.url is no field", "Did you mean 'uri'?"]),
        ("store.uri = ''", ["store.uri must have at least 1 character", "got ''"]),
        ("store = 3", ["store must be a table of fields", "got 3"]),
        ("store.options = 3", ["store.options must be a table of fields", "got 3"]),
        ("runtime.precision = 'float16'", ["runtime.precision must be 'float32' or 'float64'", "got 'float16'", "my.toml"]),
        ("runtime.max_workers = 0", ["runtime.max_workers must be greater than or equal to 1", "got 0"]),
        ("runtime.engine = 'gpu'", ["runtime.engine must be 'threads', 'processes', 'dask' or 'slurm'; got 'gpu'"]),
        ("runtime.engine = 'dask'", ["runtime: engine = 'dask' needs dask_address", "tcp://host:port"]),
        ("runtime.engine = 'slurm'", ["runtime: engine = 'slurm' needs", "memory = '4GB'", "got {}"]),
        ("runtime.slurm = 'gpu'", ["runtime.slurm must be a table of fields", "got 'gpu'"]),
        ("runtime.task_timeout_seconds = -1", ["runtime.task_timeout_seconds must be greater than or equal to 0; got -1"]),
        ("runtime.progress_seconds = nan", ["runtime.progress_seconds must be greater than or equal to 0", "got nan"]),
        ("[presets.samplers.x]\nkind = 'sgld'", ["presets.samplers is no field", "Did you mean 'sampler'?"]),
        ("[presets.sampler]\nx = 3", ["presets.sampler.x must be a table of fields", "got 3"]),
        ("[presets.sampler.x]\ndescription = 3", ["presets.sampler.x.description must be a valid string", "got 3"]),
        ("[presets.sampler.'a.b']\nkind = 'sgld'", ["presets.sampler.a.b: a name must be letters", "got 'a.b'"]),
        ("[experiments.x]\nsweep = [['a=1']]", ["experiments.x.sweeps must be given", "Did you mean 'sweeps'?"]),
        ("[experiments.x]\nsweeps = []", ["experiments.x.sweeps must have at least 1 item", "got []"]),
        ("[experiments.x]\nsweeps = [[3]]", ["experiments.x.sweeps[0][0] must be a valid string", "got 3"]),
    ],
)
def test_malformed_file(settings_file, text, words):
    settings_file.write_text(text)
    with pytest.raises(InvalidInput) as error:
        load_settings(settings_file)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("LAMBDA_HAT_RUNTIME__PRECISON", "float64", ["Did you mean 'LAMBDA_HAT_RUNTIME__PRECISION'?"]),
        ("LAMBDA_HAT_STROE__URI", "x", ["LAMBDA_HAT_STROE__URI names no setting", "Did you mean 'LAMBDA_HAT_STORE__URI'?"]),
        ("LAMBDA_HAT_RUNTIME_PRECISION", "float64", ["Did you mean 'LAMBDA_HAT_RUNTIME__PRECISION'?"]),
        ("LAMBDA_HAT_PRESETS__SAMPLER__SGLD__STEP_SIZE", "1", ["names no setting that the environment sets"]),
        ("LAMBDA_HAT_RUNTIME__PRECISION", "float16", ["got 'float16'", "Correct the variable LAMBDA_HAT_RUNTIME__PRECISION"]),
        ("LAMBDA_HAT_RUNTIME__MAX_WORKERS", "two", ["runtime.max_workers must be a valid integer", "got 'two'"]),
        ("LAMBDA_HAT_STORE__OPTIONS", "{x", ["must be JSON"]),
        ("LAMBDA_HAT_STORE", '{"url": "x"}', ["store.url is no field", "Did you mean 'uri'?"]),
        ("LAMBDA_HAT_SETTINGS", "/nowhere/settings.toml", ["there is none at /nowhere/settings.toml"]),
    ],
)
def test_malformed_environment(monkeypatch, settings_file, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput) as error:
        load_settings(None if name == "LAMBDA_HAT_SETTINGS" else settings_file)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(InvalidInput, match=r"must be a file; there is none at .*absent\.toml.*LAMBDA_HAT_SETTINGS"):
        load_settings(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"store.uri = '\xe9'")
    with pytest.raises(InvalidInput, match="must be TOML"):
        load_settings(tmp_path / "latin.toml")


def test_settings_are_light():
    code = "import sys, lambda_hat.specs.settings; sys.exit(bool({'jax', 'prefect', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT).returncode == 0
