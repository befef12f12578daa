"""Protects a batch's real tokens as a line and its tiles: every token once, each key that a query may see, no other."""

import numpy as np
import pytest

from msft.backend import context, line
from msft.backend.line import Tiles, rounded_up, tiles

SEGMENTS = np.array([[1, 1, 2, 0], [0, 1, 2, 2]], np.int32)


def test_a_line_is_the_real_tokens_in_reading_order_filled_up_with_lonely_ones(monkeypatch):
    monkeypatch.setattr(line, "TILE", 4)
    ids, positions = np.arange(10, 18).reshape(2, 4), np.array([[0, 1, 0, 0], [0, 0, 0, 1]])
    found = line.line(ids, positions, SEGMENTS)
    assert found.places.tolist() == [0, 1, 2, 5, 6, 7]
    assert found.input_ids.tolist() == [10, 11, 12, 15, 16, 17, 0, 0]
    assert found.position_ids.tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
    assert found.pieces.tolist() == [[0, 2, 0, 2], [2, 3, 2, 3], [3, 4, 3, 4], [4, 6, 4, 6]]
    assert found.order.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.fill(ids * 2).tolist() == [20, 22, 24, 30, 32, 34, 0, 0]


def test_a_batch_of_padding_is_a_line_without_tiles():
    nothing = np.zeros((2, 4), np.int32)
    found = line.line(nothing, nothing, nothing)
    assert len(found.places) == 0 and len(found.input_ids) == line.TILE
    assert tiles(found.pieces) == []


def test_a_ranks_line_is_as_long_as_the_busiest_ones(monkeypatch):
    """Examples of 2, 1, 1 and 2 tokens: the first's go to ranks 0 and 1, the next to 1 and 0, the last's to 1 and 0."""
    monkeypatch.setattr(line, "TILE", 1)
    ids, positions = np.arange(10, 18).reshape(2, 4), np.array([[0, 1, 0, 0], [0, 0, 0, 1]])
    lines = [line.line(ids, positions, SEGMENTS, 2, rank) for rank in range(2)]
    assert [found.input_ids.tolist() for found in lines] == [[10, 15, 17], [11, 12, 16]]
    assert [found.position_ids.tolist() for found in lines] == [[0, 0, 1], [1, 0, 0]]
    assert lines[0].order.tolist() == lines[1].order.tolist() == [0, 3, 4, 1, 5, 2]
    assert lines[1].pieces.tolist() == [[0, 1, 0, 2], [1, 2, 2, 3], [2, 3, 4, 5]]


def test_tiles_worked_by_hand(monkeypatch):
    """Segments of three and one token, tiles of two: one tile of the first has two tiles of keys."""
    monkeypatch.setattr(line, "TILE", 2)
    narrow, wide = tiles(np.array([[0, 3, 0, 3], [3, 4, 3, 4]]))
    expected = Tiles(
        np.array([[0, 1], [3, 3]]),
        np.array([[0, 1], [3, 0]]),
        np.array([[[1, 0], [1, 1]], [[1, 0], [1, 0]]], bool),
        np.array([[1, 1], [1, 0]], bool),
        np.array([[0, 1], [0, 1]]),
    )
    for found, wanted in zip(narrow, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert wide.queries.tolist() == [[2, 2]] and wide.keys.tolist() == [[0, 1, 2, 0]]
    assert wide.allowed.astype(int).tolist() == [[[1, 1, 1, 0]] * 2] and wide.real.tolist() == [[True, False]]


@pytest.mark.parametrize("window", [0, 1, 50, 100, 700])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("lengths", [[1], [64, 65], [5, 700, 1100, 64, 130, 1, 1, 1, 90, 12, 60, 33]])
def test_tiles_hold_every_query_once_and_exactly_the_keys_before_it(lengths, ranks, window):
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    seen = np.zeros((len(segments), len(segments)), int)
    for part in (context.part(segments[None], ranks, rank) for rank in range(ranks)):
        for group in tiles(part.pieces, window):
            queries, keys = np.broadcast_arrays(group.queries[:, :, None], group.keys[:, None])
            chosen = group.allowed & group.real[:, :, None]
            np.add.at(seen, (part.places[queries[chosen]], keys[chosen]), 1)
    order = np.arange(len(segments))
    distance = order[:, None] - order
    near = (distance >= 0) & (distance < (window or len(order)))
    np.testing.assert_array_equal(seen, (segments[:, None] == segments) & near)


def test_a_window_takes_no_keys_that_nobody_sees():
    """1000 tokens with a window of 100: a tile of 64 queries sees 163 keys at most."""
    assert max(group.keys.shape[1] for group in tiles(np.array([[0, 1000, 0, 1000]]), 100)) == 4 * line.TILE


def test_keys_know_their_places_in_their_segments():
    found = tiles(np.array([[0, 70, 0, 70], [70, 75, 70, 75]]), 10)
    for group in found:
        starts = np.where(group.queries[:, :1] < 70, 0, 70)
        chosen = group.allowed.any(1)
        np.testing.assert_array_equal(group.places[chosen], (group.keys - starts)[chosen])


def test_there_are_few_shapes():
    """Numbers of tiles of keys are powers of two or multiples of 8; lengths grow by a quarter at most."""
    widths = {group.keys.shape[1] // line.TILE for group in tiles(np.array([[0, 64 * 40, 0, 64 * 40]]))}
    assert widths == {1, 2, 4, 8, 16, 24, 32, 40}
    sizes = [rounded_up(count, 64) for count in range(1, 5000)]
    assert all(count <= size <= max(count * 1.25, count + 63) for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 24
