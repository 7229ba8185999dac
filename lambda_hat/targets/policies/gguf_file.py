"""Language models from GGUF files, as llama.cpp uses them.

Weights are quantised in most of these files: the policy is the dequantised network, which differs from the one that was
quantised (by some percent of a weight in Q4_1). Queries and keys of Llama, but not of Qwen2, are rotated in neighbouring pairs
(2i, 2i+1) there, and their rows are put back to the half-split order here: see `targets.policies.decoder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.decoder import DecoderSpec
from lambda_hat.targets.policies.model_files import Names, Source, package, require
from lambda_hat.targets.policies.tokenizer import TextTokenizer

_GGUF: Names = {
    "embedding": "token_embd", "norm": "output_norm", "unembedding": "output", "attention_norm": "blk.{}.attn_norm",
    "mlp_norm": "blk.{}.ffn_norm", "query": "blk.{}.attn_q", "key": "blk.{}.attn_k", "value": "blk.{}.attn_v",
    "output": "blk.{}.attn_output", "gate": "blk.{}.ffn_gate", "up": "blk.{}.ffn_up", "down": "blk.{}.ffn_down",
}  # fmt: skip

#: Token types of the vocabulary that are no text: control tokens; user-defined ones are text but are not split.
_CONTROL, _USER_DEFINED = 3, 4

#: How Qwen2's tokenizer cuts a text before merging.
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def gguf_source(path: Path) -> Source:
    """A file's architecture, weights and tokenizer.

    Raises:
      InvalidInput: the decoder does not compute what the file says, or its tokenizer is of another kind.
    """
    gguf = package("gguf")
    reader = gguf.GGUFReader(path)

    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(name)
        return default if found is None else found.contents()

    family = field("general.architecture")
    if family not in ("llama", "qwen2"):
        raise InvalidInput(
            f"A pretrained model must be of architecture llama or qwen2; {path.name} has {family!r}. Take another."
        )
    width, num_heads = field(f"{family}.embedding_length"), field(f"{family}.attention.head_count")
    dim = width // num_heads
    require({
        "rope.dimension_count": (field(f"{family}.rope.dimension_count", dim), dim),
        "attention.key_length": (field(f"{family}.attention.key_length", dim), dim),
        "attention.value_length": (field(f"{family}.attention.value_length", dim), dim),
        "rope.scaling.type": (field(f"{family}.rope.scaling.type", "none"), "none"),
        "rope.scale_linear": (field(f"{family}.rope.scale_linear", 1.0), 1.0),
        "attention.sliding_window": (field(f"{family}.attention.sliding_window"), None),
    }, path)  # fmt: skip
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    model = DecoderSpec(
        width=width, num_layers=field(f"{family}.block_count"), num_heads=num_heads,
        num_kv_heads=field(f"{family}.attention.head_count_kv", num_heads), mlp_width=field(f"{family}.feed_forward_length"),
        rope_base=field(f"{family}.rope.freq_base", 10_000.0),
        # Kept in float32 there: the number meant is the shortest that rounds to it.
        norm_epsilon=float(str(np.float32(field(f"{family}.attention.layer_norm_rms_epsilon")))),
        attention_bias="blk.0.attn_q.bias" in tensors, tied_embeddings="output.weight" not in tensors,
    )  # fmt: skip

    def tensor(name: str) -> np.ndarray:
        array = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        part = name.split(".")[-2]
        if family == "llama" and part in ("attn_q", "attn_k"):
            return half_split(array, num_heads if part == "attn_q" else model.num_kv_heads)
        return array

    # gguf gives shapes with the fastest axis first.
    shapes = {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in tensors.items()}
    vocab_size = shapes.get("token_embd.weight", (0,))[0]
    return Source(model, _GGUF, shapes, tensor, _tokenizer(field, path, vocab_size), field(f"{family}.context_length"))


def half_split(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Each head's rows 0, 1, 2, 3, ... as 0, 2, 4, ..., 1, 3, 5, ...: what is rotated together, neighbours at first, then in
    different halves."""
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(field: Any, path: Path, vocab_size: int) -> TextTokenizer:
    """The file's byte-pair tokenizer."""
    tokenizers = package("tokenizers")
    pre, kind = tokenizers.pre_tokenizers, (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    cuts = {
        ("gpt2", "smollm"): [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)],
        ("gpt2", "qwen2"): [
            pre.Split(tokenizers.Regex(_QWEN2), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }  # fmt: skip
    if kind not in cuts:
        known = ", ".join(f"{model} with {pre}" for model, pre in cuts)
        raise InvalidInput(
            f"The tokenizer of a GGUF file must be one of {known}; {path.name} has {kind[0]} with {kind[1]}. "
            "Take the same model's safetensors, with its tokenizer.json."
        )
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    model = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    model.pre_tokenizer, model.decoder = pre.Sequence(cuts[kind]), tokenizers.decoders.ByteLevel()
    if kind[1] == "qwen2":
        model.normalizer = tokenizers.normalizers.NFC()
    added = tokenizers.AddedToken
    pairs = list(zip(tokens, types, strict=True))
    model.add_special_tokens([added(token, special=True, normalized=False) for token, type in pairs if type == _CONTROL])
    model.add_tokens([added(token, normalized=False) for token, type in pairs if type == _USER_DEFINED])
    bos = (field("tokenizer.ggml.bos_token_id"),) if field("tokenizer.ggml.add_bos_token", False) else ()
    # Chat models end a turn with another token than a text.
    named = (field("tokenizer.ggml.eos_token_id"), field("tokenizer.ggml.eot_token_id"))
    ends = tuple(dict.fromkeys(int(end) for end in named if end is not None))
    if not ends:
        raise InvalidInput(f"A GGUF file must name its tokenizer.ggml.eos_token_id; {path.name} has none. Take another.")
    return TextTokenizer(model, vocab_size, bos, ends)
