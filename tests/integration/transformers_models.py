"""Transformers' side of `test_pretrained.py`, run by the Python of its own environment: small random models in folders of their
own below argv[1], each with logits.npz, the tokens it was given and its logits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SIZE = {
    "vocab_size": 60, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "eos_token_id": 1, "bos_token_id": 0,
}  # fmt: skip


def rope(base: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}}


def main() -> None:
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZE, **rope(700.0), tie_word_embeddings=False)),
        "llama-tied": LlamaForCausalLM(LlamaConfig(**SIZE, **rope(1e5), tie_word_embeddings=True)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZE, **rope(1e6), tie_word_embeddings=True)),
    }
    for name, model in models.items():
        folder = Path(sys.argv[1]) / name
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():  # scales and biases too, which begin as ones and zeros
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2.5)
            tokens = torch.randint(60, (3, 40), generator=generator)
            logits = model.eval()(tokens).logits
        # In several files, for one of them.
        model.save_pretrained(folder, max_shard_size="50KB" if name == "llama" else "1GB")
        pieces = [chr(ord("0") + number) for number in range(60)]
        tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [])).save(
            str(folder / "tokenizer.json")
        )
        np.savez(folder / "logits.npz", tokens=tokens.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    main()
