"""Parity of a model folder without a recipe: random tokens, adapters on all linear layers, then all weights."""

from pathlib import Path

import numpy as np
import yaml

from msft.convert.hf_folder import read_json
from msft.data.mindrecord import MindRecordWriter
from msft.files import write_text
from msft.models.families import spec_from_hf
from msft.models.spec import Prefix

ROWS_PER_STEP, LENGTH, PROMPT_PART = 4, 48, 4
KINDS = ("lora", "full")


def write_recipes(model: Path, output_dir: Path, steps: int, seed: int = 0) -> dict[str, Path]:
    """Write random rows and one recipe a kind into `output_dir`; returns the recipes' paths by kind.

    Rows are of different lengths, the first quarter of each not supervised. Raises InputError for a folder without
    a known config.json.
    """
    spec = spec_from_hf(read_json(model / "config.json"), str(model / "config.json"))
    data = output_dir / "random.mindrecord"
    length = min(LENGTH, spec.max_position_embeddings)
    rows = random_rows(steps * ROWS_PER_STEP, length, spec.vocab_size, seed)
    write_rows(data, [_begun(row, spec.prefix) for row in rows] if spec.prefix else rows)
    return {kind: _write_recipe(model, output_dir, data, kind, seed) for kind in KINDS}


def random_rows(count: int, length: int, vocabulary: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Return rows of random tokens, int32 [length + 1], right-padded with 0."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        size = int(generator.integers(length // 2, length + 2))
        ids = np.zeros(length + 1, np.int32)
        ids[:size] = generator.integers(1, vocabulary, size)
        labels = np.where((np.arange(length + 1) >= size // PROMPT_PART) & (np.arange(length + 1) < size), ids, -100)
        rows.append({"input_ids": ids, "labels": labels.astype(np.int32)})
    return rows


def _begun(row: dict[str, np.ndarray], prefix: Prefix) -> dict[str, np.ndarray]:
    """A row whose answer begins where its labels do, for a model that reads what is before in both directions."""
    first = int(np.flatnonzero(row["labels"] != -100)[0])
    ids = np.where(row["input_ids"] == prefix.begin, prefix.masks[-1], row["input_ids"])
    ids[first - 1 : first + 1] = prefix.masks[0], prefix.begin
    is_learned = (row["labels"] != -100) & (np.arange(len(ids)) > first)
    return {"input_ids": ids, "labels": np.where(is_learned, ids, -100).astype(np.int32)}


def write_rows(path: Path, rows: list[dict[str, np.ndarray]]) -> None:
    """Write rows as a MindRecord file."""
    with MindRecordWriter(path, {"input_ids": "int32", "labels": "int32"}) as writer:
        for row in rows:
            writer.write(row)


def _write_recipe(model: Path, output_dir: Path, data: Path, kind: str, seed: int) -> Path:
    pet = {"pet_type": "lora", "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ".*"}
    recipe = {
        "seed": seed,
        "run_mode": "finetune",
        "output_dir": str(output_dir),
        "model": {"pretrained": str(model)},
        "runner_config": {"epochs": 1, "batch_size": ROWS_PER_STEP // 2, "gradient_accumulation_steps": 2},
        "optimizer": {"type": "AdamW", "weight_decay": 0.01},
        "train_dataset": {"data_loader": {"dataset_dir": str(data)}, "padding": "max_length"},
    }
    if kind == "lora":
        recipe["model"]["pet_config"] = pet
    path = output_dir / f"{kind}.yaml"
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))
    return path
