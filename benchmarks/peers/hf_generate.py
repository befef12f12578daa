"""Greedy continuations by transformers' generate, as JSON: seconds of one call, and the new tokens of each prompt.

usage: hf_generate.py MODEL PROMPTS BATCH NEW_TOKENS
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, path, batch, count = sys.argv[1:]
    prompts, new_tokens = json.loads(Path(path).read_text())[: int(batch)], int(count)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # No end token: every prompt gets all its tokens.
    model.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    words = {"attention_mask": mask, "do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
    model.generate(ids, **words)
    began = time.perf_counter()
    out = model.generate(ids, **words)
    print(json.dumps({"seconds": time.perf_counter() - began, "tokens": out[:, width:].tolist()}))


main()
