"""Tensors that lie in files as plain bytes, whatever the format around them."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msft.convert.dtypes import PIECE_BYTES, byte_count, numpy_dtype
from msft.convert.source import TensorInfo
from msft.errors import InputError


class Stored(NamedTuple):
    """Where a tensor's little-endian content lies: (offset, bytes) extents of a file, one after the other.

    `strides` (in elements) is given when the content is not in C order; extents then hold what the strides reach.
    """

    info: TensorInfo
    file: Path
    extents: tuple[tuple[int, int], ...]
    strides: tuple[int, ...] | None = None


class StoredTensors:
    """A TensorSource over stored tensors of one or several files; files are opened for each read only."""

    def __init__(self, stored: Mapping[str, Stored]):
        self.stored = stored
        self.tensors = {name: entry.info for name, entry in stored.items()}

    def read(self, name: str) -> np.ndarray:
        """Return one tensor; raises InputError naming tensor and file when the file has become too short."""
        entry = self.stored[name]
        dtype = numpy_dtype(entry.info.dtype)
        content = np.empty(sum(length for _, length in entry.extents), np.uint8)
        _fill(content, name, entry)
        if entry.strides is None:
            return content.view(dtype).reshape(entry.info.shape)
        steps = tuple(stride * dtype.itemsize for stride in entry.strides)
        return np.lib.stride_tricks.as_strided(content.view(dtype), entry.info.shape, steps)

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor's elements in C order as flat arrays of about a megabyte, each valid until the next.

        The next one is read, in a thread of its own, while the caller is busy with this one.
        """
        entry = self.stored[name]
        if entry.strides is not None:
            yield self.read(name)
            return
        size, dtype = byte_count(entry.info), numpy_dtype(entry.info.dtype)
        buffers = np.empty((2, min(size, PIECE_BYTES)), np.uint8)

        def read(number: int) -> np.ndarray:
            start = number * PIECE_BYTES
            piece = buffers[number % 2, : size - start]
            _fill(piece, name, _section(entry, start, start + len(piece)))
            return piece.view(dtype)

        yield from _one_ahead(read, -(-size // PIECE_BYTES))

    def file_of(self, name: str) -> str:
        """Return the path of the file that holds a tensor."""
        return str(self.stored[name].file)


def _one_ahead(read: Callable[[int], np.ndarray], count: int) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor(1) as thread:
        pending = deque()
        for number in range(count):
            pending.append(thread.submit(read, number))
            if number:
                yield pending.popleft().result()
        if pending:
            yield pending.popleft().result()


def rows(entry: Stored, start: int, stop: int) -> Stored:
    """Return the part of a stored tensor that holds its rows `start` to `stop` (first axis); nothing is read."""
    count = entry.info.shape[0]
    row_bytes = byte_count(entry.info) // count if count else 0
    info = TensorInfo((stop - start, *entry.info.shape[1:]), entry.info.dtype)
    return _section(entry, start * row_bytes, stop * row_bytes)._replace(info=info)


def _section(entry: Stored, first: int, last: int) -> Stored:
    extents, position = [], 0
    for offset, length in entry.extents:
        low, high = max(first - position, 0), min(last - position, length)
        if low < high:
            extents.append((offset + low, high - low))
        position += length
    return entry._replace(extents=tuple(extents))


@contextlib.contextmanager
def readable(path: str | os.PathLike):
    """Turn the system's refusals to read (no permission, a broken disk) into one InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error


def _fill(content: np.ndarray, name: str, entry: Stored) -> None:
    position = 0
    try:
        with open(entry.file, "rb", buffering=0) as file:
            for offset, length in entry.extents:
                file.seek(offset)
                view = memoryview(content)[position : position + length]
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise InputError(f"{entry.file}: ends inside tensor {name!r} (byte {file.tell()})")
                    view = view[count:]
                position += length
    except OSError as error:
        raise InputError(f"{entry.file}: tensor {name!r} cannot be read: {os.strerror(error.errno or 5)}") from error
