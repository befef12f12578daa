"""Files of torch.save (`.bin`, `.pth`, `.pt`), read without torch: a zip with a pickle and one record per storage.

Storages are kept uncompressed in the zip, so tensors are read in place, one by one. Each record's CRC-32 is verified
once; 0 stands for one that was not computed (`torch.serialization.set_crc32_options(False)`).
"""

import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from msft.convert import torch_pickle
from msft.convert.dtypes import PIECE_BYTES, numpy_dtype
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored
from msft.convert.torch_pickle import PickledTensor
from msft.errors import InputError

LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
MAX_PICKLE = 2**28


def read_index(path: str | os.PathLike, verify: bool = True) -> dict[str, Stored]:
    """Return where each tensor of a state dict lies in a file of torch.save; its records' CRCs are verified first.

    `verify=False` passes over the storages' CRCs, which takes reading the whole file: for a first look at the names.
    Raises InputError naming the file for anything but a flat dict of dense CPU-readable tensors in a sound zip.
    """
    path = Path(path)
    refuse_legacy(path)
    try:
        with zipfile.ZipFile(path) as archive:
            state, records = _read_archive(path, archive, verify)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: no file of torch.save, or truncated or damaged: {error}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}, not a state dict of tensors")
    others = [
        f"{path}: {name!r} is no tensor; save the bare state dict"
        for name, value in state.items()
        if not (isinstance(value, PickledTensor) and isinstance(name, str))
    ]
    if others:
        raise InputError(*others[:20])
    return {name: _stored(path, name, tensor, records) for name, tensor in state.items()}


def refuse_legacy(path: Path) -> None:
    """Raise InputError for a file in torch's format of before version 1.6."""
    with open(path, "rb") as file:
        if file.read(len(LEGACY_START)) == LEGACY_START:
            raise InputError(
                f"{path}: is in torch's old format (before 1.6); save it again with "
                "torch.save(torch.load(FILE, map_location='cpu', weights_only=True), NEW_FILE)"
            )


def _read_archive(path: Path, archive: zipfile.ZipFile, verify: bool) -> tuple[object, dict[str, tuple[int, int]]]:
    pickles = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(f"{path}: is a zip, but no file of torch.save (it has {len(pickles)} data.pkl)")
    if pickles[0].file_size > MAX_PICKLE:
        raise InputError(f"{path}: its pickle of {pickles[0].file_size} bytes is longer than any state dict's")
    root = pickles[0].filename.removesuffix("data.pkl")
    inside = {info.filename.removeprefix(root): info for info in archive.infolist() if info.filename.startswith(root)}
    with open(path, "rb") as file:
        if "byteorder" in inside and _content(path, file, inside["byteorder"]) != b"little":
            raise InputError(f"{path}: was saved on a big-endian machine, which is not supported")
        state = torch_pickle.load(_content(path, file, pickles[0]), str(path))
        records = {}
        for name, info in inside.items():
            if name.startswith("data/"):
                start = _content_offset(path, file, info)
                if verify:
                    _verify(path, file, info, start)
                records[name.removeprefix("data/")] = (start, info.file_size)
    return state, records


def _content_offset(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> int:
    if info.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{path}: record {info.filename} is compressed; torch.save never does that")
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise InputError(f"{path}: damaged at record {info.filename}")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > path.stat().st_size:
        raise InputError(f"{path}: record {info.filename} reaches beyond the end of the file; truncated or damaged")
    return start


def _content(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> bytes:
    start = _content_offset(path, file, info)
    _verify(path, file, info, start)
    file.seek(start)
    return file.read(info.file_size)


def _verify(path: Path, file: BinaryIO, info: zipfile.ZipInfo, start: int) -> None:
    crc, left = 0, info.file_size if info.CRC else 0
    file.seek(start)
    while left:
        block = file.read(min(left, PIECE_BYTES))
        if not block:
            raise InputError(f"{path}: became shorter while it was read")
        crc = zlib.crc32(block, crc)
        left -= len(block)
    if crc != info.CRC:
        raise InputError(
            f"{path}: damaged: record {info.filename} does not fit its CRC-32; copy or save the file again"
        )


def _stored(path: Path, name: str, tensor: PickledTensor, records: dict[str, tuple[int, int]]) -> Stored:
    storage, where = tensor.storage, f"{path}: tensor {name!r}"
    if storage.key not in records:
        raise InputError(f"{where}: its record 'data/{storage.key}' is missing in the file")
    start, length = records[storage.key]
    item = numpy_dtype(tensor.dtype).itemsize
    info = TensorInfo(tensor.shape, tensor.dtype)
    contiguous = _contiguous(tensor)
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)) + 1
    count = math.prod(tensor.shape) if contiguous or 0 in tensor.shape else reach
    if (tensor.offset + count) * item > length:
        raise InputError(f"{where}: reaches beyond its record of {length} bytes; truncated or damaged")
    if math.prod(tensor.shape) * item > length:
        # Strides of 0 repeat elements: a few bytes could claim any amount of memory.
        raise InputError(f"{where}: has {math.prod(tensor.shape)} elements in a record of {length} bytes; save a copy")
    strides = None if contiguous or not count else tensor.strides
    return Stored(info, path, ((start + tensor.offset * item, count * item),), strides)


def _contiguous(tensor: PickledTensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
