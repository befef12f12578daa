"""A batch's real tokens one after another, without padding, and which stretches of them see each other.

Its segments are cut into tiles of queries, each of which sees the keys of its segment up to its own end, so that the
cost of attention follows each example's own square, whatever the length of a row.
"""

from typing import NamedTuple

import numpy as np

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


def line(input_ids: np.ndarray, position_ids: np.ndarray, segment_ids: np.ndarray) -> Line:
    """Return a batch's arrays, int32 [rows, length], as a line, whose length is one of a few."""
    places = np.flatnonzero(segment_ids != 0)
    tokens = len(places)
    found = spans(segment_ids)
    segments = np.repeat(np.arange(1, len(found) + 1), found[:, 2] - found[:, 1])
    filling = -np.arange(1, length(tokens) - tokens + 1)
    empty = Line(places, places, places, np.concatenate([segments, filling]).astype(np.int32))
    return empty._replace(input_ids=empty.fill(input_ids), position_ids=empty.fill(position_ids))


def length(tokens: int) -> int:
    """Return the length of the line that so many tokens stand in."""
    return rounded_up(tokens, TILE)


def rounded_up(count: int, unit: int, steps: int = 8) -> int:
    """Return a multiple of `unit` of at least `count` and above 0, of which there are `steps` / 2 to each doubling.

    What is compiled for one shape then serves many batches.
    """
    step = max(unit, 2 ** (max(count, 1) - 1).bit_length() // steps)
    return -(-max(count, 1) // step) * step


class Tiles(NamedTuple):
    """Tiles of TILE queries and the keys of their segment from its start on, equally many for each.

    `queries` int32 [tiles, TILE] and `keys` int32 [tiles, keys] are places in the line; `allowed` bool [tiles, TILE,
    keys] tells which query sees which key. Where a tile is longer than what is left of its segment, and in tiles that
    only fill up, queries repeat another one: `real` bool [tiles, TILE] is False there.
    """

    queries: np.ndarray
    keys: np.ndarray
    allowed: np.ndarray
    real: np.ndarray


def tiles(segments: np.ndarray) -> list[Tiles]:
    """Return the tiles of a line's segments above 0, int32 [length], by number of keys; attention is causal.

    Tiles are computed with a few more keys than they see, and a few that only fill up, so that there are few shapes.
    """
    starts = np.flatnonzero((np.diff(segments, prepend=0) != 0) & (segments > 0))
    counts = np.bincount(segments[segments > 0])[1:]
    numbers = -(-counts // TILE)
    first = np.repeat(starts, numbers)
    place = np.concatenate([np.arange(number) for number in numbers]) if len(starts) else starts
    ends = np.repeat(starts + counts, numbers)
    widths = np.array([_width(int(number) + 1) for number in place], dtype=int)
    return [_tiles(width, *(of[widths == width] for of in (first, ends, place))) for width in np.unique(widths)]


def _width(number: int) -> int:
    """How many tiles of keys are computed for one that sees `number` of them: a power of two, or a multiple of 8."""
    return min(2 ** (number - 1).bit_length(), -(-number // 8) * 8)


def _tiles(width: int, starts: np.ndarray, ends: np.ndarray, numbers: np.ndarray) -> Tiles:
    """The tiles of `numbers` in segments between `starts` and `ends`."""
    fill = rounded_up(len(starts), 1, 4) - len(starts)
    real = np.arange(len(starts) + fill)[:, None] < len(starts)
    starts, ends, numbers = (np.pad(of, (0, fill), mode="edge")[:, None] for of in (starts, ends, numbers))
    keys = starts + np.arange(width * TILE)
    queries = starts + numbers * TILE + np.arange(TILE)
    real = real & (queries < ends)
    queries = np.where(queries < ends, queries, queries[:, :1])
    allowed = queries[:, :, None] >= keys[:, None]
    keys = np.where(keys < ends, keys, 0)
    return Tiles(queries.astype(np.int32), keys.astype(np.int32), allowed, real)
