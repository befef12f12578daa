"""The training rows of a question, once: as MindRecord for msft, as token ids and as alpaca JSON for the peers."""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.process import run
from msft.backend.contract import Lora
from msft.backend.random import lora_a
from msft.convert.adapter import write_adapter
from msft.data.collate import align
from msft.data.mindrecord.dataset import open_mindrecord
from msft.models.adapters import peft_names
from msft.models.families import spec_from_hf
from msft.models.shapes import linear_modules, tensor_shapes

COLUMNS = ("input_ids", "labels")
LENGTH = 512
SEED = 42
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA = 16, 32


@dataclass(frozen=True)
class Rows:
    """Equal rows in three forms, and the adapter that every run starts from."""

    alpaca: Path
    mindrecord: Path
    tokens: Path
    adapter: Path


def prepare(data: Path, model: Path, count: int, folder: Path, length: int = LENGTH) -> Rows:
    """Write `count` rows of an alpaca file into a folder, cut at `length` predicted tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(folder / "alpaca.json", folder / "rows.mindrecord", folder / "tokens.json", folder / "adapter")
    write_alpaca(data, rows.alpaca, count)
    words = ["--dataset_type", "qa", "--template", "chat", "--seq_length", str(length), "--num_workers", "1"]
    words += ["--input_glob", rows.alpaca, "--model_file", model, "--output_file", rows.mindrecord]
    run([sys.executable, "-m", "msft", "llama_preprocess", *words])
    pad_id = json.loads((model / "config.json").read_text())["pad_token_id"]
    rows.tokens.write_text(json.dumps(token_rows(rows.mindrecord, pad_id)))
    write_first_adapter(model, rows.adapter)
    return rows


def write_alpaca(data: Path, target: Path, count: int) -> None:
    """Write `count` alpaca rows, repeating the data in other words' order so that no two texts are equal."""
    given = json.loads(data.read_text(encoding="utf-8"))
    endless = (repeated(row, turn) for turn in itertools.count() for row in given)
    rows = list(itertools.islice(endless, count))
    target.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def repeated(row: dict[str, str], turn: int) -> dict[str, str]:
    """Return a row of the data's `turn`-th repetition; the first is as it is."""
    return {name: rotated(text, turn) for name, text in row.items()} if turn else row


def rotated(text: str, turn: int) -> str:
    """Return a text that begins with another word and ends with the number of its turn; an empty one stays empty."""
    words = text.split(" ")
    place = turn % len(words)
    return " ".join([*words[place:], *words[:place], f"({turn})"]) if text else text


def token_rows(mindrecord: Path, pad_id: int) -> list[dict[str, list[int]]]:
    """Return the rows as a Trainer takes them: unshifted `input_ids` and `labels`, without padding."""
    dataset = open_mindrecord(mindrecord)
    rows = map(dataset.row, range(len(dataset)))
    # A row of n tokens is aligned as n - 1 with the token to predict after each.
    return [{name: row[name][: len(align(row, pad_id).input_ids) + 1].tolist() for name in COLUMNS} for row in rows]


def write_first_adapter(model: Path, folder: Path) -> None:
    """Write the adapter that `msft train` starts from with SEED as a PEFT folder: its own A, and B zero."""
    import numpy as np

    spec = spec_from_hf(json.loads((model / "config.json").read_text()))
    shapes = tensor_shapes(spec)
    modules = tuple(name for name in linear_modules(spec) if name.endswith(LEAVES))
    weights = {}
    for module in modules:
        out_features, in_features = shapes[f"{module}.weight"]
        first, second = peft_names(module)
        weights[first] = lora_a(SEED, module, RANK, in_features)
        weights[second] = np.zeros((out_features, RANK), np.float32)
    write_adapter(folder, Lora(RANK, ALPHA, 0.0, modules), weights, str(model), spec)
