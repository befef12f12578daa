"""Reading a recipe: YAML, then the command line's values, then every check, all problems at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msft.config.importers import Toolkit, toolkit_of
from msft.config.yaml_lines import Document, Keys, Problem, dotted, read_yaml
from msft.errors import InputError

MAX_PASSES = 4


def load_recipe(path: str | Path, overrides: Sequence[str] = ()):
    """Return the frozen `msft.config.schema.Recipe` of a YAML file with the command line's values put in.

    A file of LLaMA-Factory or Firefly (`msft.config.importers`) is read as the recipe that trains as it does there.
    `overrides` are words: MindFormers' flags (`--epochs 3`), `--any.dotted.key value`, `any.dotted.key=value`.
    Precedence: flags over file over defaults. Raises InputError with one line a problem, each naming file and
    line or flag.
    """
    document = read_yaml(path)
    from msft.config.overrides import apply_overrides

    toolkit = toolkit_of(document.data)
    if toolkit:
        return _load_foreign(document, toolkit, overrides)
    problems = _repeated_datasets(document)
    apply_overrides(document, overrides)
    recipe, found = _validate(document)
    _raise_any(problems + document.problems + found)
    return recipe


def _load_foreign(source: Document, toolkit: Toolkit, words: Sequence[str]):
    """The recipe of another toolkit's file; the command line may give that toolkit's keys too."""
    from msft.config.importers.translation import translated
    from msft.config.overrides import is_of, read_overrides, set_overrides

    theirs = toolkit.keys.model_fields
    overrides = read_overrides(source, words, theirs)
    ours = [override for override in overrides if not is_of(override, theirs)]
    set_overrides(source, [override for override in overrides if is_of(override, theirs)])
    document, told = translated(source, toolkit, {dotted(override.path) for override in ours})
    set_overrides(document, ours)
    recipe, found = _validate(document)
    # What is refused leaves defaults behind, which may not fit each other: those are not the user's words.
    written = [problem for problem in found if problem.place.order or not document.problems]
    _raise_any(document.problems + written)
    recipe._toolkit = toolkit.name
    recipe._ignored = sorted([*told, *recipe._ignored], key=lambda entry: (entry.place.order, entry.path))
    return recipe


def _raise_any(problems: list[Problem]) -> None:
    if problems:
        ordered = sorted(problems, key=lambda problem: (problem.place.order, problem.path))
        raise InputError(*dict.fromkeys(str(problem) for problem in ordered))


def _validate(document: Document) -> tuple[Any, list[Problem]]:
    """Check types and ranges, then the rules between keys on what is left when the wrong keys are taken out."""
    from msft.config.checks import cross_checks
    from msft.config.report import ignored_keys

    recipe, problems, wrong = _parse(document)
    if recipe is None:
        return None, problems
    problems += [problem for path, problem in cross_checks(recipe, document) if not _touches(path, wrong)]
    recipe._name = document.name
    recipe._source = {dotted(path): place.text for path, place in document.values.items() if path}
    recipe._ignored = ignored_keys(recipe, document)
    return recipe, problems


def _parse(document: Document):
    """Return the recipe without its wrong keys, the problems, and the paths of what was taken out."""
    from pydantic import ValidationError

    from msft.config.problems import from_pydantic
    from msft.config.schema import Recipe

    problems, wrong = [], set()
    for _ in range(MAX_PASSES):
        try:
            return Recipe.model_validate(_without(document.data, wrong)), problems, wrong
        except ValidationError as error:
            found = [from_pydantic(item, document) for item in error.errors(include_url=False)]
        problems += [problem for path, problem in found if not _touches(path, wrong)]
        wrong |= {_removable(path) for path, _ in found}
    return None, problems, wrong


def _removable(path: Keys) -> Keys:
    """A key or a callback can be taken out; of any other list, the whole list."""
    inside = next((depth for depth, key in enumerate(path) if isinstance(key, int)), len(path))
    return path if path[:1] == ("callbacks",) else path[:inside]


def _without(data: Any, wrong: set[Keys], path: Keys = ()) -> Any:
    """`data` without what is at the wrong paths; a wrong list entry leaves one that does nothing in its place."""
    if isinstance(data, dict):
        return {key: _without(item, wrong, (*path, key)) for key, item in data.items() if (*path, key) not in wrong}
    if isinstance(data, list):
        inner = [(*path, index) for index in range(len(data))]
        nothing = {"type": "ObsMonitor"}
        return [dict(nothing) if at in wrong else _without(data[at[-1]], wrong, at) for at in inner]
    return data


def _touches(path: Keys, wrong: set[Keys]) -> bool:
    """Whether a path is inside, or around, something that is already reported."""
    return any(path[: len(other)] == other or other[: len(path)] == path for other in wrong)


def _repeated_datasets(document: Document) -> list[Problem]:
    """`train_dataset_task.dataset_config` must repeat `train_dataset`, which is the one that is read."""
    problems = []
    for name in ("train_dataset", "eval_dataset"):
        task = document.data.get(f"{name}_task")
        path = (f"{name}_task", "dataset_config")
        if isinstance(task, dict) and task.get("dataset_config") not in (None, document.data.get(name)):
            message = f"differs from {name}, which is the block that is read (write it there, or as *{name})"
            problems.append(Problem(document.place(path, of_key=True), dotted(path), message))
    return problems
