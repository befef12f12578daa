"""Batches: alignment and padding by hand, and what must hold for any order, number of ranks and place of resuming."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msft.backend.contract import IGNORE
from msft.data.batches import BatchStream, evaluation_batches
from msft.data.collate import align, width_of
from msft.data.dataset import InMemoryDataset
from msft.data.mindrecord import MindRecordWriter, open_mindrecord
from msft.data.order import FILL, Plan, epoch_order
from msft.data.prefetch import prefetch
from msft.errors import InputError

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


def test_the_order_is_fixed_for_ever():
    """Pinned numbers: a run that resumes after an upgrade of numpy or msft must see the same rows."""
    assert epoch_order(42, 0, 10, True).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]
    assert epoch_order(42, 1, 10, True).tolist() == [1, 2, 8, 5, 3, 9, 6, 0, 4, 7]
    assert epoch_order(42, 1, 4, False).tolist() == [0, 1, 2, 3]


@given(st.integers(0, 2**63), st.integers(0, 50), st.integers(1, 300))
def test_every_epoch_is_a_permutation(seed, epoch, rows):
    order = epoch_order(seed, epoch, rows, True)
    assert sorted(order.tolist()) == list(range(rows))
    if rows > 50:
        assert order.tolist() != epoch_order(seed, epoch + 1, rows, True).tolist()
        assert order.tolist() != epoch_order(seed + 1, epoch, rows, True).tolist()


def test_every_row_comes_first_equally_often():
    """Uniform shuffling: 4000 epochs of 8 rows, each row first 500 times, 6 standard deviations of room."""
    first = np.bincount([epoch_order(7, epoch, 8, True)[0] for epoch in range(4000)], minlength=8)
    assert np.abs(first - 500).max() < 6 * np.sqrt(4000 * (1 / 8) * (7 / 8))


@given(
    rows=st.integers(1, 60),
    global_batch=st.integers(1, 16),
    epochs=st.integers(1, 3),
    shuffle=st.booleans(),
    drop=st.booleans(),
)
def test_an_epoch_takes_every_row_once(rows, global_batch, epochs, shuffle, drop):
    plan = Plan(rows, global_batch, epochs, 3, shuffle, drop)
    assert plan.total_steps == epochs * plan.steps_per_epoch
    for epoch in range(epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        taken = [row for step in steps for row in plan.rows_of(step).tolist()]
        assert len(taken) == plan.steps_per_epoch * global_batch
        real = [row for row in taken if row != FILL]
        assert len(set(real)) == len(real) == rows - plan.dropped_rows
        assert taken.count(FILL) == plan.fill_rows and FILL not in taken[: len(real)]
        assert plan.dropped_rows < global_batch and plan.fill_rows < global_batch
        assert shuffle or real == list(range(len(real)))


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
    """With equal global batch, all ranks' micro-batches stacked are the single rank's: the same rows and shapes."""
    data, common = numbered(count), dict(pad_id=PAD, seed=seed, drop_remainder=False, epochs=2, padding=padding)
    common |= dict(gradient_accumulation_steps=accumulation, bucket_size=4)
    one = BatchStream(data, batch_size=batch_size * ranks, **common)
    many = [BatchStream(data, batch_size=batch_size, rank=rank, world=ranks, **common) for rank in range(ranks)]
    assert {stream.total_steps for stream in many} == {one.total_steps}
    for alone, *shared in zip(one.steps(prefetch=0), *(s.steps(prefetch=0) for s in many), strict=True):
        assert len(alone) == accumulation
        for whole, *parts in zip(alone, *shared, strict=True):
            for name in ("input_ids", "labels", "position_ids", "segment_ids", "row_ids"):
                stacked = np.concatenate([getattr(part, name) for part in parts])
                np.testing.assert_array_equal(stacked, getattr(whole, name), strict=True)
    assert sum(stream.report()["tokens"] for stream in many) == one.report()["tokens"]


def test_the_rows_of_a_step_do_not_depend_on_how_it_is_split():
    """24 rows a step as 1 x 24, 2 ranks x 12, 4 ranks x 2 rows x 3 micro-batches: the same rows, numbered 0 to 23."""
    data = numbered(90)
    splits = [(1, 24, 1), (1, 6, 4), (2, 12, 1), (4, 2, 3), (2, 3, 4)]
    expected = None
    for world, batch_size, accumulation in splits:
        steps: list[dict] = []
        for rank in range(world):
            stream = BatchStream(
                data,
                batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                rank=rank,
                world=world,
                pad_id=PAD,
                seed=5,
                epochs=2,
            )
            for number, batches in enumerate(stream.steps(prefetch=0)):
                if number == len(steps):
                    steps.append({})
                for batch in batches:
                    steps[number].update(zip(batch.row_ids[:, 0].tolist(), rows_in(batch), strict=True))
        assert all(sorted(step) == list(range(24)) for step in steps)
        expected = expected or steps
        assert steps == expected


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 30), st.booleans())
def test_resuming_at_any_step_gives_the_rest(data, count, drop):
    settings = dict(batch_size=2, pad_id=PAD, gradient_accumulation_steps=2, epochs=3, drop_remainder=drop, seed=1)
    if drop and count < 4:
        return
    whole = list(BatchStream(numbered(count), **settings).steps(prefetch=0))
    start = data.draw(st.integers(0, len(whole)))
    rest = list(BatchStream(numbered(count), **settings).steps(start, prefetch=data.draw(st.integers(0, 3))))
    assert len(rest) == len(whole) - start
    for resumed, uninterrupted in zip(rest, whole[start:], strict=True):
        for a, b in zip(resumed, uninterrupted, strict=True):
            assert_same(a, b)


def test_resuming_does_not_read_what_came_before():
    class Watched(InMemoryDataset):
        def __init__(self, rows):
            super().__init__(rows)
            self.asked = []

        def row(self, index):
            self.asked.append(index)
            return super().row(index)

    data = Watched([{"input_ids": [number, number]} for number in range(1000)])
    stream = BatchStream(data, batch_size=4, pad_id=PAD, epochs=5)
    data.asked.clear()
    next(stream.steps(start=1111, prefetch=0))
    assert len(data.asked) == 4 and stream.position(1111) == (4, 111)


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


def test_the_row_numbers_of_a_step_are_those_of_its_batches_on_all_ranks():
    settings = dict(batch_size=2, gradient_accumulation_steps=2, world=2, pad_id=PAD, seed=4, epochs=2)
    streams = [BatchStream(numbered(13), drop_remainder=False, rank=rank, **settings) for rank in range(2)]
    for step, parts in enumerate(zip(*(stream.steps() for stream in streams), strict=True)):
        taken = [row for part in parts for batch in part for row in rows_in(batch) if row is not None]
        assert sorted(streams[0].row_numbers(step)) == sorted(taken)
        assert streams[0].row_numbers(step) == streams[1].row_numbers(step)
    assert len(streams[0].row_numbers(1)) == 5


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


def test_evaluation_takes_every_row_once_in_order():
    for world in (1, 2):
        streams = [
            evaluation_batches(numbered(7), batch_size=4 // world, pad_id=PAD, rank=rank, world=world)
            for rank in range(world)
        ]
        steps = [[rows_in(batches[0]) for batches in stream.steps()] for stream in streams]
        assert [sum(step, []) for step in zip(*steps, strict=True)] == [[0, 1, 2, 3], [4, 5, 6, None]]


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


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_keeps_the_order_and_its_bound():
    """With depth 3 at most 3 items exist that nobody has taken yet."""
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    ahead, taken = prefetch(items(), 3), []
    for number in ahead:
        taken.append(number)
        time.sleep(0.005)
        assert len(made) <= len(taken) + 3
    assert taken == list(range(20)) and not prefetch_threads()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_passes_errors_on_in_their_turn(depth):
    def items():
        yield 1
        yield 2
        raise InputError("row 3 is damaged")

    taken = []
    with pytest.raises(InputError, match="row 3"):
        for number in prefetch(items(), depth):
            taken.append(number)
    assert taken == [1, 2] and not prefetch_threads()


def test_prefetch_stops_with_its_iterator():
    """Closing it, breaking out of the loop, or never starting it leaves no thread."""
    endless = prefetch(iter(int, 1), 2)
    next(endless)
    assert len(prefetch_threads()) == 1
    endless.close()
    assert not prefetch_threads()
    for _ in prefetch(iter(int, 1), 2):
        break
    del _
    assert not prefetch_threads()
    prefetch(iter(int, 1), 2)
    assert not prefetch_threads()


def test_a_damaged_row_stops_the_run_with_its_name(tmp_path):
    path = tmp_path / "x.mindrecord"
    with MindRecordWriter(path, {"input_ids": "int32"}) as writer:
        for number in range(8):
            writer.write({"input_ids": np.full(50, number, np.int32)})
    with open(path, "r+b") as file:
        file.seek((1 << 24) + 5 * (8 + 4 + 13 + 50))
        file.write(b"\xff")
    stream = BatchStream(open_mindrecord(path), batch_size=2, pad_id=PAD, shuffle=False)
    with pytest.raises(InputError, match="train_dataset row 5: .*x.mindrecord row 5: its index says"):
        list(stream.steps())
    assert not prefetch_threads()
