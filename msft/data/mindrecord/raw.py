"""The scalar columns of a row: one small msgpack map of names to numbers and strings (https://msgpack.org)."""

import struct

_NUMBERS = {
    0xCA: ">f", 0xCB: ">d",
    0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_STRING_SIZES = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_MAP_SIZES = {0xDE: ">H", 0xDF: ">I"}

Scalar = int | float | str


def unpack(data: bytes) -> dict[str, Scalar]:
    """Return the map in `data`; raises ValueError when `data` is not one flat map of numbers and strings."""
    try:
        return _map(data)
    except (struct.error, IndexError):
        raise ValueError("the scalar columns of a row end too early") from None


def _map(data: bytes) -> dict[str, Scalar]:
    tag, offset = data[0], 1
    if tag >> 4 == 0x8:
        count = tag & 0x0F
    elif tag in _MAP_SIZES:
        count, offset = _number(data, offset, _MAP_SIZES[tag])
    else:
        raise ValueError(f"the scalar columns of a row begin with byte {tag:#x}, not with a map")
    values = {}
    for _ in range(count):
        name, offset = _value(data, offset)
        values[name], offset = _value(data, offset)
    if offset != len(data):
        raise ValueError(f"the scalar columns of a row take {offset} of {len(data)} bytes")
    return values


def _value(data: bytes, offset: int) -> tuple[Scalar, int]:
    tag, offset = data[offset], offset + 1
    if tag < 0x80:
        return tag, offset
    if tag >= 0xE0:
        return tag - 0x100, offset
    if tag in _NUMBERS:
        return _number(data, offset, _NUMBERS[tag])
    if tag >> 5 == 0b101:
        size = tag & 0x1F
    elif tag in _STRING_SIZES:
        size, offset = _number(data, offset, _STRING_SIZES[tag])
    else:
        raise ValueError(f"a scalar column holds msgpack type {tag:#x}")
    if offset + size > len(data):
        raise ValueError("the scalar columns of a row end too early")
    return data[offset : offset + size].decode("utf-8"), offset + size


def _number(data: bytes, offset: int, layout: str) -> tuple[int | float, int]:
    return struct.unpack_from(layout, data, offset)[0], offset + struct.calcsize(layout)
