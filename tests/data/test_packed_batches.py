"""Packed batches: one by hand, and what must hold for any order, number of ranks, padding and place of resuming."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msft.backend.contract import IGNORE
from msft.data.batches import BatchStream, evaluation_batches
from msft.data.dataset import InMemoryDataset
from msft.errors import InputError
from tests.data.numbered_rows import assert_same, numbered

PAD = 0
NAMES = ("input_ids", "labels", "position_ids", "segment_ids", "row_ids")


def examples_in(batch):
    """The examples of a batch by their first token, with all that a model sees of each: row_id -> (row, arrays)."""
    found = {}
    for row in range(len(batch.input_ids)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            place = row, batch.segment_ids[row] == segment
            ids, labels, positions, _, numbers = (getattr(batch, name)[place].tolist() for name in NAMES)
            assert positions == list(range(len(ids))) and len(set(numbers)) == 1
            found[numbers[0]] = (ids[0] - 1, ids, labels)
    return found


def test_a_packed_batch_by_hand():
    """Rows of 3, 1, 4 and 2 tokens to learn from, two packs of 5 a step; the longer ones of a pack come first."""
    data = InMemoryDataset(
        [
            {"input_ids": [11, 12, 13, 14, 0, 0], "labels": [-100, -100, 13, 14, -100, -100]},
            {"input_ids": [21, 22, 0, 0, 0, 0], "labels": [-100, 22, -100, -100, -100, -100]},
            {"input_ids": [31, 32, 33, 34, 35, 0], "labels": [-100, 32, 33, 34, 35, -100]},
            {"input_ids": [41, 42, 43, 0, 0, 0], "labels": [-100, -100, 43, -100, -100, -100]},
        ]
    )
    stream = BatchStream(data, batch_size=3, pad_id=PAD, shuffle=False, drop_remainder=False, packing=True)
    [[batch]] = stream.steps()
    assert batch.input_ids.tolist() == [[31, 32, 33, 34, 21], [11, 12, 13, 41, 42], [0, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[32, 33, 34, 35, 22], [-100, 13, 14, -100, 43], [-100] * 5]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 2, 2], [0] * 5]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert batch.row_ids.tolist() == [[0, 0, 0, 0, 1], [2, 2, 2, 3, 3], [0] * 5]
    assert {array.dtype for array in vars(batch).values()} == {np.dtype(np.int32)}
    assert stream.row_numbers(0) == [2, 1, 0, 3]
    assert stream.describe() == "4 examples packed into 2 rows of 5 tokens, 100.0 % filled"
    assert stream.report() == {
        "rows": 2,
        "dropped_rows": 0,
        "fill_rows": 1,
        "rows_per_step": 3,
        "steps_per_epoch": 1,
        "steps": 1,
        "tokens": 10,
        "supervised_tokens": 8,
        "unsupervised_rows": 0,
        "examples": 4,
        "filled": 1.0,
    }


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    ranks=st.sampled_from([2, 4]),
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    padding=st.sampled_from(["longest", "bucket", "max_length"]),
    seed=st.integers(0, 9),
)
def test_ranks_together_see_what_one_rank_sees(count, ranks, batch_size, accumulation, padding, seed):
    data, common = numbered(count, seed=seed), dict(pad_id=PAD, seed=seed, epochs=2, padding=padding, packing=True)
    common |= dict(gradient_accumulation_steps=accumulation, bucket_size=4, drop_remainder=False)
    one = BatchStream(data, batch_size=batch_size * ranks, **common)
    many = [BatchStream(data, batch_size=batch_size, rank=rank, world=ranks, **common) for rank in range(ranks)]
    for alone, *shared in zip(one.steps(prefetch=0), *(s.steps(prefetch=0) for s in many), strict=True):
        for whole, *parts in zip(alone, *shared, strict=True):
            for name in NAMES:
                stacked = np.concatenate([getattr(part, name) for part in parts])
                np.testing.assert_array_equal(stacked, getattr(whole, name), strict=True)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 40), global_batch=st.integers(1, 5), accumulation=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_example_once_an_epoch_whole_and_numbered(count, global_batch, accumulation, seed):
    """Each is what it is unpacked, and the numbers of a step's examples count up in the order that is told."""
    data, settings = numbered(count, seed=seed), dict(pad_id=PAD, seed=seed, epochs=2, drop_remainder=False)
    settings |= dict(batch_size=global_batch, gradient_accumulation_steps=accumulation)
    plain = BatchStream(data, shuffle=False, **settings | dict(batch_size=1, gradient_accumulation_steps=1, epochs=1))
    alone = [next(iter(examples_in(batch).values())) for [batch] in plain.steps(prefetch=0)]
    stream, seen = BatchStream(data, packing=True, **settings), []
    for step, batches in enumerate(stream.steps(prefetch=0)):
        found = {}
        for batch in batches:
            assert not found.keys() & examples_in(batch).keys()
            found |= examples_in(batch)
        assert sorted(found) == list(range(len(found)))
        assert [found[number][0] for number in range(len(found))] == stream.row_numbers(step)
        assert all(example == alone[example[0]] for example in found.values())
        seen += stream.row_numbers(step)
    half = len(seen) // 2
    assert sorted(seen[:half]) == sorted(seen[half:]) == list(range(count))


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(8, 40), st.booleans())
def test_resuming_at_any_step_gives_the_rest(data, count, grouped):
    keys = dict(packing=not grouped, length_grouping=grouped, padding="longest")
    settings = dict(batch_size=2, pad_id=PAD, epochs=3, drop_remainder=False, seed=1, **keys)
    whole = list(BatchStream(numbered(count), **settings).steps(prefetch=0))
    start = data.draw(st.integers(0, len(whole)))
    rest = list(BatchStream(numbered(count), **settings).steps(start, prefetch=data.draw(st.integers(0, 3))))
    assert len(rest) == len(whole) - start
    for resumed, uninterrupted in zip(rest, whole[start:], strict=True):
        for a, b in zip(resumed, uninterrupted, strict=True):
            assert_same(a, b)


