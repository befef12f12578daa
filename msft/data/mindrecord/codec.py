"""How a row's arrays become bytes: MindRecord's integer compression and the blob that joins the columns.

Format: MindSpore, minddata/mindrecord/meta/shard_column.cc. A compressed array is its length (uint32, big-endian),
two bits of width class per element (first element in the highest bits), and the elements little-endian,
each in the fewest of 1, 2, 4 or 8 bytes that hold it.
"""

import numpy as np

COMPRESSED = (np.dtype("<i4"), np.dtype("<i8"))

_CLASSES_OF_BYTE = (np.arange(256)[:, None] >> [6, 4, 2, 0] & 3).astype(np.uint8).view("<u4").ravel()
_WIDTHS = np.array([1, 2, 4, 8], np.int64)


def _kept_bytes(itemsize: int) -> np.ndarray:
    """Return the bytes stored of an element, for each width class, as a mask in one integer of `itemsize` bytes."""
    kept = np.arange(itemsize) < _WIDTHS[:, None]
    return kept.view(f"<u{itemsize}").ravel()


_KEPT = {4: _kept_bytes(4), 8: _kept_bytes(8)}
_WIDEST = {4: 2, 8: 3}
_FOREIGN_BITS = {4: np.array([24, 16, 0, 0], "<i4"), 8: np.array([56, 48, 32, 0], "<i8")}


def compress(values: np.ndarray) -> bytes:
    """Return the compressed bytes of a 1-D little-endian int32 or int64 array."""
    values = np.ascontiguousarray(values)
    classes = (values != values.astype(np.int8)).view(np.uint8) + (values != values.astype(np.int16))
    if values.itemsize == 8:
        classes += values != values.astype(np.int32)
    padded = np.zeros(-(-len(values) // 4) * 4, np.uint8)
    padded[: len(values)] = classes
    bitmap = padded[0::4] << 6 | padded[1::4] << 4 | padded[2::4] << 2 | padded[3::4]
    wide = _end_of_nonzero(classes)
    kept = _KEPT[values.itemsize].take(classes[:wide]).view(bool)
    head = np.compress(kept, values[:wide].view(np.uint8)).tobytes()
    return len(values).to_bytes(4, "big") + bitmap.tobytes() + head + values[wide:].astype(np.int8).tobytes()


def _end_of_nonzero(values: np.ndarray) -> int:
    """Return where the zeros at the end begin: padding takes one byte an element and need not be sorted out."""
    nonzero = values.nonzero()[0]
    return int(nonzero[-1]) + 1 if len(nonzero) else 0


def decompress(data: memoryview | bytes, dtype: np.dtype) -> np.ndarray:
    """Return the array that `compress` made `data` of; raises ValueError when `data` is not exactly one array."""
    count = int.from_bytes(data[:4], "big")
    body = 4 + -(-count // 4)
    if body + count > len(data):
        raise ValueError(f"an integer array of {count} elements does not fit its {len(data)} bytes")
    bitmap = np.frombuffer(data, np.uint8, body - 4, 4)
    wide = min(count, 4 * _end_of_nonzero(bitmap))
    classes = _CLASSES_OF_BYTE.take(bitmap[: -(-wide // 4)]).view(np.uint8)[:wide]
    if wide and classes.max() > _WIDEST[dtype.itemsize]:
        raise ValueError(f"an integer array holds elements wider than {dtype.name}")
    ends = _WIDTHS.take(classes).cumsum()
    tail = body + (int(ends[-1]) if wide else 0)
    if tail + count - wide != len(data):
        raise ValueError(f"an integer array of {count} elements takes {tail + count - wide} bytes, not {len(data)}")
    values = np.empty(count, dtype)
    values[:wide] = _widen(bytes(data[body:tail]), classes, ends, dtype)
    values[wide:] = np.frombuffer(data, np.int8, count - wide, tail)
    return values


def _widen(data: bytes, classes: np.ndarray, ends: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Read every element as if it had full width, ending at its own end, then shift out what lies before it."""
    full = np.ndarray(len(data) + 1, dtype, bytes(dtype.itemsize) + data, strides=(1,))
    return full.take(ends) >> _FOREIGN_BITS[dtype.itemsize].take(classes)


def join(parts: list[bytes]) -> bytes:
    """Return a row's blob: a lone column as it is, several each behind its size (uint64, big-endian)."""
    if len(parts) == 1:
        return parts[0]
    return b"".join(piece for part in parts for piece in (len(part).to_bytes(8, "big"), part))


def split(blob: bytes, count: int) -> list[memoryview]:
    """Return the `count` columns of a row's blob; raises ValueError when they do not fill it exactly."""
    view = memoryview(blob)
    if count == 1:
        return [view]
    parts, offset = [], 0
    for _ in range(count):
        end = offset + 8 + int.from_bytes(view[offset : offset + 8], "big")
        if offset + 8 > len(view) or end > len(view):
            raise ValueError(f"a column ends at byte {end} of a row of {len(view)} bytes")
        parts.append(view[offset + 8 : end])
        offset = end
    if offset != len(view):
        raise ValueError(f"the columns take {offset} of a row's {len(view)} bytes")
    return parts
