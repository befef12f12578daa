"""Packing: hand-worked packs, best fit against one example after the other, and how near the fewest packs it comes."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msft.data.order import FILL
from msft.data.packing import one_each, pack

LENGTHS = st.integers(1, 30).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(0, capacity), min_size=1, max_size=60), st.just(capacity))
)


def packs_of(lengths, capacity):
    packs = pack(np.array(lengths, np.int32), capacity)
    return [packs.rows_of(number) for number in range(len(packs))]


@pytest.mark.parametrize(
    "lengths, capacity, expected",
    [
        # 7 and 5 open packs with room for 3 and 5; 4 goes to the 5, 3 to the 7, and 1 fills the rest.
        ([7, 5, 4, 3, 1], 10, [[0, 3], [1, 2, 4]]),
        # The same in another order of the data.
        ([1, 3, 4, 5, 7], 10, [[4, 1], [3, 2, 0]]),
        # 2 fits beside the 12 (room 8) and beside the 9s (room 2): the fuller pack is taken, not the first.
        ([12, 9, 9, 2], 20, [[0], [1, 2, 3]]),
        # Equal lengths are taken in the data's order, as many as fit.
        ([4, 4, 4, 4, 4], 9, [[0, 1], [2, 3], [4]]),
        # Three packs would do (6+2+2, 6+2+2, 5+3+2); from the longest down a fourth is needed.
        ([6, 6, 5, 3, 2, 2, 2, 2, 2], 10, [[0, 3], [1, 4, 5], [2, 6, 7], [8]]),
        # A full row stands alone; empty examples take the room of a token.
        ([0, 5, 0], 5, [[1], [0, 2]]),
        ([9], 9, [[0]]),
        ([0, 0], 0, [[0], [1]]),
    ],
)
def test_packs_by_hand(lengths, capacity, expected):
    """Also pinned: a run that resumes after an upgrade must find the same packs."""
    assert packs_of(lengths, capacity) == expected


def one_after_the_other(lengths, capacity):
    """Best fit decreasing as the books have it; returns the rooms left."""
    rooms = []
    for length in sorted(np.maximum(lengths, 1), reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda number: rooms[number])] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@given(LENGTHS)
def test_every_example_once_and_no_pack_too_full(drawn):
    """And packs as full as placing one example after the other makes them."""
    lengths, capacity = drawn
    packs = packs_of(lengths, capacity)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    rooms = [capacity - sum(max(lengths[row], 1) for row in rows) for rows in packs]
    assert min(rooms) >= 0
    assert sorted(rooms) == sorted(one_after_the_other(lengths, capacity))


def fewest_packs(lengths, capacity):
    """The fewest packs, by trying every one for each example."""

    @functools.cache
    def fits(left, rooms):
        if not left:
            return True
        return any(
            fits(left[1:], tuple(sorted((*rooms[:at], room - left[0], *rooms[at + 1 :]))))
            for at, room in enumerate(rooms)
            if room >= left[0] and room not in rooms[:at]
        )

    ordered = tuple(sorted(lengths, reverse=True))
    return next(count for count in range(1, len(lengths) + 1) if fits(ordered, (capacity,) * count))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_packs_are_near_the_fewest_possible(lengths):
    """Johnson's bound, 11/9 of the fewest and one."""
    assert len(packs_of(lengths, 20)) <= 11 / 9 * fewest_packs(lengths, 20) + 1


def test_real_lengths_fill_the_rows():
    """20,000 log-normal lengths around 110, as instructions have them, in rows of 512."""
    lengths = np.random.default_rng(0).lognormal(4.7, 0.6, 20_000).clip(8, 512).astype(np.int32)
    assert lengths.sum() / (len(pack(lengths, 512)) * 512) > 0.99


def test_rows_and_sizes_of_packs():
    packs = pack(np.array([7, 5, 4, 3, 1], np.int32), 10)
    assert len(packs) == 2 and packs.rows_of(FILL) == []
    assert packs.sizes(np.array([1, FILL, 0])).tolist() == [3, 0, 2]
    single = one_each(3)
    assert [single.rows_of(number) for number in (0, 2, FILL)] == [[0], [2], []]
    assert len(single) == 3 and single.sizes(np.array([2, FILL])).tolist() == [1, 0]
