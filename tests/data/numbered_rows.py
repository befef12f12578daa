"""Rows that can be told apart in a batch, and what a batch says of them."""

import numpy as np

from msft.backend.contract import IGNORE
from msft.data.dataset import InMemoryDataset

PAD = 0


def numbered(count, length=9, seed=0):
    """Rows that can be told apart: row i begins with token i + 1 and has 2 to `length` real tokens."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        real = int(random.integers(2, length + 1))
        ids = np.zeros(length, np.int32)
        ids[:real] = [number + 1, *random.integers(1, 99, real - 1)]
        labels = np.where(np.arange(length) < real, ids, IGNORE).astype(np.int32)
        labels[0] = IGNORE
        rows.append({"input_ids": ids, "labels": labels})
    return InMemoryDataset(rows)


def rows_in(batch):
    """The data rows of a batch by their first token, None for fill rows."""
    return [int(ids[0]) - 1 if real[0] else None for ids, real in zip(batch.input_ids, batch.segment_ids, strict=True)]


def assert_same(a, b):
    for name in ("input_ids", "labels", "position_ids", "segment_ids", "row_ids"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)
