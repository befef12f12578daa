"""Tensors whose slices lie in several files."""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msft.convert import stored
from msft.convert.dtypes import numpy_dtype
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored, StoredTensors


class Piece(NamedTuple):
    """A stored slice and where in the whole tensor its first element belongs."""

    stored: Stored
    start: tuple[int, ...]


class Joined(NamedTuple):
    """A whole tensor, and the slices that cover it, each element once."""

    info: TensorInfo
    pieces: tuple[Piece, ...]


class JoinedTensors:
    """A TensorSource over tensors of which some are joined from slices; a whole one and a slice are in memory."""

    def __init__(self, entries: Mapping[str, Stored | Joined]):
        self.entries = entries
        self.tensors = {name: entry.info for name, entry in entries.items()}

    def read(self, name: str) -> np.ndarray:
        """Return one tensor; raises InputError naming tensor and file when a file has become too short."""
        entry = self.entries[name]
        if isinstance(entry, Stored):
            return StoredTensors({name: entry}).read(name)
        whole = np.empty(entry.info.shape, numpy_dtype(entry.info.dtype))
        for piece in entry.pieces:
            sizes = piece.stored.info.shape
            region = tuple(slice(first, first + size) for first, size in zip(piece.start, sizes, strict=True))
            whole[region] = StoredTensors({name: piece.stored}).read(name)
        return whole

    def file_of(self, name: str) -> str:
        """Return the path of the (first) file that holds a tensor."""
        return str(file_of(self.entries[name]))

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor's elements in C order as flat arrays, each valid until the next; a whole one if it must."""
        entry = self.entries[name]
        if isinstance(entry, Stored):
            yield from StoredTensors({name: entry}).parts(name)
        elif _is_in_order(entry):
            for piece in entry.pieces:
                yield from StoredTensors({name: piece.stored}).parts(name)
        else:
            yield self.read(name)


def file_of(entry: Stored | Joined) -> Path:
    """Return the (first) file that holds a tensor."""
    return (entry if isinstance(entry, Stored) else entry.pieces[0].stored).file


def _is_in_order(entry: Joined) -> bool:
    """Whether the pieces' elements follow one another in the whole: stacked matrices, or rows."""
    at, shape = 0, entry.info.shape
    for start, size in ((piece.start, piece.stored.info.shape) for piece in entry.pieces):
        within = len(shape) - 1 - next((axis for axis, wide in enumerate(size) if wide > 1), 0)
        if size[len(size) - within :] != shape[len(shape) - within :]:
            return False
        if int(np.ravel_multi_index(start, shape)) != at:
            return False
        at += prod(size)
    return True


def rows(entry: Stored | Joined, start: int, stop: int) -> Stored | Joined:
    """Return the part of a tensor that holds its rows `start` to `stop` (first axis); nothing is read."""
    if isinstance(entry, Stored):
        return stored.rows(entry, start, stop)
    pieces = []
    for piece in entry.pieces:
        top, count = piece.start[0], piece.stored.info.shape[0]
        first, last = max(start, top), min(stop, top + count)
        if first < last:
            part = stored.rows(piece.stored, first - top, last - top)
            pieces.append(Piece(part, (first - start, *piece.start[1:])))
    return Joined(TensorInfo((stop - start, *entry.info.shape[1:]), entry.info.dtype), tuple(pieces))
