"""The safetensors format: a little-endian uint64 header length, a JSON header, then all tensors' bytes.

Format: https://github.com/huggingface/safetensors#format; numpy only, read and written tensor by tensor.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from msft.convert.dtypes import SAFETENSORS, byte_count, numpy_dtype
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored
from msft.errors import InputError

HEADER_LIMIT = 100_000_000
_NAMES = {name: word for word, name in SAFETENSORS.items()}


def read_index(path: str | os.PathLike) -> dict[str, Stored]:
    """Return where each tensor of a safetensors file lies; only the header is read.

    Raises InputError naming the file, and the tensor where one is at fault: a header that is too long or no
    JSON, an unknown dtype, offsets that overlap, leave holes, do not fit the shape, or do not fill the file.
    """
    path = Path(path)
    header, start = _read_header(path)
    header.pop("__metadata__", None)
    stored = {name: _entry(path, name, value, start) for name, value in header.items()}
    position = start
    for name, entry in sorted(stored.items(), key=lambda item: item[1].extents[0]):
        offset, length = entry.extents[0]
        if offset != position:
            raise InputError(f"{path}: tensor {name!r} begins at byte {offset}, but {position} is the next free one")
        position += length
    size = path.stat().st_size
    if position != size:
        raise InputError(f"{path}: has {size} bytes, but its header describes {position}; truncated or damaged")
    return stored


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Return the `__metadata__` of a safetensors file, {} when it has none."""
    header, _ = _read_header(Path(path))
    metadata = header.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def looks_like(start: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with these (9 or more) bytes is meant to be safetensors."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= max(size, HEADER_LIMIT)


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor: the header first, so all names and shapes are known beforehand."""

    def __init__(self, file: BinaryIO, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None):
        self.file = file
        self.waiting = dict(tensors)
        file.write(_header(tensors, {"format": "pt"} if metadata is None else dict(metadata)))

    def add(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        """Write the next tensor's content, given as uint8 pieces; tensors come in the header's order."""
        expected = next(iter(self.waiting))
        if name != expected:
            raise ValueError(f"{name!r} came where {expected!r} was due")
        info = self.waiting.pop(name)
        written = sum(self.file.write(piece) for piece in pieces)
        if written != byte_count(info):
            raise ValueError(f"{name!r} has {written} bytes of content, not {byte_count(info)}")

    def close(self) -> None:
        """Check that every tensor of the header was written."""
        if self.waiting:
            raise ValueError(f"never written: {', '.join(self.waiting)}")


def _read_header(path: Path) -> tuple[dict, int]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > HEADER_LIMIT or length > size - 8:
            raise InputError(f"{path}: no safetensors file, or truncated ({size} bytes, header of {length})")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the safetensors header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: the safetensors header is no JSON object")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _entry(path: Path, name: str, value, start: int) -> Stored:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise InputError(f"{where}: dtype, shape or data_offsets is missing in the header")
    if not isinstance(value["dtype"], str) or value["dtype"] not in SAFETENSORS:
        raise InputError(f"{where}: unsupported dtype {value['dtype']!r}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _whole_numbers(shape) or len(shape) > 32 or not _whole_numbers(offsets) or len(offsets) != 2:
        raise InputError(f"{where}: impossible shape {shape!r:.80} or offsets {offsets!r:.80}")
    info = TensorInfo(tuple(shape), SAFETENSORS[value["dtype"]])
    first, last = offsets
    if last - first != math.prod(shape) * numpy_dtype(info.dtype).itemsize:
        raise InputError(f"{where}: {last - first} bytes of content do not fit {value['dtype']} of shape {shape}")
    return Stored(info, path, ((start + first, last - first),))


def _whole_numbers(value) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _header(tensors: Mapping[str, TensorInfo], metadata: dict[str, str]) -> bytes:
    header: dict = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, info in tensors.items():
        size = byte_count(info)
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
