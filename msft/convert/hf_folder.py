"""A Hugging Face model folder: safetensors or `.bin`, one file or shards under an index."""

import json
from collections.abc import Callable
from pathlib import Path

from msft.convert import safetensors_file, torch_file
from msft.convert.stored import Stored
from msft.errors import InputError

Reader = Callable[[Path], dict[str, Stored]]

# In transformers' order of preference.
_LAYOUTS: tuple[tuple[str, Reader], ...] = (
    ("model.safetensors", safetensors_file.read_index),
    ("model.safetensors.index.json", safetensors_file.read_index),
    ("pytorch_model.bin", torch_file.read_index),
    ("pytorch_model.bin.index.json", torch_file.read_index),
)


def weights_file(folder: Path) -> Path | None:
    """Return the weight file or index of a folder that transformers would take, None when there is none."""
    return next((folder / name for name, _ in _LAYOUTS if (folder / name).exists()), None)


def read_index(file: Path) -> dict[str, Stored]:
    """Return where each tensor lies, given the folder's weight file or index (`weights_file`)."""
    reader = safetensors_file.read_index if "safetensors" in file.name else torch_file.read_index
    return _read_shards(file, reader) if file.name.endswith(".index.json") else reader(file)


def read_weight_map(index: Path) -> dict[str, str]:
    """Return tensor -> shard file name of an index; raises InputError for shards outside the index's folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: 'weight_map' is missing or empty")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise InputError(f"{index}: tensor {name!r:.200} has {shard!r:.80} instead of a file name")
    folder = index.parent.resolve()
    shards = sorted(set(weight_map.values()))
    escaping = [shard for shard in shards if not inside(folder, shard)]
    if escaping:
        raise InputError(*(f"{index}: points to {shard!r:.200}, outside its folder" for shard in escaping[:20]))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise InputError(*(f"{index}: shard {_shown(shard)} is missing beside it" for shard in missing[:20]))
    return weight_map


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 200 else f"{name!r:.200}"


def inside(folder: Path, name: str) -> bool:
    """Whether a relative file name stays inside a folder.

    A link to a file beside the folder's real place is followed as Hugging Face's cache lays it out:
    `snapshots/REVISION/FILE` -> `../../blobs/HASH`.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        return False
    target = (folder / name).resolve()
    if target.is_relative_to(folder):
        return True
    return folder.parent.name == "snapshots" and target.is_relative_to(folder.parent.parent / "blobs")


def read_json(path: Path) -> dict:
    """Return the object in a JSON file; raises InputError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: is no JSON object")
    return value


def _read_shards(index: Path, reader: Reader) -> dict[str, Stored]:
    weight_map = read_weight_map(index)
    stored: dict[str, Stored] = {}
    problems = []
    for shard in dict.fromkeys(weight_map.values()):
        file = index.parent / shard
        found = reader(file)
        promised = [name for name, holder in weight_map.items() if holder == shard]
        problems += [
            f"{file}: lacks tensor {name!r} that {index.name} promises" for name in promised if name not in found
        ]
        stored |= {name: entry for name, entry in found.items() if weight_map.get(name, shard) == shard}
    if problems:
        raise InputError(*problems[:20])
    return stored
