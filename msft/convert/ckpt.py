"""MindSpore's CKPT format, read and written by numpy alone, tensor by tensor.

A file is a bare protobuf message `Checkpoint{repeated Value value=1}` with `Value{tag=1; TensorProto tensor=2}` and
`TensorProto{repeated int64 dims=1 (unpacked); string tensor_type=2; bytes tensor_content=3}`. A tensor above 512 MiB
is several Values in a row with the same tag and the full dims. Files saved with `crc_check=True` end in `crc_num` and
a big-endian CRC-32 of everything before, in 10 bytes.
"""

import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from msft.convert.dtypes import MINDSPORE, PIECE_BYTES, byte_count, numpy_dtype
from msft.convert.protobuf import BYTES, Message, key, varint
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored
from msft.errors import InputError, did_you_mean

SLICE_BYTES = 512 * 2**20
CRC_MARK = b"crc_num"
CRC_TAIL = len(CRC_MARK) + 10
MAX_TAG = 2**16
MAX_TEXT = 2**24
_NAMES = {name: word for word, name in MINDSPORE.items()}


class CkptIndex(NamedTuple):
    """What a CKPT holds: where its tensors lie, and its strings (`append_dict` entries of type str)."""

    tensors: dict[str, Stored]
    texts: dict[str, str]


class _Value(NamedTuple):
    tag: str
    dims: tuple[int, ...]
    kind: str
    offset: int
    length: int


def read_index(path: str | os.PathLike, verify: bool = True) -> CkptIndex:
    """Return what a CKPT holds without reading its tensors; a CRC tail, where present, is verified first.

    `verify=False` passes over the CRC, which takes reading the whole file: for a first look at the names.
    Raises InputError naming the file, and the tensor where one is at fault.
    """
    path = Path(path)
    size = path.stat().st_size
    index = CkptIndex({}, {})
    with open(path, "rb") as file:
        end = _checked_end(path, file, size, verify)
        if end == 0:
            raise InputError(f"{path}: empty, no MindSpore CKPT")
        for parts in _groups(_values(path, file, end), path):
            first = parts[0]
            if first.tag in index.tensors or first.tag in index.texts:
                raise InputError(f"{path}: tensor {first.tag!r} occurs twice")
            if first.kind == "str":
                index.texts[first.tag] = _text(path, file, parts)
            else:
                index.tensors[first.tag] = _stored(path, parts)
    return index


def verify(path: str | os.PathLike) -> None:
    """Raise InputError when a CKPT's content does not fit its CRC tail; the whole file is read."""
    path = Path(path)
    with open(path, "rb") as file:
        _checked_end(path, file, path.stat().st_size, verify=True)


def _checked_end(path: Path, file: BinaryIO, size: int, verify: bool) -> int:
    file.seek(max(0, size - CRC_TAIL))
    tail = file.read(CRC_TAIL)
    if len(tail) < CRC_TAIL or not tail.startswith(CRC_MARK):
        return size
    end, crc = size - CRC_TAIL, 0
    file.seek(0)
    left = end if verify else 0
    block = memoryview(bytearray(min(left, PIECE_BYTES)))
    while left:
        count = file.readinto(block[:left])
        if not count:
            raise InputError(f"{path}: became shorter while it was read")
        crc = zlib.crc32(block[:count], crc)
        left -= count
    if verify and crc != int.from_bytes(tail[len(CRC_MARK) :], "big"):
        raise InputError(f"{path}: damaged: the content does not fit its CRC-32; copy or write the file again")
    return end


def _values(path: Path, file: BinaryIO, end: int):
    for number, position, stop in Message(path, file, 0, end).fields():
        if number != 1:
            raise InputError(f"{path}: no MindSpore CKPT, or damaged (field {number} before byte {position})")
        yield _value(path, file, position, stop)


def _value(path: Path, file: BinaryIO, start: int, end: int) -> _Value:
    tag, tensor = None, None
    message = Message(path, file, start, end)
    for number, position, stop in message.fields():
        if number == 1:
            tag = message.text(position, stop, MAX_TAG)
        elif number == 2:
            tensor = (position, stop)
        elif number == 3:
            raise InputError(f"{path}: {tag!r} is a MapParameter, which is not supported")
        else:
            raise InputError(f"{path}: damaged: unknown field {number} at byte {position}")
    if tag is None or tensor is None:
        raise InputError(f"{path}: damaged: an entry without name or tensor at byte {start}")
    return _tensor(path, file, tag, *tensor)


