"""A MindRecord file with the smallest header and pages that the format allows: 16 and 32 KiB."""

import numpy as np
import pytest

from msft.data.mindrecord import MindRecordWriter, shard_writer

ROWS = 12
HEADER, PAGE = 1 << 14, 1 << 15


def write_small(path, shards: int = 1, ids: tuple[int, int] = (-(10**6), 10**6), labels: int = 500):
    """Write 12 rows of 700 ids between two bounds, and their first `labels` (2 blob pages in one shard)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "HEADER_SIZE", HEADER)
        patch.setattr(shard_writer, "PAGE_SIZE", PAGE)
        random = np.random.default_rng(0)
        with MindRecordWriter(path, {"input_ids": "int32", "labels": "int32"}, shards) as writer:
            for _ in range(ROWS):
                row = random.integers(*ids, 700).astype(np.int32)
                writer.write({"input_ids": row, "labels": row[:labels]})
    return path
