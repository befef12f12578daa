"""The upper bound of tokenising: `encode_batch` over the rendered texts on two cores, as JSON with its seconds.

Threads and processes are both tried and the faster counts; reading the tokenizer's file counts, as it does for ours.

usage: bare_tokenizer.py MODEL ALPACA
"""

import json
import os
import sys
import time
from multiprocessing import Process
from pathlib import Path

from tokenizers import Tokenizer

# Small batches are the fastest: of 32, 100 and 1000 texts the first took 0.6 of the time of the last.
BATCH, CORES = 32, 2
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def render(row: dict) -> str:
    """Return a row in ChatML, as the model's template writes it."""
    asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    turns = {"system": SYSTEM, "user": asked, "assistant": row["output"]}
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns.items())


def encode(path: str, texts: list[str]) -> None:
    """Tokenize texts in batches."""
    tokenizer = Tokenizer.from_file(path)
    for start in range(0, len(texts), BATCH):
        tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)


def with_threads(path: str, texts: list[str]) -> float:
    """Return the seconds of `encode_batch` with the library's own threads."""
    began = time.perf_counter()
    encode(path, texts)
    return time.perf_counter() - began


def with_processes(path: str, texts: list[str]) -> float:
    """Return the seconds of a process a core, each with one thread and its share of the texts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    workers = [Process(target=encode, args=(path, texts[part::CORES])) for part in range(CORES)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


def main() -> None:
    path = str(Path(sys.argv[1]) / "tokenizer.json")
    texts = [render(row) for row in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))]
    # Processes are forked before this one has threads.
    processes = with_processes(path, texts)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    threads = with_threads(path, texts)
    print(json.dumps({"seconds": min(threads, processes), "threads": threads, "processes": processes}))


main()
