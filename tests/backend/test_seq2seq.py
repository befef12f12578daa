"""Protects how a batch is taken apart into sources and targets: by hand-worked rows, and what is refused."""

import numpy as np
import pytest

from msft.backend import line, seq2seq
from msft.backend.contract import IGNORE, Batch
from msft.errors import RunError


def batch(labels, segments):
    """Rows whose token ids are their places in the batch, read row by row."""
    labels, segments = np.array(labels, np.int32), np.array(segments, np.int32)
    ids = np.arange(labels.size, dtype=np.int32).reshape(labels.shape)
    starts = np.maximum.accumulate(
        np.where(np.diff(segments, axis=1, prepend=-1) != 0, np.arange(labels.shape[1]), 0), 1
    )
    return Batch(ids, labels, (np.arange(labels.shape[1]) - starts).astype(np.int32), segments, segments * 0)


N = IGNORE
PACKED = batch(
    [[N, N, 5, 1, N, 7, 1, N, N, N], [N, N, N, 4, 1, N, N, N, N, N]], [[1] * 4 + [2] * 3 + [0] * 3, [1] * 8 + [0] * 2]
)


def test_a_segments_targets_begin_at_its_first_supervised_position():
    """The third segment has its answer in the middle: that breaks the rule."""
    with pytest.raises(RunError, match=r"row 1 of a batch: the example at \[0, 8\) has an unsupervised token behind"):
        seq2seq.split(PACKED)
    whole = batch(PACKED.labels[:1], PACKED.segment_ids[:1])
    sides = seq2seq.split(whole)
    assert sides.source.places.tolist() == [0, 1, 4] and sides.target.places.tolist() == [2, 3, 5, 6]
    assert sides.source.borders.tolist() == [0, 2, 3] and sides.target.borders.tolist() == [0, 2, 4]
    assert sides.target.positions().tolist() == [0, 1, 0, 1] and sides.source.lengths() == [2, 1]


def test_an_example_without_labels_is_all_source():
    sides = seq2seq.split(batch([[N, N, N, N], [N, 3, 1, N]], [[1, 1, 1, 0], [1, 1, 1, 0]]))
    assert sides.source.lengths() == [3, 1] and sides.target.lengths() == [0, 2]
    assert sides.target.line(sides.batch, sides.source).pieces.tolist() == [[0, 2, 3, 4]]


def test_lines_hold_each_sides_tokens_and_see_their_own_segment():
    sides = seq2seq.split(batch(PACKED.labels[:1], PACKED.segment_ids[:1]))
    found = sides.source.line(sides.batch)
    assert found.input_ids[:3].tolist() == [0, 1, 4] and len(found.input_ids) == line.TILE
    assert found.position_ids[:3].tolist() == [0, 1, 0]
    assert found.pieces.tolist() == [[0, 2, 0, 2], [2, 3, 2, 3]]
    cross = sides.target.line(sides.batch, sides.source)
    assert cross.pieces.tolist() == [[0, 2, 0, 2], [2, 4, 2, 3]]
    assert cross.position_ids[:4].tolist() == [2, 3, 1, 2]


def test_an_example_that_is_supervised_from_its_start_has_no_source():
    with pytest.raises(RunError, match=r"row 0 .* \[0, 2\) is supervised from its first token on"):
        seq2seq.split(batch([[4, 1]], [[1, 1]]))


def test_a_batch_of_padding_has_no_segment():
    sides = seq2seq.split(batch([[N, N]], [[0, 0]]))
    assert not len(sides.source.places) and not sides.target.lengths()


def test_prompts_are_sources():
    sides = seq2seq.sources(np.array([[0, 0, 7], [4, 5, 6]], np.int32), np.array([2, 0]))
    assert sides.source.lengths() == [1, 3] and sides.target.lengths() == [0, 0]
    assert sides.source.line(sides.batch).input_ids[:4].tolist() == [7, 4, 5, 6]


def test_tiles_without_order_see_all_keys_of_their_piece():
    """A piece of 2 queries and 70 keys, behind one of another example."""
    (tiles,) = line.tiles(np.array([[3, 5, 10, 80]]), is_causal=False)
    assert tiles.allowed.shape == (1, line.TILE, 128) and tiles.allowed[0, :, :70].all()
    assert not tiles.allowed[0, :, 70:].any()
    assert tiles.keys[0, :70].tolist() == list(range(10, 80)) and tiles.real[0].sum() == 2
