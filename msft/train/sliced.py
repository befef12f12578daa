"""The state of a job whose processes hold parts of it: a file from each of them, together one checkpoint.

`slices/rank-K.safetensors` has the parts of one process under `weights.NAME`, `first_moment.NAME` and
`second_moment.NAME`; its metadata tells of each NAME the shape of the whole and where the part begins (of a part with
one axis: in the flattened whole). Any layout of processes reads them, on either engine.
"""

import json
import math
import os
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msft.backend.contract import Place, StateParts
from msft.convert import safetensors_file
from msft.convert.dtypes import Cast
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored, StoredTensors
from msft.errors import InputError, RunError
from msft.files import atomic_path, new_token, sha256, sync, temporary_path
from msft.train.lazy import Lazy

FOLDER = "slices"
KINDS = ("weights", "first_moment", "second_moment")
WAIT_SECONDS, POLL_SECONDS = 1800.0, 0.05
_PLACES = "places"


class PartFile:
    """The file of a rank's parts while it is written: all kinds in order, each with all names of `places`."""

    def __init__(self, folder: Path, rank: int, places: dict[str, Place]):
        self.folder, self.rank, self.places = folder, rank, places
        self.path = folder / FOLDER / f"rank-{rank}.safetensors"

    def __enter__(self) -> "PartFile":
        infos = {name: TensorInfo(place.shape, "float32") for name, place in self.places.items()}
        tensors = {f"{kind}.{name}": info for kind in KINDS for name, info in infos.items()}
        places = {name: {"shape": place.whole, "start": place.start} for name, place in self.places.items()}
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            file = stack.enter_context(open(temporary, "wb"))
            self.writer = safetensors_file.SafetensorsWriter(file, tensors, {_PLACES: json.dumps(places)})
            self.stack = stack.pop_all()
        return self

    def add(self, kind: str, name: str, array: np.ndarray) -> None:
        """Write the next part, float32."""
        self.writer.add(f"{kind}.{name}", Cast(None).pieces(name, np.ascontiguousarray(array)))

    def __exit__(self, kind, error, traceback) -> None:
        """Let the file appear, then a note of its size and SHA-256, which says that it is whole."""
        if error is None:
            self.writer.close()
        self.stack.__exit__(kind, error, traceback)
        if error is None:
            _say_whole(_note(self.folder, self.rank), {"size": self.path.stat().st_size, "sha256": sha256(self.path)})


def _say_whole(note: Path, entry: dict) -> None:
    """Let the note of a rank appear; nothing follows, for the first rank may rename the folder now."""
    temporary = temporary_path(note, new_token())
    temporary.write_text(json.dumps(entry), encoding="utf-8")
    sync(temporary)
    os.replace(temporary, note)


def write(folder: Path, rank: int, parts: StateParts) -> None:
    """Write the parts of a rank, and the note that says that they are whole."""
    with PartFile(folder, rank, parts.places) as file:
        for kind in KINDS:
            for name in parts.places:
                file.add(kind, name, getattr(parts, kind)[name])


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
    place: Place


class Tensors(Lazy):
    """The whole tensors of one kind of a sliced checkpoint, put together from their parts when they are asked for.

    Raises InputError for files that do not make up whole tensors.
    """

    def __init__(self, folder: Path, kind: str):
        super().__init__({}, self._whole)
        self.folder = folder / FOLDER
        self._parts: dict[str, list[_Part]] = {}
        for path in sorted(self.folder.glob("rank-*.safetensors")):
            self._add(path, kind)
        self._check(kind)

    def _whole(self, name: str) -> np.ndarray:
        whole = np.empty(self.shapes[name], np.float32)
        source = StoredTensors({str(number): part.stored for number, part in enumerate(self._parts[name])})
        for number, part in enumerate(self._parts[name]):
            part.place.of(whole)[...] = source.read(str(number))
        return whole

    def _add(self, path: Path, kind: str) -> None:
        try:
            places = json.loads(safetensors_file.read_metadata(path)[_PLACES])
            found = {name: (_numbers(place["shape"]), _numbers(place["start"])) for name, place in places.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: does not say where its parts belong ({type(error).__name__})") from error
        for key, stored in safetensors_file.read_index(path).items():
            name = key.removeprefix(f"{kind}.")
            if name != key and name in found:
                whole, start = found[name]
                if self.shapes.setdefault(name, whole) != whole:
                    raise InputError(f"{path}: {name!r} has shape {whole}, another rank says {self.shapes[name]}")
                self._parts.setdefault(name, []).append(_Part(stored, Place(whole, start, stored.info.shape)))

    def _check(self, kind: str) -> None:
        for name, parts in self._parts.items():
            if not _are_whole([part.place for part in parts]):
                raise InputError(f"{self.folder}: the parts of {kind.replace('_', ' ')} {name!r} are not the whole")


def _numbers(values: list[int]) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError
    return tuple(values)


def _are_whole(places: list[Place]) -> bool:
    """Whether the parts of a tensor are all of it: ranges one after another, or regions that cover it."""
    sizes = sum(math.prod(place.shape) for place in places)
    if not all(place.fits() for place in places) or sizes != math.prod(places[0].whole):
        return False
    if all(len(place.start) == 1 for place in places):
        ranges = sorted(place.start + place.shape for place in places)
        return all(start + size == following for (start, size), (following, _) in pairwise(ranges))
    return len({len(place.start) for place in places}) == 1 and _are_covering(places)


def _are_covering(places: list[Place]) -> bool:
    """Whether each number lies in a region, by the boxes between all of their edges."""
    ends = [[first + size for first, size in zip(place.start, place.shape, strict=True)] for place in places]
    axes = zip(*(place.start for place in places), strict=True), zip(*ends, strict=True), places[0].whole
    edges = [np.unique([*starts, *stops, 0, size]) for starts, stops, size in zip(*axes, strict=True)]
    covered = np.zeros([len(bounds) - 1 for bounds in edges], bool)
    for place, stops in zip(places, ends, strict=True):
        corners = zip(edges, place.start, stops, strict=True)
        covered[tuple(slice(*np.searchsorted(bounds, (first, stop))) for bounds, first, stop in corners)] = True
    return bool(covered.all())
