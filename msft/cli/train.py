"""`msft train X.yaml [flags]`, which is also `python run_finetune.py --config X.yaml [flags]`."""

import os
import sys
from collections.abc import Sequence

from msft.cli import guard

USAGE = """usage: msft train RECIPE.yaml [--dry_run] [--debug] [FLAGS]

Fine-tune, pretrain, evaluate or predict (the recipe's run_mode) with either engine.

  RECIPE.yaml, --config RECIPE.yaml   the recipe, in MindFormers' layout
  --dry_run                           check everything, tell the plan, import no framework
  --debug                             show the traceback of an error
  --register_path DIR                 accepted for MindFormers' sake; python files of a recipe are not run

Flags change the recipe, later ones win:
  --backend torch|mindspore  --device auto|cpu|cuda|npu  --run_mode train|finetune|eval|predict
  --load_checkpoint PATH  --resume_training True|PATH  --output_dir DIR  --seed N
  --train_dataset_dir PATH  --eval_dataset_dir PATH  --do_eval True  --num_samples N
  --epochs N  --batch_size N  --gradient_accumulation_steps N  --use_parallel True|False
  --predict_data TEXT_OR_FILE ...  --predict_batch_size N
  --any.dotted.key VALUE, any.dotted.key=VALUE, --options key=value ...   every other key of the recipe
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    code = guard.run(_train, argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # All is written. Taking the interpreter down beside gloo's threads sometimes aborts, and torchrun would
        # call the whole job a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _train(argv: Sequence[str]) -> None:
    from msft import console
    from msft.errors import InputError

    words = list(argv)
    if "-h" in words or "--help" in words:
        console.say(USAGE)
        return
    dry, words = _take(words, "--dry_run")
    _, words = _take(words, "--debug")
    words = _without_register_path(words)
    path, overrides = _recipe_path(words)
    if path is None:
        raise InputError("msft train: which recipe? (msft train RECIPE.yaml, see msft train --help)")
    from msft.config.load import load_recipe

    recipe = load_recipe(path, overrides)
    from msft.train.run import run

    run(recipe, dry)


def _take(words: list[str], flag: str) -> tuple[bool, list[str]]:
    return flag in words, [word for word in words if word != flag]


def _without_register_path(words: list[str]) -> list[str]:
    """Leave out MindFormers' folder of python plug-ins."""
    from msft import console

    left = list(words)
    for index, word in enumerate(words):
        if word == "--register_path" or word.startswith("--register_path="):
            left[index : index + (1 if "=" in word else 2)] = []
            console.note("--register_path does nothing here: python files of a recipe are not run")
            break
    return left


def _recipe_path(words: list[str]) -> tuple[str | None, list[str]]:
    """The recipe's path, from `--config X`, `--config=X` or the first word, and the words left."""
    for index, word in enumerate(words):
        if word == "--config" and index + 1 < len(words):
            return words[index + 1], words[:index] + words[index + 2 :]
        if word.startswith("--config="):
            return word.removeprefix("--config="), words[:index] + words[index + 1 :]
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    return None, words