def test_packs_stay_and_their_order_changes():
    stream = BatchStream(numbered(60), batch_size=1, pad_id=PAD, packing=True, epochs=2, seed=4)
    first, second = (
        [tuple(stream.row_numbers(step)) for step in range(start, start + stream.steps_per_epoch)]
        for start in (0, stream.steps_per_epoch)
    )
    assert sorted(first) == sorted(second) and first != second and first != sorted(first)


def test_widths_are_those_of_the_packs():
    """By default every batch is as wide as the longest row's place; otherwise as wide as its fullest pack."""
    data = InMemoryDataset([{"input_ids": [1] * length + [0] * (9 - length)} for length in (9, 5, 4, 3)])
    labels = [np.where(np.array(data.row(number)["input_ids"]) == 1, 1, IGNORE) for number in range(4)]
    data = InMemoryDataset([{**data.row(number), "labels": labels[number]} for number in range(4)])

    def widths(**keys):
        stream = BatchStream(data, batch_size=1, pad_id=PAD, packing=True, shuffle=False, **keys)
        return [batch.input_ids.shape[1] for [batch] in stream.steps()]

    assert widths(padding="max_length") == [8, 8, 8]
    # 8 tokens alone, 4 and 3, 2 alone.
    assert widths(padding="longest") == [8, 7, 2]
    assert widths(padding="bucket", bucket_size=3) == [8, 8, 3]


def test_rows_that_are_stored_without_padding_set_the_length():
    """The longest row, here not the first one, is as long as a pack may be."""
    data = InMemoryDataset([{"input_ids": [7] * length} for length in (3, 6, 4)])
    stream = BatchStream(data, batch_size=2, pad_id=PAD, packing=True, padding="max_length", shuffle=False)
    [[batch]] = stream.steps()
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 2, 2]] and stream.row_length == 5


def test_num_samples_packs_the_first_rows_only():
    stream = BatchStream(numbered(40), batch_size=1, pad_id=PAD, packing=True, num_samples=7)
    taken = [row for step in range(stream.total_steps) for row in stream.row_numbers(step)]
    assert sorted(taken) == list(range(7)) and stream.report()["examples"] == 7


def test_what_is_left_out_or_filled_up_counts_packed_rows(capsys):
    rows = InMemoryDataset([{"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORE] * 4 + [5]}] * 5)
    list(BatchStream(rows, batch_size=2, pad_id=PAD, packing=True).steps())
    assert "1 of 5 packed rows are left out of each epoch" in capsys.readouterr().err
    with pytest.raises(InputError, match="5 packed rows do not fill one step of 6"):
        BatchStream(rows, batch_size=6, pad_id=PAD, packing=True)


def test_a_packed_evaluation_takes_every_row_once():
    for world in (1, 2):
        streams = [
            evaluation_batches(numbered(9), batch_size=2 // world, pad_id=PAD, rank=rank, world=world, packing=True)
            for rank in range(world)
        ]
        batches = [batch for stream in streams for [batch] in stream.steps()]
        assert sorted(row for batch in batches for row, *_ in examples_in(batch).values()) == list(range(9))


def test_rows_without_supervision_or_tokens_are_counted_and_harm_nothing():
    rows = [
        {"input_ids": [1, 2, 3, 0], "labels": [-100, 2, 3, -100]},
        {"input_ids": [4, 5, 0, 0], "labels": [4, -100, -100, -100]},
        {"input_ids": [0, 0, 0, 0], "labels": [-100] * 4},
    ]
    stream = BatchStream(InMemoryDataset(rows), batch_size=2, pad_id=PAD, packing=True, shuffle=False)
    [[batch]] = stream.steps()
    assert stream.report()["unsupervised_rows"] == 2 and stream.row_numbers(0) == [0, 1, 2]
    assert batch.input_ids.tolist() == [[1, 2, 4], [0, 0, 0]] and batch.segment_ids.tolist() == [[1, 1, 2], [0, 0, 0]]


def test_a_row_that_is_not_as_long_as_it_was_measured():
    data = numbered(9)
    stream = BatchStream(data, batch_size=1, pad_id=PAD, packing=True)
    data.row(3)["input_ids"][:] = 5
    data.row(3)["labels"][:] = 5
    with pytest.raises(InputError, match="train_dataset row 3: has 8 tokens where . were measured"):
        list(stream.steps())
