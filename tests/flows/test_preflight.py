"""What is refused before any work: by `--dry-run`, and by every command before it starts a server."""

import dataclasses
import gzip
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flows import batch_size, entropy, orchestration, sweep
from lambda_hat.llc.artifacts import build_target, diagnose_run, publish_target, sample_batch
from lambda_hat.llc.plan import make_plan
from lambda_hat.specs.settings import load_settings
from lambda_hat.store.store import Store
from lambda_hat.targets import data

SETTINGS = """
[store]
uri = "unused"
[runtime]
compilation_cache = ""

[presets.target.bowl]
family = "quadratic"
dim = 4
data = { n_data = 300 }
[presets.target.net]
family = "mlp"
model = { depth = 1, width = 3 }
data = { n_data = 300, input_dim = 3 }
[presets.target.fashion]
family = "fashion_mnist"
[presets.target.policy]
family = "policy"
task = { kind = "modular_addition", modulus = 3 }
model = { kind = "decoder", width = 8, num_layers = 1, num_heads = 2, num_kv_heads = 1, mlp_width = 16 }
warm_start = { max_steps = 2 }
rl = { num_steps = 1, num_checkpoints = 2 }
[presets.target.mine]
family = "custom"
path = "module_of_mine:target"
data = { n_data = 5 }
[presets.target.pretrained]
family = "policy"
task = { kind = "few_shot_addition" }
model = { kind = "pretrained", path = "FOLDER", sha256 = "SHA256" }
warm_start = { max_steps = 0 }
[presets.task.cubic]
kind = "polynomial"
[presets.task.fashion]
kind = "images"
dataset = "fashion-mnist"
[presets.task.million]
kind = "images"
dataset = "mnist1m"
[presets.sampler.hmc]
kind = "hmc"
num_draws = 10
num_burnin_steps = 20

[experiments.default]
sweeps = [["target=bowl", "sampler=hmc"]]
[studies.default]
sweeps = [["task=cubic", "batch_size=16", "eta=1", "num_steps=10"]]
[entropy.default]
sweeps = [["target=policy", "evaluation.num_prompts=4", "update.num_prompts=2"]]
"""

COMMANDS = {"sweep": sweep, "batch_size": batch_size, "entropy": entropy}


@pytest.fixture
def settings_file(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture
def command(settings_file, tmp_path, monkeypatch, capsys):
    """A command in this process, which may not get as far as its server."""

    def no_server():
        raise AssertionError("a server would have been started")

    monkeypatch.setattr(orchestration, "tie_server", no_server)

    def run(name, *arguments, store=None):
        where = ["--store", str(tmp_path / "store") if store is None else str(store), "--settings", str(settings_file)]
        monkeypatch.setattr(sys, "argv", [name, *arguments, *where])
        status = COMMANDS[name].main()
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def refused(command, tmp_path):
    """Runs a command that must be refused with these words, both with `--dry-run` and without; it makes no store."""

    def check(name, *arguments, words, store=None):
        for more in (["--dry-run"], []):
            result = command(name, *arguments, *more, store=store)
            assert (result.status, result.out) == (2, "")
            assert result.err.startswith("error: ")
            assert result.err.count("\n") == 1
            assert all(word in result.err for word in words), result.err
        assert not (tmp_path / "store").exists()

    return check


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("place", ["file", "file/below", "file/below/it"])
def test_a_store_where_a_file_is(refused, tmp_path, name, place):
    (tmp_path / "file").touch()
    refused(name, store=tmp_path / place, words=["A local store is a folder", str(tmp_path / place), "name another path"])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("exists", [False, True])
def test_a_store_that_may_not_be_written(refused, tmp_path, monkeypatch, name, exists):
    """As on a disk that is full, read-only or somebody else's: who tests as root may write everywhere else."""

    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("lambda_hat.store.storage.tempfile.TemporaryFile", refuse)
    store = tmp_path / "folder" if exists else tmp_path / "folder" / "new" / "store"
    refused(name, store=store, words=[str(store), "Permission denied", "Check the folder's permissions"])
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("store", ["x" * 300, "/proc/store"])
def test_a_store_that_no_folder_can_be(refused, tmp_path, name, store):
    if not Path("/proc/self").exists() and store.startswith("/proc"):
        pytest.skip("there is no folder in which nobody makes files")
    refused(name, store=tmp_path / store, words=["does not", "Check the folder's permissions"])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_store_that_can_be_made_is_not_made_by_a_dry_run(command, tmp_path, name):
    before = sorted(tmp_path.iterdir())
    assert command(name, "--dry-run", store=tmp_path / "new" / "store").status == 0
    assert sorted(tmp_path.iterdir()) == before


def test_a_remote_store_is_written_to_and_left_as_it_was():
    store = Store("memory://preflight/store")
    store.check_writable()
    assert list(store.clean(0, dry_run=True)) == []
    assert store._storage.files() == []


def test_a_finished_sweep_is_looked_at_in_a_store_that_others_keep(
    command, settings_file, tmp_path, monkeypatch, library_promotion
):
    store = Store(str(tmp_path / "store"))
    (run,) = make_plan(load_settings(settings_file))
    build_target(run.target, store)
    sample_batch([run], store)
    diagnose_run(run, store)

    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("lambda_hat.store.storage.tempfile.TemporaryFile", refuse)
    assert "exists" in command("sweep", "--dry-run").out
    assert "Permission denied" in command("sweep", "--dry-run", "sampler.seed=1").err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["No module named 'module_of_mine'", "PYTHONPATH"]),
        ("def other(): ...", ["has no attribute 'target'"]),
        ("target = 3", ["must name a function; 'module_of_mine:target' is 3"]),
        ("def target(size): ...", ["missing a required argument: 'size'", "Set target.arguments"]),
        ("def target(: ...", ["SyntaxError"]),
        ("1 / 0", ["ZeroDivisionError: division by zero"]),
        ("import not_installed_anywhere", ["No module named 'not_installed_anywhere'"]),
        ("open('/nowhere/weights.npz')", ["FileNotFoundError", "/nowhere/weights.npz"]),
    ],
)
def test_a_module_of_a_custom_target(refused, tmp_path, monkeypatch, content, words):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "module_of_mine", raising=False)
    if content is not None:
        (tmp_path / "module_of_mine.py").write_text(content)
    refused("sweep", "target=mine", words=[*words, "module_of_mine:target" if "argument" not in words[0] else "target"])
    sys.modules.pop("module_of_mine", None)


