"""Where the padding of a shard's arrays begins, found without decoding them: page by page, a few microseconds a row.

Padding is one value repeated at an array's end. A compressed array (`codec`) keeps the width classes of its elements
apart from their bytes: as many elements as have the filler's width at the end, so many whole values stand there.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from msft.data.dataset import kept
from msft.data.mindrecord import codec
from msft.data.mindrecord.header import SIZE_BYTES, Column, Header, Page, numpy_dtype

CHUNK_ROWS = 4096

# For each width class and byte of the bitmap: how many of its four elements, counted from the last, are of the class.
_LAST_OF_CLASS = [
    [next((n for n in range(4) if byte >> 2 * n & 3 != kind), 4) for byte in range(256)] for kind in range(4)
]


def ends(descriptor: int, header: Header, fillers: Mapping[str, int | None]) -> Iterator[np.ndarray]:
    """Yield for the shard's rows in order, int32 [n] a piece, how many elements the longest of some columns keeps.

    `fillers` names the columns, each with the value that is cut off at its end (None: nothing is cut). Memory is one
    page. Raises ValueError saying what is wrong for a page that is damaged and for a column that holds no integers.
    """
    by_name = {column.name: column for column in header.columns}
    columns = [
        _Reader(by_name[name], header, fillers[name]) if name in fillers else None for name in header.blob_columns
    ]
    if len(fillers) > sum(column is not None for column in columns):
        raise ValueError(f"columns {', '.join(fillers)} are not all arrays")
    for page in header.pages:
        data = os.pread(descriptor, page.size, page.offset)
        if len(data) != page.size:
            raise ValueError(f"truncated at byte {page.offset + len(data)}")
        yield from _page_ends(data, page, columns)


def _page_ends(data: bytes, page: Page, columns: Sequence["_Reader | None"]) -> Iterator[np.ndarray]:
    start, alone = 0, len(columns) == 1
    for first in range(page.first, page.end, CHUNK_ROWS):
        found = np.empty(min(CHUNK_ROWS, page.end - first), np.int32)
        for number in range(len(found)):
            end = start + SIZE_BYTES + int.from_bytes(data[start : start + SIZE_BYTES], "little")
            position, longest = start + SIZE_BYTES, 0
            for column in columns:
                after = end
                if not alone:
                    position += SIZE_BYTES
                    after = position + int.from_bytes(data[position - SIZE_BYTES : position], "big")
                if after > end or end > len(data):
                    raise ValueError(f"page {page.id} is damaged: a column of row {first + number} ends behind it")
                if column is not None:
                    longest = max(longest, column.end(data, position, after))
                position = after
            found[number] = longest
            start = end
        yield found


class _Reader:
    """Finds the end of one column's arrays; `filler` is what is cut off there."""

    def __init__(self, column: Column, header: Header, filler: int | None):
        self.dtype = np.dtype(object) if column.type == "bytes" else numpy_dtype(column)
        if self.dtype not in codec.COMPRESSED:
            raise ValueError(f"column {column.name!r} holds {column.type}, not token ids")
        self.filler = filler
        self.end = self._compressed if header.compressed else self._plain
        # The filler's width: class, bytes, a bitmap byte of four such elements, and the value as it is stored.
        small = 0 if filler is None else filler
        self.kind = next(kind for kind in range(4) if -(2 ** (8 << kind) // 2) <= small < 2 ** (8 << kind) // 2)
        self.width = 1 << self.kind
        self.bitmap_byte = 0x55 * self.kind
        self.stored = small.to_bytes(self.width, "little", signed=True)

    def _plain(self, data: bytes, start: int, end: int) -> int:
        values = np.frombuffer(data, self.dtype, (end - start) // self.dtype.itemsize, start)
        return kept(values, self.filler)

    def _compressed(self, data: bytes, start: int, end: int) -> int:
        count = int.from_bytes(data[start : start + 4], "big")
        body = start + 4 + -(-count // 4)
        if body + count > end:
            raise ValueError(f"an integer array of {count} elements does not fit its {end - start} bytes")
        if self.filler is None or not count:
            return count
        last = min(self._last_of_width(data[start + 4 : body], count), (end - body) // self.width)
        tail = data[end - last * self.width : end]
        if self.width == 1:
            return count - last + len(tail.rstrip(self.stored))
        return count - last + kept(np.frombuffer(tail, f"<i{self.width}"), self.filler)

    def _last_of_width(self, bitmap: bytes, count: int) -> int:
        """Return how many elements at the end have the filler's width."""
        unused = -count % 4
        if unused:
            # What the last byte holds behind the last element counts as of this width and is taken off again.
            mask = (1 << 2 * unused) - 1
            bitmap = bitmap[:-1] + bytes((bitmap[-1] & ~mask | self.bitmap_byte & mask,))
        others = bitmap.rstrip(bytes((self.bitmap_byte,)))
        some = _LAST_OF_CLASS[self.kind][others[-1]] if others else 0
        return 4 * (len(bitmap) - len(others)) + some - unused
