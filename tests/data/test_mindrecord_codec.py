"""Rows that are encoded a batch at a time, in other processes, are those that the writer makes one by one."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msft.data.mindrecord import MindRecordWriter, codec

integers = st.one_of(st.integers(-200, 200), st.integers(-40000, 40000), st.integers(-(2**31), 2**31 - 1))
batches = st.lists(st.lists(integers, min_size=1, max_size=20), min_size=1, max_size=6)


@given(batches, st.integers(0, 9), integers)
@example([[1]], 0, 0)
@example([[-100, 5, 300, 70000]] * 3, 6, 40000)
@settings(max_examples=300, deadline=None)
def test_a_batch_of_padded_rows_is_its_rows(batch, more, padding):
    length = max(map(len, batch)) + more
    rows = [np.array([*row, *[padding] * (length - len(row))], np.int32) for row in batch]
    values, counts = np.concatenate([np.array(row, np.int32) for row in batch]), np.array(list(map(len, batch)))
    assert codec.compress_padded(values, counts, length, padding) == [codec.compress(row) for row in rows]


def test_blobs_make_the_same_files(tmp_path):
    rows = [np.arange(number, number + 50, dtype=np.int32) for number in range(0, 7000, 1000)]
    columns = {"labels": "int32", "ids": "int32"}
    with MindRecordWriter(tmp_path / "one" / "x", columns, shards=2) as writer:
        for row in rows:
            writer.write({"labels": row[::-1], "ids": row})
    with MindRecordWriter(tmp_path / "all" / "x", columns, shards=2) as writer:
        blobs = [codec.join([codec.compress(row), codec.compress(row[::-1].copy())]) for row in rows]
        writer.write_blobs(blobs[:3], 2 * 4 * 50)
        writer.write_blobs(blobs[3:], 2 * 4 * 50)
        assert writer.rows == 7
    for name in ("x0", "x1", "x0.db", "x1.db"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
