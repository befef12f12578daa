"""Greedy continuations by one of our engines, as JSON: seconds of one call, and the new tokens of each prompt.

usage: generate.py ENGINE MODEL PROMPTS BATCH NEW_TOKENS
"""

import json
import sys
import time
from pathlib import Path

from msft.backend.contract import Sampling
from msft.predict.loading import load_engine, load_spec


def main() -> None:
    backend, folder, path, batch, new_tokens = sys.argv[1:]
    model, prompts = Path(folder), json.loads(Path(path).read_text())[: int(batch)]
    engine = load_engine(load_spec(model), model, backend=backend, device="cpu")
    # A call of the same size: MindSpore compiles for the shapes it meets.
    engine.generate(prompts, Sampling(max_new_tokens=int(new_tokens)))
    began = time.perf_counter()
    tokens = engine.generate(prompts, Sampling(max_new_tokens=int(new_tokens)))
    print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}))


main()
