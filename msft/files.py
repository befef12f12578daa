"""Writing files so that a reader sees the old content or the new one, never a part."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.part")
# What this process is writing now, in any of its threads.
_LIVE: set[Path] = set()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, token: str | None = None):
    """Yield a temporary path beside `path`; flush it to disk and rename it on success, remove it on failure.

    The caller creates a file or a folder under the yielded `Path`. An existing file is replaced;
    an existing folder raises FileExistsError. Processes that fill one folder together agree on a `token`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path, token or new_token())
    live = temporary.absolute()
    _LIVE.add(live)
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            sync(file)
        if path.is_dir():
            raise FileExistsError(f"{path} exists")
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        remove(temporary)
        _LIVE.discard(live)


def new_token() -> str:
    """Return a random token for a temporary name."""
    return uuid.uuid4().hex[:8]


def temporary_path(path: Path, token: str) -> Path:
    """Return the path under which `path` is written until it is whole."""
    return path.parent / f".{path.name}.{token}.part"


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary paths in a folder that killed processes have left; not what this process is writing."""
    found = [path for path in folder.glob(".*.part") if _TEMPORARY.fullmatch(path.name)]
    return [path for path in found if path.absolute() not in _LIVE]


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8 in one rename."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value) -> None:
    """Write `value` as indented UTF-8 JSON in one rename."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Flush a file's or a folder's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
