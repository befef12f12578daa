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
    classes = _classes(values)
    padded = np.zeros(-(-len(values) // 4) * 4, np.uint8)
    padded[: len(values)] = classes
    wide = _end_of_nonzero(classes)
    head = _narrowed(values[:wide], classes[:wide])
    return len(values).to_bytes(4, "big") + _bitmap(padded) + head + values[wide:].astype(np.int8).tobytes()


def compress_padded(values: np.ndarray, counts: np.ndarray, length: int, padding: int) -> list[bytes]:
    """Return what `compress` makes of each row of a batch after `padding` has filled it up to `length`.

    `values` are those of all rows in a row, little-endian int32, and `counts` how many of them each has, 1 or more.
    """
    classes, fill = _classes(values), np.array([padding], values.dtype)
    padded = np.zeros((len(counts), -(-length // 4) * 4), np.uint8)
    padded[:, :length] = _classes(fill)
    padded[np.arange(padded.shape[1]) < counts[:, None]] = classes
    bitmaps, size = _bitmap(padded.ravel()), padded.shape[1] // 4
    heads, filler = _narrowed(values, classes), _narrowed(fill, _classes(fill))
    stops = _WIDTHS.take(classes).cumsum()[counts.cumsum() - 1].tolist()
    before, rows, begin = length.to_bytes(4, "big"), [], 0
    for number, (count, stop) in enumerate(zip(counts.tolist(), stops, strict=True)):
        bitmap = bitmaps[number * size : (number + 1) * size]
        rows.append(b"".join((before, bitmap, heads[begin:stop], filler * (length - count))))
        begin = stop
    return rows


def _classes(values: np.ndarray) -> np.ndarray:
    """Return the width class of each element."""
    classes = (values != values.astype(np.int8)).view(np.uint8) + (values != values.astype(np.int16))
    if values.itemsize == 8:
        classes += values != values.astype(np.int32)
    return classes


def _bitmap(classes: np.ndarray) -> bytes:
    """Return width classes, a multiple of 4 of them, as two bits each."""
    return (classes[0::4] << 6 | classes[1::4] << 4 | classes[2::4] << 2 | classes[3::4]).tobytes()


def _narrowed(values: np.ndarray, classes: np.ndarray) -> bytes:
    """Return each element in the bytes of its width class."""
    kept = _KEPT[values.itemsize].take(classes).view(bool)
    return np.compress(kept, values.view(np.uint8)).tobytes()


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


def joint_bytes(columns: int) -> int:
    """Return how many bytes of a row's blob are not its columns'."""
    return 8 * columns if columns > 1 else 0


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
