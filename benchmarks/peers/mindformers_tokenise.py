"""MindFormers 1.3.2's llama_preprocess: its algorithm, its own tokenizer, MindSpore's writer; seconds as JSON.

The script is not in its wheel. As it does: one conversation at a time, the rounds tokenised alone, tokenised again to
find where the labels begin and once more to find where they end.

usage: mindformers_tokenise.py SENTENCEPIECE_MODEL ALPACA LENGTH
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from mindformers.models.llama import LlamaTokenizer
from mindspore.mindrecord import FileWriter

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
OPENING, END, IGNORE, PAD = " ASSISTANT: ", "</s>", -100, 0


def encode(tokenizer, row: dict, length: int) -> dict[str, np.ndarray]:
    """Return a row's ids and labels, padded to `length` + 1."""
    asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    rounds = [f"{SYSTEM} USER: {asked}{OPENING}{row['output']}"]
    ids = [tokenizer.bos_token_id]
    for each in rounds:
        ids += tokenizer(each + END)["input_ids"][1:]
    ids = (ids + [PAD] * (length + 1 - len(ids)))[: length + 1]
    labels, place = list(ids), 1
    labels[0] = IGNORE
    for each in rounds:
        instruction = len(tokenizer(each.split(OPENING)[0] + OPENING)["input_ids"]) - 3
        labels[place : place + instruction] = [IGNORE] * instruction
        place += len(tokenizer(each)["input_ids"]) - 1
    labels[place:] = [IGNORE] * (len(labels) - place)
    return {name: np.array(values, np.int32) for name, values in (("input_ids", ids), ("labels", labels))}


def main() -> None:
    model, data, words = sys.argv[1:]
    length, rows = int(words), json.loads(Path(data).read_text(encoding="utf-8"))
    tokenizer = LlamaTokenizer(vocab_file=model)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        writer = FileWriter(f"{folder}/rows.mindrecord")
        columns = {name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")}
        writer.add_schema(columns, "rows")
        for row in rows:
            writer.write_raw_data([encode(tokenizer, row, length)])
        writer.commit()
        print(json.dumps({"seconds": time.perf_counter() - began}))


main()
