"""What preprocessed files were made from, so that they are not made a second time from the same.

The report beside the files records a digest of all that they follow from, and the files' own digests. A report
without files, files without a report (an interrupted run) and files that are not as they were written count for
nothing.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msft import files
from msft.data.tokenizer_files import ICE_TEXT, TEMPLATE_FOLDER, TOKENIZER_FILES
from msft.errors import InputError

# One more whenever the same data, tokenizer and settings would give other rows.
FORMAT = 1
_LIBRARIES = ("tokenizers", "sentencepiece", "fschat", "jinja2")


@dataclass(frozen=True)
class Origin:
    """A digest of data, tokenizer, settings and program (64 hex digits), and the data as it was then."""

    digest: str
    stamps: tuple[tuple[str, int, int], ...]

    def is_unchanged(self) -> bool:
        """Whether the data still has the size and time that it had when it was read for the digest."""
        return self.stamps == _stamps([path for path, *_ in self.stamps])


def origin(data: Sequence[str], model_file: str, settings: dict) -> Origin:
    """Return the origin of what is made of the files `data`; reads them and the tokenizer's files once.

    `settings` is everything else that the result depends on, as JSON has it. Raises InputError naming a file that
    cannot be read.
    """
    stamps = _stamps(data)
    libraries = {name: _version(name) for name in _LIBRARIES}
    parts = [FORMAT, libraries, settings]
    named = [*((path, path) for path in data), *_of_tokenizer(model_file)]
    parts += [[name, _sha256(path)] for name, path in named]
    return Origin(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), stamps)


def record(made_from: Origin, outputs: Sequence[Path]) -> dict:
    """Return what a report says about its files and what they were made from."""
    return {"made_from": made_from.digest, "files": _contents(outputs)}


def is_made(report: Path, made_from: Origin, outputs: Sequence[Path]) -> bool:
    """Whether the report records this origin and the files are, byte for byte, those that it records."""
    try:
        recorded = json.loads(report.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(recorded, dict) or recorded.get("made_from") != made_from.digest:
        return False
    return all(path.is_file() for path in outputs) and recorded.get("files") == _contents(outputs)


def _contents(outputs: Sequence[Path]) -> dict:
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in outputs}


def _of_tokenizer(model_file: str) -> list[tuple[str, Path]]:
    """Return the files that a tokenizer is read from, each with the name that it has there."""
    path = Path(model_file)
    folder = path.parent if path.name == "tokenizer.json" else path
    if not folder.is_dir():
        return [(path.name if path.name == ICE_TEXT else "tokenizer.model", path)]
    found = [folder / name for name in (*TOKENIZER_FILES, "config.json")]
    found += sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    return [(path.relative_to(folder).as_posix(), path) for path in found if path.is_file()]


def _stamps(paths: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
    found = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            found.append((path, -1, -1))
        else:
            found.append((path, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _sha256(path: str | Path) -> str:
    try:
        return files.sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""
