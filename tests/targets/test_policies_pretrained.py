"""Language models from files compute what their formats say, and learn as policies."""

from __future__ import annotations

import hashlib
import json
import sys

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies import model_files
from lambda_hat.targets.policies.decoder import DecoderSpec, decoder
from lambda_hat.targets.policies.generate import generate
from lambda_hat.targets.policies.lora import LoraSpec
from lambda_hat.targets.policies.pretrained import PretrainedSpec, find, fingerprint, open_pretrained
from lambda_hat.targets.policies.spec import PolicySpec, RlSpec, WarmStartSpec, policy_of
from lambda_hat.targets.policies.tasks import FewShotAdditionTask, ModularTask, TokenizedTask

pytest.importorskip("safetensors")
pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

import gguf
import tokenizers
from safetensors.numpy import save_file

#: Byte-level: a space is Ġ and a line break Ċ.
PIECES = [*"0123456789+=", "Ċ", "Ġ", "a", "b", "<|end|>", "Ġa", "ab"]
MERGES = [("Ġ", "a"), ("a", "b")]
END = PIECES.index("<|end|>")
VOCAB = len(PIECES) + 3  # the embedding has rows to spare
WIDTH, LAYERS, HEADS, KV_HEADS, MLP = 16, 2, 4, 2, 12
CONFIG = {
    "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "intermediate_size": MLP, "rope_theta": 500.0, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "eos_token_id": END, "hidden_act": "silu",
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(2, 6)).astype(np.int32)


def random_tensors(family="llama", tied=False, seed=0):
    """In the names and shapes of Hugging Face's files, (out, in)."""
    rng, dim = np.random.default_rng(seed), WIDTH // HEADS
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (WIDTH,), at + "post_attention_layernorm.weight": (WIDTH,)}
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (heads * dim, WIDTH)
            if family == "qwen2":
                shapes[f"{at}self_attn.{name}_proj.bias"] = (heads * dim,)
        shapes |= {at + "self_attn.o_proj.weight": (WIDTH, WIDTH), at + "mlp.down_proj.weight": (WIDTH, MLP)}
        shapes |= {at + "mlp.gate_proj.weight": (MLP, WIDTH), at + "mlp.up_proj.weight": (MLP, WIDTH)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    return {name: rng.standard_normal(shape).astype(np.float32) / 2 for name, shape in shapes.items()}


def logits_of(tensors, config, tokens):
    """Of one sequence, (T, V), as the architecture's definition has it."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    dim, length = WIDTH // HEADS, len(tokens)
    angles = np.arange(length)[:, None] * config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    cos, sin = (np.concatenate([part, part], axis=1)[:, None] for part in (np.cos(angles), np.sin(angles)))

    def norm(name, x):
        return w[name] * x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def rotary(x):
        return x * cos + np.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], axis=-1) * sin

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        h = norm(at + "input_layernorm.weight", x)
        q, k, v = (linear(f"{at}self_attn.{name}_proj", h).reshape(length, -1, dim) for name in "qkv")
        k, v = (np.repeat(part, HEADS // KV_HEADS, axis=1) for part in (rotary(k), v))
        scores = np.einsum("thd,shd->hts", rotary(q), k) / np.sqrt(dim)
        scores = np.exp(np.where(np.tri(length, dtype=bool), scores, -np.inf))
        mixed = np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v)
        x = x + linear(at + "self_attn.o_proj", mixed.reshape(length, WIDTH))
        h = norm(at + "post_attention_layernorm.weight", x)
        gate = linear(at + "mlp.gate_proj", h)
        x = x + linear(at + "mlp.down_proj", gate / (1 + np.exp(-gate)) * linear(at + "mlp.up_proj", h))
    return norm("model.norm.weight", x) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def bpe():
    model = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(PIECES)}, MERGES))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<|end|>"])
    return model


def write(folder, tensors, changes=None, parts=1):
    """A model's folder; the tensors in as many files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (changes or {})))
    bpe().save(str(folder / "tokenizer.json"))
    names = sorted(tensors)
    for part in range(parts):
        own = {name: tensors[name] for name in names[part::parts]}
        save_file(own, str(folder / (f"model-{part + 1:05}-of-{parts:05}.safetensors" if parts > 1 else "model.safetensors")))
    return PretrainedSpec(path=str(folder), sha256=fingerprint(folder))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, 1),
        ({"tie_word_embeddings": True}, 2),
        ({"model_type": "qwen2"}, 3),
        # As Transformers 5 writes it.
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "head_dim": WIDTH // HEADS}, 1),
    ],
)
def test_a_folders_model_computes_its_architecture(tmp_path, changes, parts):
    family, tied = changes.get("model_type", "llama"), changes.get("tie_word_embeddings", False)
    tensors = random_tensors(family, tied)
    opened = open_pretrained(write(tmp_path / "model", tensors, changes, parts))
    assert opened.model == DecoderSpec(
        width=WIDTH, num_layers=LAYERS, num_heads=HEADS, num_kv_heads=KV_HEADS, mlp_width=MLP, rope_base=500.0,
        norm_epsilon=1e-5, attention_bias=family == "qwen2", tied_embeddings=tied,
    )  # fmt: skip
    params = opened.load(np.float64)
    np.testing.assert_array_equal(params["layer_1/down"]["w"], tensors["model.layers.1.mlp.down_proj.weight"].T)
    network = decoder(opened.model, opened.vocab_size)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, network.init((0,), np.float32))
    logits = jax.jit(network.apply)(params, TOKENS)
    np.testing.assert_allclose(logits, [logits_of(tensors, CONFIG, row) for row in TOKENS], rtol=1e-9, atol=1e-9)


