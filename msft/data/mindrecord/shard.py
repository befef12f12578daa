"""One opened shard: its rows by number."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from msft.console import note
from msft.data.mindrecord import codec
from msft.data.mindrecord.ends import ends
from msft.data.mindrecord.header import SIZE_BYTES, Column, Header, numpy_dtype
from msft.data.mindrecord.index import SqliteIndex, WalkedIndex
from msft.data.mindrecord.raw import unpack


class Shard:
    """A shard file and its index, open as long as this object lives.

    Rows are read with `pread`, not through a memory map: a file that shrinks under a map kills the process,
    and mapped pages count as the process's memory. Methods raise ValueError saying what is wrong.
    """

    def __init__(self, path: Path, header: Header):
        self._header = header
        self._file = open(path, "rb", buffering=0)
        database = path.with_name(path.name + ".db")
        if database.exists():
            self._index = SqliteIndex(database, header)
        else:
            note(f"{database} is missing: rows are found by walking {path.name}")
            self._index = WalkedIndex(self._file.fileno(), header)
        self._scalars = [column for column in header.columns if column.name not in header.blob_columns]
        by_name = {column.name: column for column in header.columns}
        self._arrays = [by_name[name] for name in header.blob_columns]

    def row(self, number: int) -> dict[str, np.ndarray]:
        """Return the row's columns in the schema's order."""
        place = self._index.locate(number)
        values = {}
        if self._arrays:
            parts = codec.split(self._read(place.blob, place.blob_end), len(self._arrays))
            values = {column.name: self._array(column, part) for column, part in zip(self._arrays, parts, strict=True)}
        if self._scalars:
            stored = unpack(self._read(place.raw, place.raw_end))
            values.update({column.name: _scalar(column, stored) for column in self._scalars})
        return {column.name: values[column.name] for column in self._header.columns}

    def ends(self, fillers: Mapping[str, int | None]) -> Iterator[np.ndarray]:
        """Yield where the padding of the rows' arrays begins (`ends.ends`), all rows in order."""
        return ends(self._file.fileno(), self._header, fillers)

    def _read(self, start: int, end: int) -> bytes:
        data = os.pread(self._file.fileno(), end - start, start)
        size = int.from_bytes(data[:SIZE_BYTES], "little")
        if len(data) != end - start or SIZE_BYTES + size != len(data):
            raise ValueError(f"its index says {end - start - SIZE_BYTES} bytes at {start}, the file says {size}")
        return data[SIZE_BYTES:]

    def _array(self, column: Column, data: memoryview) -> np.ndarray:
        if column.type == "bytes":
            return np.frombuffer(data, np.uint8).copy()
        dtype = numpy_dtype(column)
        if self._header.compressed and dtype in codec.COMPRESSED:
            values = codec.decompress(data, dtype)
        elif len(data) % dtype.itemsize:
            raise ValueError(f"column {column.name!r} has {len(data)} bytes, no multiple of {dtype.itemsize}")
        else:
            values = np.frombuffer(data, dtype).copy()
        return values if len(column.shape) == 1 and column.shape[0] in (-1, len(values)) else _shaped(values, column)


def _shaped(values: np.ndarray, column: Column) -> np.ndarray:
    try:
        return values.reshape(column.shape)
    except ValueError:
        raise ValueError(f"column {column.name!r} has {values.size} elements for shape {list(column.shape)}") from None


def _scalar(column: Column, stored: dict) -> np.ndarray:
    if column.name not in stored:
        raise ValueError(f"column {column.name!r} is missing")
    value = stored[column.name]
    if (column.type == "string") != isinstance(value, str):
        raise ValueError(f"column {column.name!r} of type {column.type} holds {str(value)[:40]!r}")
    if column.type == "string":
        return np.array(value)
    dtype = numpy_dtype(column)
    if dtype.kind == "i" and not (isinstance(value, int) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max):
        raise ValueError(f"column {column.name!r} of type {column.type} holds {value}")
    return np.array(value, dtype)
