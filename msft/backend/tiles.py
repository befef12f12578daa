"""Attention within segments as a few dense products: tiles of queries, each with the window of keys that they can see.

The cost follows each example's own square, whatever the length of a row.
"""

from typing import NamedTuple

import numpy as np

TILE = 64


class Windows(NamedTuple):
    """Tiles whose windows have one width: tokens by their place in the batch [rows x length], and who sees whom.

    `queries` int32 [n, TILE], `keys` int32 [n, width], `allowed` bool [n, TILE, width]. Places beyond a row's end or
    before its start hold any token of the batch, and are not allowed.
    """

    queries: np.ndarray
    keys: np.ndarray
    allowed: np.ndarray


def windows(segment_ids: np.ndarray) -> tuple[list[Windows], np.ndarray]:
    """Return the windows of segment ids int32 [rows, length], and where each token's query is among them.

    The latter is int32 [rows x length]: a place in the windows' queries one after another, or their number where the
    token is padding (segment 0), which neither sees nor is seen. Tiles of padding alone are left out.
    """
    rows, length = segment_ids.shape
    segments = np.pad(segment_ids, ((0, 0), (0, -length % TILE)))
    row, tile, width = _tiles(segments)
    found, place, used = [], np.full(segments.shape, -1, np.int64), 0
    for one in np.unique(width):
        mine = width == one
        positions = (tile[mine] * TILE)[:, None] + np.arange(TILE)
        seen = ((tile[mine] + 1 - one) * TILE)[:, None] + np.arange(one * TILE)
        found.append(_windows(segments, length, row[mine][:, None], positions, seen))
        place[row[mine][:, None], positions] = used + np.arange(positions.size).reshape(positions.shape)
        used += positions.size
    place = np.where(segments == 0, used, place)[:, :length]
    return found, place.reshape(-1).astype(np.int32)


def _tiles(segments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row, the number within the row, and the width of the window (in tiles) of each tile that is not padding."""
    columns = np.arange(segments.shape[1])
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    start = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    start = np.where(segments == 0, segments.shape[1], start)
    earliest = start.reshape(len(segments), -1, TILE).min(-1) // TILE
    row, tile = np.nonzero(earliest * TILE < segments.shape[1])
    return row, tile, _rounded(tile + 1 - earliest[row, tile])


def _rounded(width: np.ndarray) -> np.ndarray:
    """Widths rounded up by an eighth at most, so that long rows have few different ones."""
    step = 2 ** np.maximum(np.floor(np.log2(width)).astype(np.int64) - 3, 0)
    return -(-width // step) * step


def _windows(segments: np.ndarray, length: int, row: np.ndarray, positions: np.ndarray, seen: np.ndarray) -> Windows:
    query_segments = segments[row, positions]
    key_segments = np.where(seen >= 0, segments[row, np.maximum(seen, 0)], -1)
    allowed = (query_segments[:, :, None] == key_segments[:, None, :]) & (query_segments[:, :, None] != 0)
    allowed &= seen[:, None, :] <= positions[:, :, None]
    queries, keys = (row * length + np.clip(columns, 0, length - 1) for columns in (positions, seen))
    return Windows(queries.astype(np.int32), keys.astype(np.int32), allowed)
