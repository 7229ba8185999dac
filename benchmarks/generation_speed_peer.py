"""Transformers' side of `generation_speed.py`, run by the Python of its own environment: one JSON request a line in, one answer
a line out.

{"make": config, "folder"}: writes a random Llama there. {"folder", "file", "num_tokens"}: continues the prompts in the file;
the answer is {"seconds": of one call}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()


def make(config: dict, folder: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.2)).save_pretrained(folder)
    pieces = {chr(ord("0") + number): number for number in range(config["vocab_size"])}
    tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [])).save(str(folder / "tokenizer.json"))


def main() -> None:
    models: dict[str, LlamaForCausalLM] = {}
    for line in sys.stdin:
        request = json.loads(line)
        folder = request["folder"]
        if "make" in request:
            make(request["make"], Path(folder))
            print("{}", flush=True)
            continue
        if folder not in models:
            models[folder] = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            models[folder].generation_config.eos_token_id = None  # all completions have the same number of tokens
        prompts = torch.tensor(np.load(request["file"]), dtype=torch.long)
        began = time.perf_counter()
        with torch.inference_mode():
            tokens = models[folder].generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=request["num_tokens"], do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, use_cache=True, pad_token_id=0,
            )  # fmt: skip
        seconds = time.perf_counter() - began
        assert tokens.shape[1] == prompts.shape[1] + request["num_tokens"]
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
