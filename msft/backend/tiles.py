"""Attention within segments as a few dense products: tiles of queries, each with the window of keys that they can see.

The cost follows each example's own square, whatever the length of a row.
"""

from typing import NamedTuple

import numpy as np

TILE = 64
ABSENT = -1


class Windows(NamedTuple):
    """A group of query tiles with windows of one width: tokens by their place in the batch, and who sees whom.

    `queries` int32 [n, TILE], `keys` int32 [n, width], `allowed` bool [n, TILE, width]. Places beyond a row's end or
    before its start hold any token of the batch, and are not allowed.
    """

    queries: np.ndarray
    keys: np.ndarray
    allowed: np.ndarray


def group_size(rows: int, length: int) -> int:
    """Return how many tiles stand in a group: few in small batches, whose tiles differ more."""
    return min(max(rows * -(-length // TILE) // 4, 4), 16)


def windows(segment_ids: np.ndarray) -> tuple[list[Windows], np.ndarray]:
    """Return groups of windows for segment ids int32 [rows, length], and where each token's query is among them.

    The latter is int32 [rows x length]: a place in the groups' queries one after another, or their number where the
    token is padding (segment 0), which neither sees nor is seen. All batches of one shape have as many groups, with
    widths out of a few, so that few shapes are compiled.
    """
    rows, length = segment_ids.shape
    segments = np.pad(segment_ids, ((0, 0), (0, -length % TILE)))
    width = _widths(segments).reshape(-1)
    order, size = np.argsort(-width, kind="stable"), group_size(rows, length)
    # The last group is filled up with tiles that see nothing.
    order = np.pad(order, (0, -len(order) % size), constant_values=ABSENT)
    groups = [_windows(segments, length, tiles, int(width[tiles[0]])) for tiles in order.reshape(-1, size)]
    place = np.empty((len(width), TILE), np.int64)
    place[order[: len(width)]] = np.arange(width.size * TILE).reshape(-1, TILE)
    place = np.where(segments == 0, order.size * TILE, place.reshape(segments.shape))[:, :length]
    return groups, place.reshape(-1).astype(np.int32)


def _widths(segments: np.ndarray) -> np.ndarray:
    """The number of tiles in the window of each tile [rows, tiles], its own included, rounded up by a third at most."""
    columns = np.arange(segments.shape[1])
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    start = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    start = np.where(segments == 0, columns, start)
    width = columns[::TILE] // TILE + 1 - start.reshape(len(segments), -1, TILE).min(-1) // TILE
    step = 2 ** np.maximum(np.floor(np.log2(width)).astype(np.int64) - 1, 0)
    return -(-width // step) * step


def _windows(segments: np.ndarray, length: int, tiles: np.ndarray, width: int) -> Windows:
    row, tile = np.divmod(np.maximum(tiles, 0)[:, None], segments.shape[1] // TILE)
    positions = tile * TILE + np.arange(TILE)
    seen = (tile + 1 - width) * TILE + np.arange(width * TILE)
    query_segments = segments[row, positions]
    key_segments = np.where(seen >= 0, segments[row, np.maximum(seen, 0)], -1)
    allowed = (query_segments[:, :, None] == key_segments[:, None, :]) & (query_segments[:, :, None] != 0)
    allowed &= (seen[:, None, :] <= positions[:, :, None]) & (tiles != ABSENT)[:, None, None]
    queries, keys = (row * length + np.clip(columns, 0, length - 1) for columns in (positions, seen))
    return Windows(queries.astype(np.int32), keys.astype(np.int32), allowed)
