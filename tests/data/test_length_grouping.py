"""Length grouping: transformers' scheme, every row once, the same remainder, and how much padding it saves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msft.data.batches import BatchStream
from msft.data.order import WINDOW_STEPS, Plan, epoch_order, grouped_order
from tests.data.numbered_rows import numbered

PAD = 0


def random_lengths(rows, seed=0):
    return np.random.default_rng(seed).integers(0, 200, rows).astype(np.int32)


def test_the_order_is_fixed_for_ever():
    """Pinned: seed 42 shuffles 7 rows to 4 1 3 6 0 2 5; the first six, sorted from 50 down, make steps; 5 is left."""
    lengths = np.array([10, 20, 30, 40, 50, 60, 5], np.int32)
    assert epoch_order(42, 0, 7, True).tolist() == [4, 1, 3, 6, 0, 2, 5]
    steps = grouped_order(42, 0, lengths, 2).tolist()
    assert sorted((steps[0:2], steps[2:4], steps[4:6])) == [[0, 6], [2, 1], [4, 3]] and steps[6:] == [5]
    assert steps == [2, 1, 0, 6, 4, 3, 5]
    assert grouped_order(42, 1, lengths, 2).tolist() != steps


@given(st.integers(1, 700), st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_every_row_once_in_steps_of_one_window(rows, global_batch, epoch, drop):
    """The remainder is the plain order's, so that both leave the same rows out."""
    lengths, plain = random_lengths(rows), epoch_order(3, epoch, rows, True)
    plan = Plan(rows, global_batch, epoch + 1, 3, True, drop, lengths)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    taken = [plan.rows_of(step) for step in steps]
    full = rows // global_batch
    windows = [
        set(plain[first : first + WINDOW_STEPS * global_batch])
        for first in range(0, full * global_batch, WINDOW_STEPS * global_batch)
    ]
    for step in taken[:full]:
        assert any(set(step) <= window for window in windows)
        assert (np.diff(lengths[step]) <= 0).all()
    assert sorted(row for step in taken[:full] for row in step) == sorted(plain[: full * global_batch])
    if not drop and rows % global_batch:
        assert sorted(row for row in taken[full] if row >= 0) == sorted(plain[full * global_batch :])


def test_the_steps_are_those_of_transformers(monkeypatch):
    """Within one window of 50 steps; of several, transformers exchanges two rows to see the longest one first."""
    torch, pytorch_utils = pytest.importorskip("torch"), pytest.importorskip("transformers.trainer_pt_utils")
    lengths = random_lengths(200).tolist()
    plain = epoch_order(1, 0, 200, True)
    monkeypatch.setattr(torch, "randperm", lambda count, generator=None: torch.from_numpy(plain.copy()))
    expected = pytorch_utils.get_length_grouped_indices(lengths, 4, mega_batch_mult=WINDOW_STEPS)
    ours = grouped_order(1, 0, np.array(lengths, np.int32), 4)

    def steps(order):
        return sorted(sorted(lengths[row] for row in order[first : first + 4]) for first in range(0, 200, 4))

    assert steps(ours) == steps(expected)


def test_steps_are_not_in_the_order_of_their_lengths():
    lengths = random_lengths(4000)
    means = lengths[grouped_order(0, 0, lengths, 8)].reshape(-1, 8).mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_hardly_anything_is_padding():
    """Rows padded to their batch's longest one: of 8 a batch 56 % are real tokens at random, 98 % grouped."""

    def share(**keys):
        stream = BatchStream(numbered(800, length=200), batch_size=8, pad_id=PAD, padding="longest", **keys)
        batches = [batch for [batch] in stream.steps(prefetch=0)]
        return sum(batch.tokens for batch in batches) / sum(batch.input_ids.size for batch in batches)

    assert share() < 0.6 and share(length_grouping=True) > 0.97


def test_ranks_together_see_what_one_rank_sees():
    common = dict(pad_id=PAD, seed=5, length_grouping=True, padding="bucket", bucket_size=4, drop_remainder=False)
    common |= dict(gradient_accumulation_steps=2, epochs=2)
    one = BatchStream(numbered(43), batch_size=4, **common)
    many = [BatchStream(numbered(43), batch_size=2, rank=rank, world=2, **common) for rank in range(2)]
    for alone, *shared in zip(one.steps(prefetch=0), *(s.steps(prefetch=0) for s in many), strict=True):
        for whole, *parts in zip(alone, *shared, strict=True):
            for name, array in vars(whole).items():
                stacked = np.concatenate([getattr(part, name) for part in parts])
                np.testing.assert_array_equal(stacked, array, strict=True)