def _tensor(path: Path, file: BinaryIO, tag: str, start: int, end: int) -> _Value:
    dims: list[int] = []
    kind, content = None, None
    message = Message(path, file, start, end)
    for number, position, stop in message.fields(varints=(1,)):
        if number == 1:
            dims += message.varints(position, stop)
        elif number == 2:
            kind = message.text(position, stop, 64)
        elif number == 3:
            content = (position, stop - position)
        else:
            raise InputError(f"{path}: tensor {tag!r}: damaged: unknown field {number} at byte {position}")
        if len(dims) > 32:
            raise InputError(f"{path}: tensor {tag!r}: damaged: more than 32 dimensions")
    if kind is None or content is None:
        raise InputError(f"{path}: tensor {tag!r}: damaged: type or content is missing")
    return _Value(tag, tuple(dims), kind, *content)


def _groups(values: Iterable[_Value], path: Path):
    group: list[_Value] = []
    for value in values:
        if group and value.tag != group[0].tag:
            yield group
            group = []
        if group and (value.dims, value.kind) != (group[0].dims, group[0].kind):
            raise InputError(f"{path}: tensor {value.tag!r}: its slices disagree on shape or type")
        group.append(value)
    if group:
        yield group


def _stored(path: Path, parts: list[_Value]) -> Stored:
    first = parts[0]
    if first.kind not in MINDSPORE:
        nearest = did_you_mean(first.kind, MINDSPORE)
        raise InputError(f"{path}: tensor {first.tag!r}: unsupported type {first.kind!r}{nearest}")
    dtype = MINDSPORE[first.kind]
    size, length = numpy_dtype(dtype).itemsize, sum(part.length for part in parts)
    # MindSpore reads dims [0] as a scalar.
    shape = () if first.dims == (0,) and length == size else first.dims
    if math.prod(shape) * size != length:
        raise InputError(
            f"{path}: tensor {first.tag!r}: {length} bytes of content do not fit {first.kind} of shape {list(shape)}"
        )
    return Stored(TensorInfo(shape, dtype), path, tuple((part.offset, part.length) for part in parts))


def _text(path: Path, file: BinaryIO, parts: list[_Value]) -> str:
    if sum(part.length for part in parts) > MAX_TEXT:
        raise InputError(f"{path}: text {parts[0].tag!r} is longer than {MAX_TEXT} bytes")
    content = b""
    for part in parts:
        file.seek(part.offset)
        content += file.read(part.length)
    try:
        return content.decode("utf-32-le").rstrip("\0")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: text {parts[0].tag!r} is damaged: {error}") from error


class CkptWriter:
    """Writes a CKPT tensor by tensor to an open file; `close` adds the CRC tail."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.crc = 0

    def add(self, name: str, info: TensorInfo, pieces: Iterable[np.ndarray]) -> None:
        """Write one tensor, its content given as uint8 pieces in C order."""
        left, room = byte_count(info), 0
        if not left:
            self._write(_value_head(name, info, 0))
        for piece in pieces:
            view = memoryview(piece)
            while view:
                if not left:
                    raise ValueError(f"{name!r} has more content than its shape {info.shape} allows")
                if not room:
                    room = min(left, SLICE_BYTES)
                    self._write(_value_head(name, info, room))
                part = view[:room]
                self._write(part)
                view = view[len(part) :]
                room -= len(part)
                left -= len(part)
        if left:
            raise ValueError(f"{name!r} lacks {left} bytes of content")

    def close(self) -> None:
        """Write the CRC tail that MindSpore's `crc_check=True` expects."""
        self.file.write(CRC_MARK + self.crc.to_bytes(10, "big"))

    def _write(self, data) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self.file.write(data)


def _value_head(name: str, info: TensorInfo, length: int) -> bytes:
    kind = _NAMES[info.dtype].encode()
    tensor = b"".join(varint(1 << 3) + varint(dim) for dim in info.shape)
    tensor += key(2, BYTES) + varint(len(kind)) + kind + key(3, BYTES) + varint(length)
    tag = name.encode()
    value = key(1, BYTES) + varint(len(tag)) + tag + key(2, BYTES) + varint(len(tensor) + length) + tensor
    return key(1, BYTES) + varint(len(value) + length) + value
