"""Which files a user means by a path: a file, a set of shards, a folder, a pattern or a list."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from msft.errors import InputError, did_you_mean

_DATA_FILE = re.compile(r"\.mindrecord\d*$")
_NUMBERS = re.compile(r"(\d+)")


def find_files(
    paths: str | os.PathLike | Sequence[str | os.PathLike], shard_names: Callable[[Path], tuple[str, ...]]
) -> list[Path]:
    """Return the data files in reading order; raises InputError when there are none or a shard is missing.

    `shard_names` reads the names of a file's whole set from its header. A lone file stands for its whole set,
    a folder must hold every set in it completely; a pattern and a list mean exactly the files they name.
    """
    if isinstance(paths, (str, os.PathLike)):
        return _find(Path(paths), shard_names)
    if not paths:
        raise InputError("no MindRecord file was given")
    files, problems = [], []
    for path in map(Path, paths):
        try:
            files += [path] if path.is_file() else _find(path, shard_names)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    return files


def _find(path: Path, shard_names: Callable[[Path], tuple[str, ...]]) -> list[Path]:
    if path.is_dir():
        return _folder(path, shard_names)
    if path.exists():
        return _whole_set(path, shard_names(path))
    if glob.has_magic(str(path)):
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if not name.endswith(".db")]
        if found := [file for file in found if file.is_file()]:
            return sorted(found, key=_natural)
        raise InputError(f"{path}: no file matches this pattern")
    shards = [file for file in path.parent.glob(glob.escape(path.name) + "*") if _is_shard_of(file, path)]
    if shards:
        first = min(shards, key=_natural)
        return _whole_set(first, shard_names(first))
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    raise InputError(f"{path}: no such file{did_you_mean(path.name, names)}")


def _folder(folder: Path, shard_names: Callable[[Path], tuple[str, ...]]) -> list[Path]:
    files = sorted((file for file in folder.rglob("*") if _DATA_FILE.search(file.name)), key=_natural)
    if not files:
        raise InputError(f"{folder}: no *.mindrecord file in this folder")
    problems = []
    for file in files:
        try:
            _whole_set(file, shard_names(file))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*dict.fromkeys(problems))
    return files


def _whole_set(path: Path, names: tuple[str, ...]) -> list[Path]:
    if len(names) <= 1:
        return [path]
    if path.name not in names:
        raise InputError(
            f"{path}: renamed; it is one of {len(names)} shards ({names[0]} ...): restore the name, or list all shards"
        )
    files = [path.with_name(name) for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(*(f"{file}: missing; {path.name} belongs to {len(names)} shards" for file in missing))
    return files


def _is_shard_of(file: Path, path: Path) -> bool:
    return file.name[len(path.name) :].isdecimal()


def _natural(path: Path) -> list:
    return [int(part) if part.isdecimal() else part for part in _NUMBERS.split(str(path))]
