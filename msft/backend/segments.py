"""Where the examples of a batch lie: attention is computed within these ranges and nowhere else."""

import numpy as np


def spans(segment_ids: np.ndarray) -> np.ndarray:
    """Return (row, start, end) of each run of equal segment ids, padding (0) left out, int64 [n, 3] in reading order.

    `segment_ids` int32 [rows, length]; a run ends with its row.
    """
    bordered = np.pad(segment_ids, ((0, 0), (1, 1)))
    changes = bordered[:, 1:] != bordered[:, :-1]
    row, start = np.nonzero(changes[:, :-1] & (segment_ids != 0))
    _, end = np.nonzero(changes[:, 1:] & (segment_ids != 0))
    return np.column_stack((row, start, end + 1))


def places(pieces: np.ndarray, length: int) -> np.ndarray:
    """Return each token's place in its example, int32 [length], of a line with these pieces (`context.Part`).

    Tokens that fill the line up are the first of examples of their own.
    """
    found = np.zeros(length, np.int32)
    for first, end, *_ in pieces.tolist():
        found[first:end] = np.arange(end - first)
    return found
