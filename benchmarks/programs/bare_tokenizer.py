"""The upper bound of tokenising: `encode_batch` over the rendered texts on all cores, as JSON with its seconds.

usage: bare_tokenizer.py MODEL ALPACA
"""

import json
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer

BATCH = 1000
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def render(row: dict) -> str:
    """Return a row in ChatML, as the model's template writes it."""
    asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    turns = {"system": SYSTEM, "user": asked, "assistant": row["output"]}
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns.items())


def main() -> None:
    tokenizer = Tokenizer.from_file(str(Path(sys.argv[1]) / "tokenizer.json"))
    texts = [render(row) for row in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))]
    began = time.perf_counter()
    tokens = 0
    for start in range(0, len(texts), BATCH):
        encodings = tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)
        tokens += sum(map(len, encodings))
    print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}))


main()
