"""The state of a job whose processes hold parts of it: a file from each of them, together one checkpoint.

`slices/rank-K.safetensors` has the parts of one process under `weights.NAME`, `first_moment.NAME` and
`second_moment.NAME`; its metadata tells of each NAME the shape of the whole and where the part begins. Any layout of
processes reads them, on either engine.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msft.backend.contract import StateParts
from msft.convert import safetensors_file
from msft.convert.dtypes import Cast
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored, StoredTensors
from msft.errors import InputError, RunError
from msft.files import atomic_path, sha256, write_json

FOLDER = "slices"
KINDS = ("weights", "first_moment", "second_moment")
WAIT_SECONDS, POLL_SECONDS = 1800.0, 0.05
_PLACES = "places"


def write(folder: Path, rank: int, parts: StateParts) -> None:
    """Write the parts of a rank, then a note of their size and SHA-256, which says that they are whole."""
    path = folder / FOLDER / f"rank-{rank}.safetensors"
    arrays = {f"{kind}.{name}": array for kind in KINDS for name, array in getattr(parts, kind).items()}
    tensors = {name: TensorInfo(array.shape, array.dtype.name) for name, array in arrays.items()}
    places = {name: {"shape": place.shape, "start": place.start} for name, place in parts.places.items()}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        writer = safetensors_file.SafetensorsWriter(file, tensors, {_PLACES: json.dumps(places)})
        for name, array in arrays.items():
            writer.add(name, Cast(None).pieces(name, array))
        writer.close()
    write_json(_note(folder, rank), {"size": path.stat().st_size, "sha256": sha256(path)})


def wait(folder: Path, ranks: int) -> dict[str, dict]:
    """Wait until all ranks have written; returns size and SHA-256 by the files' names in `folder`.

    Raises RunError naming the ranks whose parts do not appear.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while missing := [rank for rank in range(ranks) if not _note(folder, rank).is_file()]:
        if time.monotonic() > deadline:
            names = ", ".join(map(str, missing))
            raise RunError(
                f"{folder}: the parts of rank {names} did not appear within {WAIT_SECONDS:.0f} s: output_dir must be a "
                "folder that all machines share"
            )
        time.sleep(POLL_SECONDS)
    return {f"{FOLDER}/rank-{rank}.safetensors": json.loads(_note(folder, rank).read_text()) for rank in range(ranks)}


def _note(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank}.json"


def is_sliced(folder: Path) -> bool:
    """Whether a checkpoint is of parts."""
    return (folder / FOLDER).is_dir()


class _Part(NamedTuple):
    stored: Stored
    start: tuple[int, ...]


class Tensors(Mapping[str, np.ndarray]):
    """The whole tensors of one kind of a sliced checkpoint, put together from their parts when they are asked for.

    `shapes` are the wholes'. Raises InputError for files that do not make up whole tensors.
    """

    def __init__(self, folder: Path, kind: str):
        self.folder = folder / FOLDER
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[_Part]] = {}
        for path in sorted(self.folder.glob("rank-*.safetensors")):
            self._add(path, kind)
        self._check(kind)

    def __getitem__(self, name: str) -> np.ndarray:
        whole = np.empty(self.shapes[name], np.float32)
        source = StoredTensors({str(number): part.stored for number, part in enumerate(self._parts[name])})
        for number, part in enumerate(self._parts[name]):
            whole[_region(part)] = source.read(str(number))
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _add(self, path: Path, kind: str) -> None:
        try:
            places = json.loads(safetensors_file.read_metadata(path)[_PLACES])
            found = {name: (tuple(place["shape"]), tuple(place["start"])) for name, place in places.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: does not say where its parts belong ({type(error).__name__})") from error
        for key, stored in safetensors_file.read_index(path).items():
            name = key.removeprefix(f"{kind}.")
            if name != key and name in found:
                shape, start = found[name]
                if self.shapes.setdefault(name, shape) != shape:
                    raise InputError(f"{path}: {name!r} has shape {shape}, another rank says {self.shapes[name]}")
                self._parts.setdefault(name, []).append(_Part(stored, start))

    def _check(self, kind: str) -> None:
        for name, parts in self._parts.items():
            sizes = sum(math.prod(part.stored.info.shape) for part in parts)
            apart = len({part.start for part in parts}) == len(parts)
            inside = all(_fits(part, self.shapes[name]) for part in parts)
            if not (apart and inside and sizes == math.prod(self.shapes[name])):
                raise InputError(f"{self.folder}: the parts of {kind.replace('_', ' ')} {name!r} are not the whole")


def _region(part: _Part) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(part.start, part.stored.info.shape, strict=True))


def _fits(part: _Part, shape: tuple[int, ...]) -> bool:
    if len(part.start) != len(shape) or len(part.stored.info.shape) != len(shape):
        return False
    return all(0 <= place.start and place.stop <= size for place, size in zip(_region(part), shape, strict=True))
