"""The header of a GGUF file: metadata, and where its tensors lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msft.errors import InputError

_SCALARS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_STRING = 2**24


class GgufTensor(NamedTuple):
    """A tensor's shape (rows first), GGML type number, and absolute offset in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufHeader(NamedTuple):
    """What a GGUF file says about itself, under llama.cpp's names."""

    metadata: dict[str, object]
    tensors: dict[str, GgufTensor]


class _Damaged(Exception):
    pass


def read_header(path: Path) -> GgufHeader:
    """Return a GGUF file's header; raises InputError naming the file when it is damaged or of another version."""
    with open(path, "rb") as file:
        cursor = _Cursor(file, path.stat().st_size)
        try:
            return _header(cursor)
        except _Damaged as error:
            raise InputError(f"{path}: no GGUF file, or truncated or damaged: {error}") from None


class _Cursor:
    """Reads values one after the other, never beyond the end of the file."""

    def __init__(self, file, size: int):
        self.file, self.left = file, size

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise _Damaged(f"{count} bytes wanted where {self.left} are left")
        self.left -= count
        return self.file.read(count)

    def numbers(self, kind: str, count: int) -> list:
        return np.frombuffer(self.bytes(count * np.dtype(kind).itemsize), kind).tolist()

    def number(self, kind: str):
        return self.numbers(kind, 1)[0]

    def text(self) -> str:
        length = self.number("<u8")
        if length > _MAX_STRING:
            raise _Damaged(f"a text of {length} bytes")
        return self.bytes(length).decode("utf-8", "replace")

    def value(self, kind: int):
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _Damaged(f"unknown value type {kind}")
        kind, count = self.number("<u4"), self.number("<u8")
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind], count)
        if kind != _STRING or count > self.left // 8:
            raise _Damaged(f"an array of {count} values of type {kind}")
        return [self.text() for _ in range(count)]


def _header(cursor: _Cursor) -> GgufHeader:
    size = cursor.left
    if cursor.bytes(4) != b"GGUF":
        raise _Damaged("it does not begin with GGUF")
    version, tensor_count, value_count = cursor.number("<u4"), cursor.number("<u8"), cursor.number("<u8")
    if version not in (2, 3):
        raise _Damaged(f"version {version} or a big-endian file (known: little-endian versions 2 and 3)")
    if tensor_count > cursor.left // 24 or value_count > cursor.left // 13:
        raise _Damaged(f"{tensor_count} tensors and {value_count} values in {size} bytes")
    metadata = {}
    for _ in range(value_count):
        name = cursor.text()
        metadata[name] = cursor.value(cursor.number("<u4"))
    tensors = dict(_tensor(cursor) for _ in range(tensor_count))
    if len(tensors) != tensor_count:
        raise _Damaged("a tensor occurs twice")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
        raise _Damaged(f"alignment {alignment!r:.40}")
    start = math.ceil((size - cursor.left) / alignment) * alignment
    return GgufHeader(metadata, {name: info._replace(offset=start + info.offset) for name, info in tensors.items()})


def _tensor(cursor: _Cursor) -> tuple[str, GgufTensor]:
    name = cursor.text()
    dimensions = cursor.number("<u4")
    if dimensions > 8:
        raise _Damaged(f"tensor {name!r:.80} has {dimensions} dimensions")
    # GGUF names the fastest dimension first.
    shape = tuple(reversed(cursor.numbers("<u8", dimensions)))
    return name, GgufTensor(shape, cursor.number("<u4"), cursor.number("<u8"))
