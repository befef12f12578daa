"""Tiles of queries and their windows of keys show exactly the pairs of one segment, whatever the rows look like."""

import numpy as np
import pytest

from msft.backend import tiles


def random_segments(rows, length, seed):
    """Examples of 1 to 200 tokens one behind the other, some with padding before or behind them."""
    random, segments = np.random.default_rng(seed), np.zeros((rows, length), np.int32)
    for row in segments:
        start, number = 0, 1
        while start < length:
            start += int(random.integers(0, 70)) if random.random() < 0.2 else 0
            size = int(random.integers(1, 200))
            row[start : start + size] = number
            start, number = start + size, number + 1
    return segments


def pairs_of(segment_ids):
    """Who sees whom, bool [tokens, tokens], from the definition."""
    row = np.repeat(np.arange(len(segment_ids)), segment_ids.shape[1])
    segment, token = segment_ids.reshape(-1), np.arange(segment_ids.size)
    same = (row[:, None] == row) & (segment[:, None] == segment) & (segment[:, None] != 0)
    return same & (token <= token[:, None])


@pytest.mark.parametrize("rows,length", [(1, 20), (3, 64), (2, 200), (4, 512)])
@pytest.mark.parametrize("seed", range(3))
def test_windows_hold_each_pair_of_a_segment_once_and_no_other(rows, length, seed):
    segment_ids = random_segments(rows, length, seed)
    count = np.zeros((rows * length, rows * length), np.int64)
    for group in tiles.windows(segment_ids)[0]:
        for queries, keys, allowed in zip(*group, strict=True):
            np.add.at(count, np.ix_(queries, keys), allowed)
    np.testing.assert_array_equal(count, pairs_of(segment_ids))


def test_each_token_finds_its_own_query_and_padding_finds_none():
    segment_ids = random_segments(3, 200, 5)
    groups, place = tiles.windows(segment_ids)
    queries = np.concatenate([group.queries.reshape(-1) for group in groups])
    real = segment_ids.reshape(-1) != 0
    np.testing.assert_array_equal(queries[place[real]], np.flatnonzero(real))
    assert (place[~real] == len(queries)).all()


def test_short_examples_cost_little_in_long_rows():
    """128 examples of 64 tokens in one row: no window is wider than two tiles."""
    segment_ids = np.repeat(np.arange(1, 129), 64)[None].astype(np.int32)
    widths = [group.keys.shape[1] for group in tiles.windows(np.roll(segment_ids, 7, axis=1))[0]]
    assert max(widths) == 2 * tiles.TILE


def test_batches_of_one_shape_compile_few_shapes():
    shapes = {
        (len(groups), *(group.queries.shape[0] for group in groups))
        for groups in (tiles.windows(random_segments(4, 512, seed))[0] for seed in range(10))
    }
    assert len(shapes) == 1
    widths = {
        group.keys.shape[1] // tiles.TILE
        for seed in range(10)
        for group in tiles.windows(random_segments(4, 512, seed))[0]
    }
    assert widths <= {1, 2, 3, 4, 6, 8}
