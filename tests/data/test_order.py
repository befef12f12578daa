"""Which rows come when: what must hold for any order, number of ranks, split of a step and place of resuming."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from msft.data.batches import BatchStream, evaluation_batches
from msft.data.dataset import InMemoryDataset
from msft.data.order import FILL, Plan, epoch_order
from tests.data.numbered_rows import PAD, assert_same, numbered, rows_in


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


def test_the_row_numbers_of_a_step_are_those_of_its_batches_on_all_ranks():
    settings = dict(batch_size=2, gradient_accumulation_steps=2, world=2, pad_id=PAD, seed=4, epochs=2)
    streams = [BatchStream(numbered(13), drop_remainder=False, rank=rank, **settings) for rank in range(2)]
    for step, parts in enumerate(zip(*(stream.steps() for stream in streams), strict=True)):
        taken = [row for part in parts for batch in part for row in rows_in(batch) if row is not None]
        assert sorted(streams[0].row_numbers(step)) == sorted(taken)
        assert streams[0].row_numbers(step) == streams[1].row_numbers(step)
    assert len(streams[0].row_numbers(1)) == 5


def test_evaluation_takes_every_row_once_in_order():
    for world in (1, 2):
        streams = [
            evaluation_batches(numbered(7), batch_size=4 // world, pad_id=PAD, rank=rank, world=world)
            for rank in range(world)
        ]
        steps = [[rows_in(batches[0]) for batches in stream.steps()] for stream in streams]
        assert [sum(step, []) for step in zip(*steps, strict=True)] == [[0, 1, 2, 3], [4, 5, 6, None]]
