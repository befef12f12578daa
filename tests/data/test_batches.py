"""What is in a batch: alignment and padding by hand, what is filled, dropped and counted, rows that cannot be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msft.backend.contract import IGNORE
from msft.data.batches import BatchStream
from msft.data.collate import align, width_of
from msft.data.dataset import InMemoryDataset
from msft.data.mindrecord import MindRecordWriter, open_mindrecord
from msft.errors import InputError
from tests.data.numbered_rows import PAD, assert_same, numbered, rows_in


def test_a_batch_by_hand():
    """Two rows of seq_length 5 (6 tokens stored): shifted, cut to the longest, padded, numbered."""
    data = InMemoryDataset(
        [
            {"input_ids": [11, 12, 13, 14, 0, 0], "labels": [-100, -100, 13, 14, -100, -100]},
            {"input_ids": [21, 22, 0, 0, 0, 0], "labels": [-100, 22, -100, -100, -100, -100]},
        ]
    )
    stream = BatchStream(data, batch_size=2, pad_id=PAD, shuffle=False)
    [[batch]] = stream.steps()
    assert batch.input_ids.tolist() == [[11, 12, 13], [21, 0, 0]]
    assert batch.labels.tolist() == [[-100, 13, 14], [22, -100, -100]]
    assert batch.segment_ids.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.row_ids.tolist() == [[0, 0, 0], [1, 0, 0]]
    assert {array.dtype for array in vars(batch).values()} == {np.dtype(np.int32)}
    assert (batch.tokens, batch.supervised, stream.row_length) == (4, 3, 5)
    assert stream.report() == {
        "rows": 2,
        "dropped_rows": 0,
        "fill_rows": 0,
        "rows_per_step": 2,
        "steps_per_epoch": 1,
        "steps": 1,
        "tokens": 4,
        "supervised_tokens": 3,
        "unsupervised_rows": 0,
    }


@pytest.mark.parametrize(
    "ids, labels, expected",
    [
        ([5, 6, 7], [-100, 6, 7], ([5, 6], [6, 7])),
        ([5, 6, 0], [-100, 6, 0], ([5, 6], [6, 0])),  # the pad token as a supervised end token is real
        ([5, 0, 6, 0], [-100, 0, 6, -100], ([5, 0], [0, 6])),  # and inside the text too
        ([5, 6, 7], [5, -100, -100], ([5, 6], [-100, -100])),  # nothing predicts the first token
        ([5, 0, 0], [-100, -100, -100], ([], [])),
        ([0, 0, 0], [-100, -100, -100], ([], [])),
        ([5], [5], ([], [])),
        ([], [], ([], [])),
        ([5, 6, 0, 0], None, ([5, 6, 0], [6, 0, 0])),  # pretraining: every stored token is real
    ],
)
def test_alignment(ids, labels, expected):
    row = {"input_ids": np.array(ids, np.int64)}
    if labels is not None:
        row["labels"] = np.array(labels, np.int32)
    example = align(row, PAD)
    assert (example.input_ids.tolist(), example.labels.tolist()) == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12))
def test_alignment_loses_no_supervision(tokens):
    """Against the plain shift of the padded row: what is cut holds no label and no real pair of tokens."""
    ids = np.array([token for token, _ in tokens], np.int32)
    labels = np.where([supervised for _, supervised in tokens], ids, IGNORE).astype(np.int32)
    example = align({"input_ids": ids, "labels": labels}, PAD)
    kept = len(example.input_ids)
    np.testing.assert_array_equal(example.input_ids, ids[:-1][:kept])
    np.testing.assert_array_equal(example.labels, labels[1:][:kept])
    assert (labels[1:][kept:] == IGNORE).all() and (ids[1:][kept:] == PAD).all()
    assert kept == 0 or labels[kept] != IGNORE or ids[kept] != PAD


@pytest.mark.parametrize(
    "row, message",
    [
        ({"input_ids": [1, 2], "labels": [1]}, "train_dataset row 0: 2 input_ids and 1 labels"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "input_ids is int64 of shape \\(1, 2\\)"),
        ({"input_ids": [1.0, 2.0], "labels": [1, 2]}, "input_ids is float64"),
        ({"input_ids": [1, 2**31], "labels": [1, 2]}, "do not fit int32"),
        ({"input_ids": [1, 50], "labels": [1, 2]}, "token id 50, the model's vocabulary ends at 49"),
        ({"input_ids": [1, 2], "labels": [1, 77]}, "labels has the token id 77"),
        ({"input_ids": [1, -2], "labels": [1, 2]}, "input_ids has the token id -2"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "labels has the token id -1"),
        ({"tokens": [1, 2]}, "train_dataset: has no column 'input_ids' \\(columns: tokens\\)"),
    ],
)
def test_rows_that_no_engine_could_train_on(row, message):
    with pytest.raises(InputError, match=message):
        BatchStream(InMemoryDataset([row]), batch_size=1, pad_id=PAD, vocab_size=50)


def test_settings_that_give_no_step():
    with pytest.raises(InputError) as caught:
        BatchStream(numbered(3), batch_size=0, pad_id=PAD, epochs=0, seed=-1, padding="longst")
    assert len(caught.value.problems) == 4 and "did you mean 'longest'" in str(caught.value)
    with pytest.raises(InputError, match="3 rows do not fill one step of 4"):
        BatchStream(numbered(3), batch_size=2, pad_id=PAD, world=2)
    with pytest.raises(InputError, match="has no rows"):
        BatchStream(InMemoryDataset([]), batch_size=2, pad_id=PAD)
    with pytest.raises(InputError, match="cannot start at step 9, there are 3"):
        BatchStream(numbered(3), batch_size=1, pad_id=PAD).steps(start=9)


@pytest.mark.parametrize(
    "longest, capacity, padding, width",
    [
        (5, 20, "longest", 5),
        (5, 20, "bucket", 8),
        (8, 20, "bucket", 8),
        (17, 20, "bucket", 20),
        (5, 20, "max_length", 20),
        (0, 20, "longest", 8),
        (0, 20, "bucket", 8),
        (0, 5, "longest", 5),
        (0, 0, "longest", 1),
    ],
)
def test_width(longest, capacity, padding, width):
    assert width_of(longest, capacity, padding, 8) == width


def test_max_length_needs_rows_of_one_length():
    data = InMemoryDataset([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3, 4]}])
    assert next(BatchStream(data, batch_size=2, pad_id=PAD).steps())[0].input_ids.shape == (2, 3)
    with pytest.raises(InputError, match="a row has 4 tokens, the first row 3"):
        list(BatchStream(data, batch_size=2, pad_id=PAD, padding="max_length").steps())


def test_the_last_step_is_filled_with_masked_rows(capsys):
    """10 rows, 4 a step on 2 ranks of 1 row x 2: the third step has 2 rows, and rank 1 still gets equal shapes."""
    settings = dict(batch_size=1, gradient_accumulation_steps=2, world=2, pad_id=9, shuffle=False, drop_remainder=False)
    streams = [BatchStream(numbered(10), rank=rank, bucket_size=4, **settings) for rank in range(2)]
    last = [list(stream.steps())[-1] for stream in streams]
    assert [[rows_in(batch) for batch in batches] for batches in last] == [[[8], [None]], [[9], [None]]]
    assert last[0][0].input_ids.shape == last[1][0].input_ids.shape
    for batches in last:
        assert batches[1].input_ids.tolist() == [[9, 9, 9, 9]] and batches[1].supervised == batches[1].tokens == 0
        assert not batches[1].row_ids.any()
    assert streams[0].report()["fill_rows"] == 2
    assert capsys.readouterr().err.count("last step holds 2 masked rows") == 2


def test_dropped_rows_are_said_once_and_counted(capsys):
    stream = BatchStream(numbered(10), batch_size=4, pad_id=PAD, epochs=2)
    for _ in range(2):
        assert len(list(stream.steps())) == stream.total_steps == 4
    assert stream.report()["dropped_rows"] == 2
    assert capsys.readouterr().err.count("2 of 10 rows are left out of each epoch") == 1


def test_num_samples_takes_the_first_rows():
    stream = BatchStream(numbered(10), batch_size=2, pad_id=PAD, num_samples=4, epochs=2)
    seen = [row for batches in stream.steps() for row in rows_in(batches[0])]
    assert sorted(seen) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert BatchStream(numbered(3), batch_size=1, pad_id=PAD, num_samples=99).report()["rows"] == 3


def test_rows_without_supervision_are_counted():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [1, 2, 3], "labels": [1, -100, -100]}]
    stream = BatchStream(InMemoryDataset(rows), batch_size=2, pad_id=PAD, epochs=3)
    list(stream.steps())
    assert stream.report()["unsupervised_rows"] == 1


def test_a_mindrecord_gives_the_same_batches_as_the_rows(tmp_path):
    data = numbered(33, length=20)
    with MindRecordWriter(tmp_path / "x.mindrecord", {"input_ids": "int32", "labels": "int32"}) as writer:
        for index in range(len(data)):
            writer.write(data.row(index))
    settings = dict(batch_size=4, pad_id=PAD, gradient_accumulation_steps=2, padding="bucket", bucket_size=8)
    from_file = BatchStream(open_mindrecord(tmp_path), **settings).steps()
    for a, b in zip(from_file, BatchStream(data, **settings).steps(), strict=True):
        for ours, expected in zip(a, b, strict=True):
            assert_same(ours, expected)


def test_in_memory_rows_must_agree_and_have_a_digest():
    with pytest.raises(InputError, match="row 1: has columns"):
        InMemoryDataset([{"input_ids": [1]}, {"ids": [1]}])
    digests = {
        InMemoryDataset(rows).digest()
        for rows in ([{"a": [1, 2]}], [{"a": [1]}, {"a": [2]}], [{"a": [2, 1]}], [{"b": [1, 2]}])
    }
    assert len(digests) == 4
