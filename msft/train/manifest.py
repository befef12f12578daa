"""`manifest.json`: sizes and SHA-256 of every file of a folder, so that damage is found before it is used."""

import json
from pathlib import Path

from msft.files import sha256, write_json

NAME = "manifest.json"


def write(folder: Path, known: dict[str, dict] | None = None) -> None:
    """List every file of `folder` with its size in bytes and SHA-256; those that are `known` are not read."""
    known = known or {}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    entries = {name: known.get(name) or _entry(path) for name, path in files.items()}
    write_json(folder / NAME, {"files": entries})


def _entry(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def problems(folder: Path) -> list[str]:
    """Return what is wrong with `folder`, one line a file; an empty list means that it is whole."""
    path = folder / NAME
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
        if not entries:
            return [f"{path} lists no files"]
        return [line for name, entry in entries.items() if (line := _problem(folder, name, entry))]
    except FileNotFoundError:
        return [f"{path} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path} is damaged ({type(error).__name__})"]


def _problem(folder: Path, name: str, entry: dict) -> str:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{folder / NAME}: {name!r} points outside the folder"
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != entry["size"]:
        return f"{path} has {path.stat().st_size} bytes instead of {entry['size']}"
    if sha256(path) != entry["sha256"]:
        return f"{path} is damaged (its SHA-256 is not the recorded one)"
    return ""
