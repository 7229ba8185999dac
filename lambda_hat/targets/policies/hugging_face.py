"""Language models from Hugging Face folders: config.json, *.safetensors and tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.decoder import DecoderSpec
from lambda_hat.targets.policies.model_files import Names, Source, package, require
from lambda_hat.targets.policies.tokenizer import TextTokenizer

_HUGGING_FACE: Names = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "unembedding": "lm_head",
    "attention_norm": "model.layers.{}.input_layernorm", "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "query": "model.layers.{}.self_attn.q_proj", "key": "model.layers.{}.self_attn.k_proj",
    "value": "model.layers.{}.self_attn.v_proj", "output": "model.layers.{}.self_attn.o_proj",
    "gate": "model.layers.{}.mlp.gate_proj", "up": "model.layers.{}.mlp.up_proj", "down": "model.layers.{}.mlp.down_proj",
}  # fmt: skip


def hugging_face_source(folder: Path) -> Source:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise InvalidInput(f"A pretrained model's folder must hold {name}; {folder} has none. Save it there.")
    config = json.loads((folder / "config.json").read_text())
    family = config.get("model_type")
    if family not in ("llama", "qwen2"):
        raise InvalidInput(
            f"A pretrained model must have model_type llama or qwen2; {folder} has {family!r}. Take another model."
        )
    width, num_heads = config["hidden_size"], config["num_attention_heads"]
    # Transformers 5 has a table rope_parameters, and before it rope_theta and rope_scaling.
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)} | (
        config.get("rope_parameters") or config.get("rope_scaling") or {}
    )
    require({
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "head_dim": (config.get("head_dim") or width // num_heads, width // num_heads),
        "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)), 1.0),
        "use_sliding_window": (config.get("use_sliding_window", False), False),
        "layer_types": (set(config.get("layer_types") or ["full_attention"]), {"full_attention"}),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "quantization_config": (config.get("quantization_config"), None),
    }, folder)  # fmt: skip
    open_file = package("safetensors").safe_open
    places: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_file(file, framework="numpy") as tensors:
            places |= {name: (file, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
    tied = config.get("tie_word_embeddings", "lm_head.weight" not in places)
    # A copy of what is tied, and constants that old versions saved.
    places = {
        name: place for name, place in places.items()
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    }  # fmt: skip

    def tensor(name: str) -> np.ndarray:
        with open_file(places[name][0], framework="numpy") as tensors:
            return tensors.get_tensor(name)

    model = DecoderSpec(
        width=width, num_layers=config["num_hidden_layers"], num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads, mlp_width=config["intermediate_size"],
        rope_base=rope["rope_theta"], norm_epsilon=config.get("rms_norm_eps", 1e-6),
        attention_bias=family == "qwen2", tied_embeddings=tied,
    )  # fmt: skip
    shapes = {name: shape for name, (_, shape) in places.items()}
    vocab_size = shapes.get("model.embed_tokens.weight", (0,))[0]
    tokenizer, max_positions = _tokenizer(folder, config, vocab_size), config.get("max_position_embeddings")
    return Source(model, _HUGGING_FACE, shapes, tensor, tokenizer, max_positions)


def _tokenizer(folder: Path, config: dict[str, Any], vocab_size: int) -> TextTokenizer:
    model = package("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    generation = folder / "generation_config.json"
    ends = (json.loads(generation.read_text()) if generation.exists() else {}).get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    if not ends or not all(isinstance(end, int) for end in ends):
        raise InvalidInput(f"A pretrained model must name its eos_token_id in config.json; {folder} has none. Add it.")
    return TextTokenizer(model, vocab_size, tuple(model.encode("").ids), tuple(ends))
