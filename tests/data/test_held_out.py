"""Rows held out of training: every row is on one side, and the sides are those of datasets' train_test_split."""

import numpy as np
import pytest

from msft.data.dataset import InMemoryDataset
from msft.data.held_out import split
from msft.errors import InputError

DATA = InMemoryDataset(
    [{"input_ids": [number] * (number + 1), "labels": [number] * (number + 1)} for number in range(10)]
)


def numbers(side):
    return [int(side.row(index)["input_ids"][0]) for index in range(len(side))]


def test_a_share_is_rounded_up_and_the_order_is_that_of_the_datasets_library():
    train, held = split(DATA, 0.25, 42, "here")
    # datasets' train_test_split: the first of default_rng(seed).permutation(rows) are the test's, here three.
    order = np.random.default_rng(42).permutation(10).tolist()
    assert (numbers(held), numbers(train)) == (order[:3], order[3:])
    assert [len(side) for side in split(DATA, 4, 42, "here")] == [6, 4]


def test_ends_and_digests_follow_the_rows():
    train, held = split(DATA, 3, 1, "here")
    (ends,) = train.ends({"input_ids": None})
    assert ends.tolist() == [number + 1 for number in numbers(train)]
    assert len({train.digest(), held.digest(), split(DATA, 3, 2, "here")[0].digest()}) == 3
    assert train.digest() == split(DATA, 3, 1, "here")[0].digest()


@pytest.mark.parametrize("held_out", [10, 11])
def test_a_side_without_rows_is_refused(held_out):
    with pytest.raises(InputError, match=f"here: {held_out} of 10 rows leaves nothing to train on"):
        split(DATA, held_out, 0, "here")
