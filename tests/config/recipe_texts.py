"""Recipes written for tests."""

from pathlib import Path

from msft.config.load import load_recipe
from msft.errors import InputError

MINIMAL = """\
backend: torch
model:
  pretrained: models/tiny
  seq_length: 512
  pet_config:
    lora_rank: 8
    target_modules: '.*q_proj|.*v_proj'
runner_config:
  epochs: 2
  batch_size: 4
optimizer:
  type: AdamW
  learning_rate: 1e-4
lr_schedule:
  type: cosine
  warmup_ratio: 0.1
train_dataset:
  data_loader:
    dataset_dir: train.mindrecord
"""

SIZES = """\
model:
  model_config:
    hidden_size: 64
    num_layers: 2
    num_heads: 4
    vocab_size: 100
"""


def load(folder: Path, text: str = MINIMAL, *words: str):
    """Write a recipe into `folder` and load it with the words of a command line."""
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, words)


def problems(folder: Path, text: str, *words: str) -> list[str]:
    """Return the lines with which a recipe is refused, the folder left out."""
    try:
        load(folder, text, *words)
    except InputError as error:
        return [line.replace(f"{folder}/", "") for line in error.problems]
    raise AssertionError("the recipe was accepted")
