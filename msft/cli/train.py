"""`msft train X.yaml [flags]`, which is also `python run_finetune.py --config X.yaml [flags]`."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from msft.cli import guard
from msft.launch import RESUME_COMMAND

RESUME = ("--resume_training", "True")

USAGE = """usage: msft train RECIPE.yaml [--dry_run] [--debug] [FLAGS]

Fine-tune, pretrain, evaluate or predict (the recipe's run_mode) with either engine.

  RECIPE.yaml, --config RECIPE.yaml   the recipe, in MindFormers' layout; or a training file of LLaMA-Factory
                                      or Firefly, whose own flags are taken too (learning_rate=1e-4)
  --dry_run                           check everything, tell the plan, import no framework
  --debug                             show the traceback of an error
  --register_path DIR                 accepted for MindFormers' sake; python files of a recipe are not run

Ctrl-C or SIGTERM finishes the step, saves a checkpoint and tells how to go on; a second one stops at once.

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
    resume_command = os.environ.get(RESUME_COMMAND) or _resume_command(words)
    path, overrides = _recipe_path(words)
    if path is None:
        raise InputError("msft train: which recipe? (msft train RECIPE.yaml, see msft train --help)")
    from msft.config.load import load_recipe
    from msft.launch import heartbeat

    heartbeat.start()
    recipe = load_recipe(path, overrides)
    from msft.train.run import run

    run(recipe, dry, resume_command)


def _resume_command(words: list[str]) -> str:
    """The command that goes on from the newest checkpoint of a run with these words."""
    script = Path(sys.argv[0]).name == "run_finetune.py"
    left, _ = _without(words, "--resume_training")
    return shlex.join([*(("python", "run_finetune.py") if script else ("msft", "train")), *left, *RESUME])


def _take(words: list[str], flag: str) -> tuple[bool, list[str]]:
    return flag in words, [word for word in words if word != flag]


def _without_register_path(words: list[str]) -> list[str]:
    """Leave out MindFormers' folder of python plug-ins."""
    from msft import console

    left, found = _without(words, "--register_path")
    if found:
        console.note("--register_path does nothing here: python files of a recipe are not run")
    return left


def _without(words: list[str], flag: str) -> tuple[list[str], bool]:
    """The words without the first of a flag and its value, and whether it was there."""
    for index, word in enumerate(words):
        if word == flag or word.startswith(f"{flag}="):
            return [*words[:index], *words[index + (1 if "=" in word else 2) :]], True
    return list(words), False


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