def test_half_precision_files_are_read(tmp_path):
    import ml_dtypes

    tensors = random_tensors()
    low = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    params = open_pretrained(write(tmp_path / "model", low)).load(np.float32)
    expected = tensors["lm_head.weight"].astype(ml_dtypes.bfloat16).astype(np.float32).T
    np.testing.assert_array_equal(params["unembedding"]["w"], expected)


def neighbours(rows, heads):
    """Rows i and i + D/2 of each head next to one another: the order of Llama's GGUF files."""
    dim = len(rows) // heads
    order = [head * dim + half * dim // 2 + i for head in range(heads) for i in range(dim // 2) for half in (0, 1)]
    return rows[order]


def write_gguf(path, tensors, pre="smollm", family="llama", rope_dimensions=WIDTH // HEADS, context_length=None, turn_end=None):
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(rope_dimensions)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(PIECES)
    writer.add_token_types([gguf.TokenType.CONTROL if piece == "<|end|>" else gguf.TokenType.NORMAL for piece in PIECES])
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_eos_token_id(END)
    if turn_end is not None:
        writer.add_eot_token_id(turn_end)
    if context_length is not None:
        writer.add_context_length(context_length)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in tensors.items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = neighbours(tensor, HEADS if "q_proj" in name else KV_HEADS)
        for theirs, own in names.items():
            name = name.replace(theirs, own)
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return PretrainedSpec(path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(("family", "pre", "tied"), [("llama", "smollm", True), ("qwen2", "qwen2", False)])
def test_a_gguf_file_is_the_folders_model(tmp_path, family, pre, tied):
    tensors = random_tensors(family, tied)
    from_file = open_pretrained(write_gguf(tmp_path / "model.gguf", tensors, pre, family))
    folder = write(tmp_path / "model", tensors, {"model_type": family, "tie_word_embeddings": tied})
    from_folder = open_pretrained(folder)
    assert from_file.model == from_folder.model
    jax.tree.map(np.testing.assert_array_equal, from_file.load(np.float32), from_folder.load(np.float32))
    for tokenizer in (from_file.tokenizer, from_folder.tokenizer):
        assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (VOCAB, (), END)
        ids = tokenizer.encode("1+2= ab a\n")
        assert [PIECES[i] for i in ids] == ["1", "+", "2", "=", "Ġa", "b", "Ġa", "Ċ"]
        assert tokenizer.decode(np.array([*ids, END])) == "1+2= ab a\n"


def test_quantised_weights_are_near(tmp_path):
    """Q8_0 keeps blocks of 32 numbers as multiples of a 127th of their largest."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    near = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    assert 0 < np.max(np.abs(near - weights)) < np.max(np.abs(weights)) / 127


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type llama or qwen2; .* has 'gemma'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type = 'default'; model has 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type = 'default'; model has 'linear'"),
        ({"head_dim": 8}, "head_dim = 4; model has 8"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window = False; model has True"),
        ({"attention_bias": True}, "attention_bias = False; model has True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'silu'; model has 'gelu'"),
        ({"num_hidden_layers": 1}, "has 'model.layers.1.input_layernorm.weight' besides"),
        ({"num_hidden_layers": 3}, "lacks 'model.layers.2.input_layernorm.weight'"),
        ({"eos_token_id": None}, "must name its eos_token_id"),
        ({"eos_token_id": VOCAB}, f"from 0 to {VOCAB - 1}, of the model's vocabulary; '.*' names {VOCAB}"),
    ],
)
def test_other_architectures_are_refused(tmp_path, changes, message):
    with pytest.raises(InvalidInput, match=message):
        open_pretrained(write(tmp_path / "model", random_tensors(), changes))


def test_other_gguf_files_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"one of gpt2 with smollm, gpt2 with qwen2; a.gguf has gpt2 with tekken"):
        open_pretrained(write_gguf(tmp_path / "a.gguf", random_tensors(), "tekken"))
    with pytest.raises(InvalidInput, match=r"rope.dimension_count = 4; b.gguf has 2"):
        open_pretrained(write_gguf(tmp_path / "b.gguf", random_tensors(), rope_dimensions=2))
    with pytest.raises(InvalidInput, match=r"architecture llama or qwen2; c.gguf has 'gpt2'"):
        open_pretrained(write_gguf(tmp_path / "c.gguf", random_tensors(), family="gpt2"))


def test_the_weights_are_part_of_the_spec(tmp_path):
    spec = write(tmp_path / "model", random_tensors())
    lines = [f"{hashlib.sha256((tmp_path / 'model' / name).read_bytes()).hexdigest()}  {name}\n"
             for name in ("config.json", "model.safetensors", "tokenizer.json")]  # fmt: skip
    assert spec.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    with pytest.raises(InvalidInput, match=f"have {spec.sha256}. Set model.sha256"):
        open_pretrained(PretrainedSpec(path=spec.path, sha256="0" * 64))
    with pytest.raises(ValidationError, match="sha256"):
        PretrainedSpec(path=spec.path, sha256="latest")
    with pytest.raises(ValidationError, match="sha256"):
        PretrainedSpec(path=spec.path)


def test_a_package_may_hold_the_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    info = tmp_path / "tiny_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    (tmp_path / "tiny_model").mkdir()
    spec = write_gguf(tmp_path / "tiny_model" / "weights.gguf", random_tensors())
    (info / "RECORD").write_text("tiny_model/weights.gguf,,\n")
    assert find("tiny-model") == tmp_path / "tiny_model" / "weights.gguf"
    assert open_pretrained(spec.model_copy(update={"path": "tiny-model"})).vocab_size == VOCAB
    with pytest.raises(InvalidInput, match="a package with 0 of them"):
        find("numpy")
    with pytest.raises(InvalidInput, match="which is none of these"):
        find(str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidInput, match=r"must hold config.json"):
        open_pretrained(PretrainedSpec(path=str(empty), sha256=fingerprint(empty)))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        InvalidInput, match=r'package gguf, which is not installed. Call pip install "lambda_hat\[pretrained\]"'
    ):
        model_files.package("gguf")


def test_tasks_take_the_models_tokens(tmp_path):
    tokenizer = open_pretrained(write(tmp_path / "model", random_tensors())).tokenizer
    few = TokenizedTask(FewShotAdditionTask(limit=8, examples=((3, 4),)), tokenizer)
    prompts = few.prompts()
    assert few.end_token == PIECES.index("Ċ")
    assert [PIECES[i] for i in prompts.tokens[1]] == [*"3+4=7", "Ċ", *"0+1="]
    assert [PIECES[i] for i in prompts.answers[-1]] == ["1", "4", "Ċ"]
    assert few.text(prompts.answers[0]) == "0"
    modular = TokenizedTask(ModularTask(modulus=3), tokenizer)
    assert modular.prompts().answers[5].tolist() == [0, END]


def test_all_end_tokens_are_the_models(tmp_path):
    """Chat models name several, of which any ends a completion; the one of config.json does where there are no others."""
    folder = write(tmp_path / "model", random_tensors())
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, 3]}))
    folder = PretrainedSpec(path=folder.path, sha256=fingerprint(tmp_path / "model"))
    from_file = write_gguf(tmp_path / "model.gguf", random_tensors(), turn_end=3)
    for spec in (folder, from_file):
        policy = PolicySpec(task=FewShotAdditionTask(), model=spec, warm_start=WarmStartSpec(max_steps=0))
        few = policy.tokenized()
        assert few.end_tokens == (PIECES.index("Ċ"), END, 3)
        assert few.text([1, END, 2]) == few.text([1, 3, 2]) == "1"
        assert policy.model_copy(update={"task": ModularTask(modulus=2)}).tokenized().end_tokens == (END, 3)


def test_prompts_are_within_the_models_positions(tmp_path):
    folder = write(tmp_path / "model", random_tensors(), {"max_position_embeddings": 6})
    from_file = write_gguf(tmp_path / "model.gguf", random_tensors(), context_length=6)
    for spec in (folder, from_file):
        fits, long = (
            PolicySpec(task=ModularTask(modulus=2, max_length=length), model=spec, warm_start=WarmStartSpec(max_steps=0))
            for length in (2, 3)
        )
        fits.check_sources(built=False)
        with pytest.raises(InvalidInput, match=r"at most 6 tokens, the positions .* got 4 of the prompt '0\+0=' and up to 3"):
            long.check_sources(built=False)


def test_tokens_beyond_the_models_vocabulary_are_refused(tmp_path):
    tensors = random_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][: PIECES.index("ab")]
    tokenizer = open_pretrained(write(tmp_path / "model", tensors)).tokenizer
    with pytest.raises(InvalidInput, match=f"below the {PIECES.index('ab')} of its model; 'ab' has {PIECES.index('ab')}"):
        tokenizer.encode("ab")


@pytest.mark.usefixtures("library_promotion")
def test_a_pretrained_model_is_a_policy(tmp_path):
    spec = PolicySpec(
        task=FewShotAdditionTask(limit=2, examples=((1, 1),)),
        model=write(tmp_path / "model", random_tensors()),
        lora=LoraSpec(rank=2),
        warm_start=WarmStartSpec(max_steps=0),
        rl=RlSpec(num_steps=2, num_prompts=32, num_completions=32, num_checkpoints=2, learning_rate=0.1),
    )
    assert PolicySpec.from_dict(json.loads(spec.model_dump_json())) == spec
    target = spec.build()
    policy = policy_of(target)
    jax.tree.map(np.testing.assert_array_equal, policy.base, open_pretrained(spec.model).load(np.float32))
    assert (
        target.metrics["num_params"] == sum(leaf.size for leaf in jax.tree.leaves(policy.params)) == 2 * 2 * (16 + 16 + 16 + 8)
    )
    first, last = (row["init_loss"] for row in target.metrics["checkpoints"])
    assert first != last
    # The first checkpoint is the model of the files.
    task = spec.tokenized()
    prompts, answers = task.prompts(), []
    for tokens, length, answer in zip(prompts.tokens, prompts.lengths, prompts.answers, strict=True):
        size = list(answer).index(task.end_token) + 1
        row = [*tokens[:length], *answer[:size]]
        logits = logits_of(random_tensors(), CONFIG, row)[:-1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        answers.append(-log_probs[np.arange(length - 1, len(row) - 1), row[length:]].sum())
    assert first == pytest.approx(np.mean(answers), rel=1e-9)
    keys = jax.random.split(jax.random.key(0), 4)
    samples = generate(
        policy.decoder, policy.full, keys, prompts.tokens, prompts.lengths, task.max_length, end_token=task.end_token
    )
    assert samples.log_probs.dtype == np.float32
