"""A batch's real tokens one after another, without padding, and which stretches of them see each other.

The line is cut into tiles. Attention is computed for pairs of a tile of queries and a tile of keys that share a
segment, so that its cost follows each example's own square, whatever the length of a row.
"""

from typing import NamedTuple

import numpy as np

from msft.backend.contract import Batch
from msft.backend.segments import spans

TILE = 64


class Line(NamedTuple):
    """`places` int64 [tokens]: where the real tokens are in the batch, read row by row; the rest int32 [length].

    Beyond the tokens the line is filled up with tokens that are segments of their own (below 0, others above).
    """

    places: np.ndarray
    input_ids: np.ndarray
    position_ids: np.ndarray
    segments: np.ndarray

    def fill(self, values: np.ndarray) -> np.ndarray:
        """Return the batch's values [rows, length] in the order of the line, 0 where it is filled up."""
        return np.pad(values.reshape(-1)[self.places], (0, len(self.segments) - len(self.places)))


def line(batch: Batch) -> Line:
    """Return a batch as a line, whose length is one of a few."""
    places = np.flatnonzero(batch.segment_ids != 0)
    tokens = len(places)
    found = spans(batch.segment_ids)
    segments = np.repeat(np.arange(1, len(found) + 1), found[:, 2] - found[:, 1])
    filling = -np.arange(1, rounded_up(tokens, TILE) - tokens + 1)
    empty = Line(places, places, places, np.concatenate([segments, filling]).astype(np.int32))
    return empty._replace(input_ids=empty.fill(batch.input_ids), position_ids=empty.fill(batch.position_ids))


def rounded_up(count: int, unit: int) -> int:
    """Return a number of at least `count` and of `unit`, larger by an eighth at most, out of a few.

    What is compiled for one shape then serves many batches.
    """
    step = max(unit, 2 ** (max(count, 1) - 1).bit_length() // 16)
    return -(-max(count, 1) // step) * step


class Pairs(NamedTuple):
    """Tiles that see each other: their numbers, int32 [pairs], and which query sees which key, bool [pairs, TILE, TILE].

    The first tile's pair with itself, without anyone who sees, fills the list up.
    """

    queries: np.ndarray
    keys: np.ndarray
    allowed: np.ndarray


def pairs(segments: np.ndarray) -> Pairs:
    """Return the pairs of a line's segments, int32 [length], a multiple of TILE; attention is causal within each."""
    order = np.arange(len(segments))
    begins = np.diff(segments, prepend=0) != 0
    first = np.maximum.accumulate(np.where(begins, order, 0))[::TILE] // TILE
    tiles = np.arange(len(first))
    queries = np.repeat(tiles, tiles - first + 1)
    keys = np.concatenate([np.arange(start, tile + 1) for tile, start in zip(tiles, first, strict=True)])
    of_tile, place = segments.reshape(-1, TILE), order.reshape(-1, TILE)
    allowed = of_tile[queries][:, :, None] == of_tile[keys][:, None, :]
    allowed &= place[queries][:, :, None] >= place[keys][:, None, :]
    fill = rounded_up(len(queries), 4) - len(queries)
    queries, keys = (np.pad(numbers, (0, fill)).astype(np.int32) for numbers in (queries, keys))
    return Pairs(queries, keys, np.pad(allowed, ((0, fill), (0, 0), (0, 0))))