def write_fashion(folder: Path, monkeypatch, content: bytes) -> None:
    """Four files of this content, packed, as Fashion-MNIST's."""
    folder.mkdir()
    for name in data._FASHION_MNIST:
        (folder / f"{name}.gz").write_bytes(content)
    monkeypatch.setenv(data.FASHION_MNIST_VARIABLE, str(folder))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["found no", "apt-get install dataset-fashion-mnist"]),
        (b"no gzip", ["Not a gzipped file", "Install the file again"]),
        (gzip.compress(b"0" * 1000)[:-20], ["ended before the end-of-stream", "Install the file again"]),
        (gzip.compress(b"0" * 1000), ["must be Fashion-MNIST's"]),
    ],
    ids=["missing", "another format", "truncated", "other content"],
)
@pytest.mark.parametrize(("name", "key"), [("sweep", "target=fashion"), ("batch_size", "task=fashion")])
def test_files_of_a_dataset(refused, tmp_path, monkeypatch, name, key, content, words):
    if content is None:
        monkeypatch.setenv(data.FASHION_MNIST_VARIABLE, str(tmp_path / "nowhere"))
    else:
        write_fashion(tmp_path / "data", monkeypatch, content)
    refused(name, key, words=words)


@pytest.mark.parametrize("damage", ["missing", "folder", "truncated", "overwritten", "other arrays"])
def test_a_file_of_arrays(refused, tmp_path, monkeypatch, damage):
    path = tmp_path / data.MNIST1M_FILE
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        rng = np.random.default_rng(0)
        x = {"other arrays": np.zeros((2000, 5))}.get(damage, rng.integers(256, size=(2000, 784), dtype=np.uint8))
        np.savez_compressed(path, x=x, y=np.zeros(2000, np.uint8))
        content = bytearray(path.read_bytes())
        if damage == "truncated":
            content = content[: len(content) // 2]
        elif damage == "overwritten":
            content[1000:2000] = bytes(1000)
        path.write_bytes(content)
    monkeypatch.setenv(data.MNIST1M_VARIABLE, str(tmp_path))
    refused("batch_size", "task=million", words=[str(path), "process-mnist1m"])


def test_files_that_the_work_left_does_not_need(command, settings_file, tmp_path, monkeypatch):
    """What is built is in the store with its data."""
    monkeypatch.setenv(data.FASHION_MNIST_VARIABLE, str(tmp_path / "nowhere"))
    fashion, bowl = (
        run.target for run in make_plan(load_settings(settings_file), None, ["target=fashion,bowl", "sampler=hmc"])
    )
    publish_target(dataclasses.replace(bowl.build(), spec=fashion), Store(str(tmp_path / "store")))
    assert command("sweep", "--dry-run", "target=fashion").status == 0


class TestPretrained:
    @pytest.fixture
    def model(self, tmp_path, settings_file):
        """The folder of a model, whose path and hash the settings have once it is called."""
        pytest.importorskip("safetensors")
        pytest.importorskip("gguf")
        pytest.importorskip("tokenizers")
        from test_policies_pretrained import random_tensors, write

        from lambda_hat.targets.policies.pretrained import fingerprint

        folder = tmp_path / "model"
        write(folder, random_tensors())

        def seal():
            text = SETTINGS.replace("FOLDER", str(folder)).replace("SHA256", fingerprint(folder))
            settings_file.write_text(text)

        return SimpleNamespace(folder=folder, seal=seal, tensors=random_tensors(), write=write)

    @pytest.mark.parametrize("name", ["sweep", "entropy"])
    def test_whole(self, command, model, name):
        model.seal()
        assert command(name, "--dry-run", "target=pretrained").status == 0

    @pytest.mark.parametrize("name", ["sweep", "entropy"])
    @pytest.mark.parametrize(
        ("file", "content", "words"),
        [
            ("config.json", None, ["must hold config.json"]),
            ("config.json", b"{", ["JSONDecodeError", "Get them again"]),
            ("config.json", b'{"model_type": "llama"}', ["KeyError: 'hidden_size'", "Get them again"]),
            ("tokenizer.json", None, ["must hold tokenizer.json"]),
            ("tokenizer.json", b"{}", ["must be whole and readable", "Get them again"]),
            ("model.safetensors", None, ["lacks 'lm_head.weight'"]),
            ("model.safetensors", b"no tensors", ["SafetensorError", "Get them again"]),
        ],
    )
    def test_a_file(self, refused, model, name, file, content, words):
        (model.folder / file).unlink()
        if content is not None:
            (model.folder / file).write_bytes(content)
        model.seal()
        refused(name, "target=pretrained", words=words)

    def test_truncated(self, refused, model):
        path = model.folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        model.seal()
        refused("entropy", "target=pretrained", words=["SafetensorError", "Get them again"])

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_numbers(self, refused, model, value):
        model.tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = value
        model.write(model.folder, model.tensors)
        model.seal()
        refused("entropy", "target=pretrained", words=["must be finite; 'model.layers.1.mlp.up_proj.weight'", "NaN"])

    def test_shapes(self, refused, model):
        model.tensors["model.norm.weight"] = np.ones(3, np.float32)
        model.write(model.folder, model.tensors)
        model.seal()
        refused("entropy", "target=pretrained", words=["'model.norm.weight'", "is (3,), not (16,)"])

    def test_nowhere(self, refused, settings_file):
        settings_file.write_text(SETTINGS.replace("FOLDER", "/nowhere").replace("SHA256", "0" * 64))
        refused("entropy", "target=pretrained", words=["got '/nowhere'", "a folder, a .gguf file, or an installed package"])

    def test_other_weights(self, refused, model, settings_file):
        settings_file.write_text(SETTINGS.replace("FOLDER", str(model.folder)).replace("SHA256", "0" * 64))
        refused("entropy", "target=pretrained", words=["must be those that the spec names"])

    def test_a_gguf_file(self, refused, tmp_path, settings_file):
        pytest.importorskip("gguf")
        from lambda_hat.targets.policies.pretrained import fingerprint

        path = tmp_path / "model.gguf"
        path.write_bytes(b"GGUF and no more")
        settings_file.write_text(SETTINGS.replace("FOLDER", str(path)).replace("SHA256", fingerprint(path)))
        refused("entropy", "target=pretrained", words=["must be whole and readable", "Get them again"])


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("sweep", ["sampler.num_chains=100000000"], ["100000000 chains of 30 draws, burn-in included, and 4 parameters", "GB"]),
        ("sweep", ["sampler.num_draws=1000000000"], ["4 chains of 1000000020 draws", "Lower sampler.num_chains"]),
        ("sweep", ["sampler.num_draws=10000000000"], ["a chain has at most 1073741824 steps", "are 10000000020"]),
        ("sweep", ["sampler.num_burnin_steps=10000000000"], ["a chain has at most 1073741824 steps"]),
        ("sweep", ["data.n_data=1000000000000"], ["1000000000000 samples of 4 numbers", "take at least 16 TB"]),
        ("sweep", ["target.dim=1000000000"], ["300 samples of 1000000000 numbers", "Lower the number of samples"]),
        ("sweep", ["target=net", "model.width=10000000", "model.depth=2"], ["parameters", "take at least", "TB"]),
        ("sweep", ["target=net", "model.width=10000000000"], ["parameters", "take at least"]),
        ("sweep", ["target=net", "data.input_dim=1000000000000"], ["300 samples of", "take at least"]),
        ("sweep", ["target=net", "training.num_steps=100000000000"], ["training.num_steps must be less than", "100000000000"]),
        ("batch_size", ["width=10000000", "depth=3"], ["a network of 100000170000000 parameters", "TB"]),
        ("batch_size", ["task.n_data=1000000000000"], ["1000000000000 samples of 17 numbers"]),
        ("batch_size", ["num_steps=100000000000"], ["num_steps must be less than"]),
        ("batch_size", ["sampler=hmc", "sampler.num_chains=100000000"], ["100000000 chains", "take at least"]),
        ("entropy", ["model.width=10000000000"], ["parameters", "take at least"]),
        ("entropy", ["evaluation.num_prompts=100000000"], ["at most 1000000 sequences"]),
        ("entropy", ["target.rl.num_prompts=100000000000"], ["num_prompts must be less than"]),
        ("entropy", ["sampler=hmc", "sampler.num_chains=100000000"], ["100000000 chains", "take at least"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_absurd_sizes(refused, name, arguments, words):
    refused(name, *arguments, words=words)


def test_what_fits_elsewhere_is_not_measured_by_this_machine(command, monkeypatch):
    """Engines whose workers are other machines."""
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert "of 4 parameters" not in command("sweep", "--dry-run").out
    assert "Work must fit into memory, 1 bytes here" in command("sweep", "--dry-run").err
    monkeypatch.setenv("LAMBDA_HAT_RUNTIME__ENGINE", "dask")
    monkeypatch.setenv("LAMBDA_HAT_RUNTIME__DASK_ADDRESS", "tcp://elsewhere:8786")
    assert command("sweep", "--dry-run").status == 0


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("sweep", ["target=net", "posterior.parameters=[hiden_0/*]"], ["got 'hiden_0/*'", "Did you mean 'hidden_0/*'?"]),
        ("sweep", ["target=net", "posterior.parameters=[hidden_0/w,'output/b[7]']"], ["'output/b[7]'", "of shape (1,)"]),
        ("sweep", ["posterior.parameters=[v]"], ["got 'v'", "There are: w."]),
        ("batch_size", ["sampler=hmc", "posterior.parameters=[layer_7/w]"], ["Did you mean 'layer_", "layer_0/w, layer_1/w"]),
        ("entropy", ["sampler=hmc", "posterior.parameters=[layer_0/qery/*]"], ["Did you mean 'layer_0/query/*'?"]),
        ("entropy", ["target.lora.rank=2", "target.lora.matrices=[*/qeury]"], ["matrices of adapters", "layer_0/query"]),
        (
            "entropy",
            ["target.lora.rank=2", "sampler=hmc", "posterior.parameters=[layer_0/query/w]"],
            ["There are: layer_0/query/a, layer_0/query/b"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_misspelt_parameters(refused, name, arguments, words):
    refused(name, *arguments, words=words)


def test_misspelt_parameters_of_a_function(refused, tmp_path, monkeypatch):
    """Which is called for it, and only then."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "module_of_mine.py").write_text(
        "import numpy as np\n"
        "def target():\n"
        "    x = np.ones((5, 2), np.float32)\n"
        "    return lambda p, batch: (batch @ p['slope']) ** 2, {'slope': np.zeros(2, np.float32)}, x\n"
    )
    monkeypatch.delitem(sys.modules, "module_of_mine", raising=False)
    refused("sweep", "target=mine", "posterior.parameters=[slop]", words=["got 'slop'", "Did you mean 'slope'?"])
    sys.modules.pop("module_of_mine", None)
