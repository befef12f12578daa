"""How long every row of a dataset is, known before any is trained on: what packing and length grouping start from."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache

import numpy as np

from msft import console
from msft.backend.contract import IGNORE
from msft.data.dataset import RowDataset

PATIENCE = 1.0


@lru_cache(maxsize=4)
def row_lengths(dataset: RowDataset, rows: int, pad_id: int) -> np.ndarray:
    """Return the tokens that `collate.align` leaves of each of the first `rows` rows, int32 [rows], not writable.

    The rows' bytes are read, never a file beside them that might be of other data. Raises InputError naming what is
    damaged. A run asks more than once and measures once.
    """
    fillers = {"input_ids": pad_id, "labels": IGNORE} if "labels" in dataset.columns else {"input_ids": None}
    lengths, done = np.empty(rows, np.int32), 0
    for ends in _shown(dataset.ends(fillers), rows):
        taken = lengths[done : done + len(ends)]
        # The last token of a row is only predicted.
        np.maximum(ends[: len(taken)] - 1, 0, out=taken)
        done += len(taken)
        if done == rows:
            break
    lengths.flags.writeable = False
    return lengths


def _shown(pieces: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Yield the pieces; after a second of waiting for them, a bar counts their rows."""
    began, done, bar = time.monotonic(), 0, None
    with ExitStack() as stack:
        for piece in pieces:
            done += len(piece)
            if bar is None and time.monotonic() - began > PATIENCE:
                bar = stack.enter_context(console.progress())
                task = bar.add_task("measuring rows", total=rows)
            if bar:
                bar.update(task, completed=min(done, rows))
            yield piece
