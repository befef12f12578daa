"""What each process runs, and the recipe it names."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from msft.config.checks import check_paths
from msft.config.load import load_recipe
from msft.config.schema import Recipe
from msft.errors import InputError, did_you_mean

PROJECT = Path(__file__).parents[2]
TRAIN = ("-m", "msft", "train")
OWN_FLAGS = ("--debug", "--dry_run")


@dataclass(frozen=True)
class Program:
    """The words after `python` in each process, and the recipe they name, read and checked once."""

    words: tuple[str, ...]
    recipe: Recipe

    def parallel(self) -> "Program":
        """Return the program with `use_parallel True`; raises InputError when its flags say False."""
        where = self.recipe.source.get("use_parallel", "")
        if not self.recipe.use_parallel and where.startswith("--"):
            raise InputError(f"{where} False: several processes train one model together, they need {where} True")
        return self if self.recipe.use_parallel else replace(self, words=(*self.words, "--use_parallel", "True"))


def from_text(text: str) -> Program:
    """Return the program of a quoted command such as "run_finetune.py --config X.yaml --epochs 3"."""
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise InputError(f"the command {text!r} cannot be read: {error}") from None
    if words and re.fullmatch(r"python[\d.]*", Path(words[0]).name):
        words.pop(0)
    if not words:
        raise InputError('the command is empty: which program, such as "run_finetune.py --config X.yaml"?')
    if words[:2] == ["msft", "train"]:
        return from_train_words(words[2:])
    if words[:3] == list(TRAIN):
        return from_train_words(words[3:])
    return _program((_script(words[0]),), words[1:])


def from_train_words(words: Sequence[str]) -> Program:
    """Return the program `msft train` with its words: a recipe (or --config RECIPE), then flags."""
    named = bool(words) and not words[0].startswith("-")
    return _program(TRAIN, ["--config", *words] if named else list(words))


def _program(start: tuple[str, ...], words: list[str]) -> Program:
    path, overrides = _split(words)
    recipe = load_recipe(path, overrides)
    check_paths(recipe)
    return Program((*start, *words), recipe)


def _split(words: list[str]) -> tuple[str, list[str]]:
    """The recipe's path, and the words that change the recipe."""
    for index, word in enumerate(words):
        flag, equals, path = word.partition("=")
        if flag == "--config":
            rest = index + (1 if equals else 2)
            if not equals:
                path = words[index + 1] if index + 1 < len(words) else ""
            if path:
                return path, [word for word in [*words[:index], *words[rest:]] if word not in OWN_FLAGS]
    raise InputError("the command names no recipe: it needs --config X.yaml")


def _script(word: str) -> str:
    """A program's file: as it is given from here, or the project's own."""
    for path in (Path(word), PROJECT / word):
        if path.is_file():
            return str(path)
    known = {path.name for folder in (Path(), PROJECT) for path in folder.glob("*.py")}
    hint = ", msft's program is run_finetune.py" if Path(word).name.startswith("run_") else did_you_mean(word, known)
    raise InputError(f"{word}: there is no such program{hint}")
