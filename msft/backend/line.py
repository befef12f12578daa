"""A batch's real tokens one after another, without padding, and which stretches of them see each other.

Its segments are cut into tiles of queries, each of which sees the keys of its segment up to its own end, so that the
cost of attention follows each example's own square, whatever the length of a row.
"""

from typing import NamedTuple

import numpy as np

from msft.backend.context import Part, part

TILE = 64


class Line(NamedTuple):
    """`places` int64 [tokens]: where the real tokens are in the batch, read row by row; `input_ids` and `position_ids`.

    These are int32 [length]: beyond the tokens the line is filled up with some that see nothing. `pieces` are those of
    `context.Part`: which stretches of the line see which keys; `order` int64 [keys] tells where these are among the
    lines of all ranks that share the batch's rows. `contexts` int64 [pieces] is how many keys of each piece all of its
    queries see, whatever their order.
    """

    places: np.ndarray
    input_ids: np.ndarray
    position_ids: np.ndarray
    pieces: np.ndarray
    order: np.ndarray
    contexts: np.ndarray

    def fill(self, values: np.ndarray) -> np.ndarray:
        """Return the batch's values [rows, length] in the order of the line, 0 where it is filled up."""
        return _filled(values, self.places, len(self.input_ids))


def line(
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    segment_ids: np.ndarray,
    ranks: int = 1,
    rank: int = 0,
    parts: int = 1,
    contexts: np.ndarray | None = None,
) -> Line:
    """Return a rank's part of a batch's arrays, int32 [rows, length], as a line.

    Its length is one of a few and divides into `parts`. `contexts` int64 [rows, length] are those of each token's text.
    """
    own: Part = part(segment_ids, ranks, rank)
    size = length(own.most, parts)
    arrays = (_filled(array, own.places, size) for array in (input_ids, position_ids))
    whole = own.pieces[:, 0] * 0 if contexts is None else contexts.reshape(-1)[own.places[own.pieces[:, 0]]]
    return Line(own.places, *arrays, own.pieces, own.order(size), whole)


def length(tokens: int, parts: int = 1) -> int:
    """Return the length of the line in which so many tokens of the busiest rank stand."""
    return -(-rounded_up(tokens, TILE) // parts) * parts


def _filled(values: np.ndarray, places: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values.reshape(-1)[places], (0, length - len(places)))


def rounded_up(count: int, unit: int, steps: int = 8) -> int:
    """Return a multiple of `unit` of at least `count` and above 0, of which there are `steps` / 2 to each doubling.

    What is compiled for one shape then serves many batches.
    """
    step = max(unit, 2 ** (max(count, 1) - 1).bit_length() // steps)
    return -(-max(count, 1) // step) * step


class Tiles(NamedTuple):
    """Tiles of TILE queries and the keys of their segment from its start on, equally many for each.

    `queries` int32 [tiles, TILE] are places in the line of queries, `keys` int32 [tiles, keys] in that of keys;
    `allowed` bool [tiles, TILE, keys] tells which query sees which key. Where a tile is longer than what is left of its
    piece, and in tiles that only fill up, queries repeat another one: `real` bool [tiles, TILE] is False there.
    `places` int64 [tiles, keys] are the keys' places within their segments.
    """

    queries: np.ndarray
    keys: np.ndarray
    allowed: np.ndarray
    real: np.ndarray
    places: np.ndarray


def tiles(
    pieces: np.ndarray, window: int = 0, contexts: np.ndarray | None = None, is_causal: bool = True
) -> list[Tiles]:
    """Return the tiles of pieces (first, end, start, stop), int64 [n, 4], by number of keys.

    A query sees no more than `window` tokens, itself included (0 = all before it), and in any case the first
    `contexts` int64 [n] (None = 0) of its piece; or where attention is not causal, all keys of its piece. Tiles are
    computed with a few more keys than they see, and a few that only fill up, so that there are few shapes.
    """
    numbers = -(-(pieces[:, 1] - pieces[:, 0]) // TILE)
    first, end, start, stop = np.repeat(pieces, numbers, axis=0).T
    open_to = start + (0 if contexts is None else np.repeat(contexts, numbers))
    place = np.concatenate([np.arange(number) for number in numbers]) if len(pieces) else first
    first, ahead = first + place * TILE, stop - end
    begin = np.maximum(start, first + ahead - window + 1) if window else start
    seen = np.maximum(np.minimum(first + TILE + ahead, stop), open_to) if is_causal else stop
    widths = np.array([_width(-(-int(count) // TILE)) for count in seen - begin], dtype=int)
    pieces = first, end, start, stop, begin, open_to
    return [_tiles(width, window, is_causal, *(of[widths == width] for of in pieces)) for width in np.unique(widths)]


def _width(number: int) -> int:
    """How many tiles of keys are computed for one that sees `number` of them: a power of two, or a multiple of 8."""
    return min(2 ** (number - 1).bit_length(), -(-number // 8) * 8)


def _tiles(width: int, window: int, is_causal: bool, *pieces: np.ndarray) -> Tiles:
    """The tiles whose first queries are `first`, in pieces with these ends of queries, starts and stops of keys.

    What they see begins at `begin`; they see all before `open_to`.
    """
    fill = rounded_up(len(pieces[0]), 1, 4) - len(pieces[0])
    real = np.arange(len(pieces[0]) + fill)[:, None] < len(pieces[0])
    first, end, start, stop, begin, open_to = (np.pad(of, (0, fill), mode="edge")[:, None] for of in pieces)
    keys, queries = begin + np.arange(width * TILE), first + np.arange(TILE)
    real = real & (queries < end)
    queries = np.where(queries < end, queries, queries[:, :1])
    distance = (queries + stop - end)[:, :, None] - keys[:, None]
    allowed = (distance >= 0) & (distance < window) if window else distance >= 0
    allowed = allowed | (keys < open_to)[:, None]
    allowed = allowed if is_causal else np.broadcast_to((keys < stop)[:, None], distance.shape)
    places, keys = keys - start, np.where(keys < stop, keys, 0)
    return Tiles(queries.astype(np.int32), keys.astype(np.int32), allowed, real, places)
