"""From stored rows to aligned batches: the one place where labels are shifted and padding is cut."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from msft.backend.contract import IGNORE, Batch
from msft.errors import InputError

PADDINGS = ("longest", "bucket", "max_length")


class Example(NamedTuple):
    """One row, aligned and without padding: `labels[t]` is predicted from `input_ids[: t + 1]`; int32.

    `capacity` is the length it would have with its padding.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    capacity: int


def align(row: dict[str, np.ndarray], pad_id: int, vocab_size: int | None = None) -> Example:
    """Return a row of n real tokens as n - 1 tokens, each with the token to predict after it.

    `row` has `input_ids` and, unless all of it is to be learnt, unshifted `labels` with -100 where nothing is
    supervised. Real tokens end with the last one that is not `pad_id` or is supervised; without labels all are real.
    Raises InputError for arrays of other shapes or dtypes and for ids outside the vocabulary.
    """
    ids = _integers(row["input_ids"], "input_ids")
    _check_ids(ids, "input_ids", vocab_size)
    if "labels" not in row:
        return Example(ids[:-1], ids[1:], max(0, len(ids) - 1))
    labels = _integers(row["labels"], "labels")
    if len(labels) != len(ids):
        raise InputError(f"{len(ids)} input_ids and {len(labels)} labels")
    _check_ids(labels[labels != IGNORE], "labels", vocab_size)
    real = np.flatnonzero((ids != pad_id) | (labels != IGNORE))
    end = int(real[-1]) + 1 if len(real) else 0
    return Example(ids[: max(0, end - 1)], labels[1 : max(1, end)], max(0, len(ids) - 1))


def _integers(values: np.ndarray, name: str) -> np.ndarray:
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InputError(f"{name} is {values.dtype} of shape {values.shape}, not a list of integers")
    if values.dtype == np.int32:
        return values
    narrow = values.astype(np.int32)
    if not np.array_equal(narrow, values):
        raise InputError(f"{name} has ids that do not fit int32")
    return narrow


def _check_ids(ids: np.ndarray, name: str, vocab_size: int | None) -> None:
    if len(ids) and int(ids.min()) < 0:
        raise InputError(f"{name} has the token id {ids.min()}")
    if len(ids) and vocab_size is not None and int(ids.max()) >= vocab_size:
        raise InputError(f"{name} has the token id {ids.max()}, the model's vocabulary ends at {vocab_size - 1}")


def width_of(longest: int, capacity: int, padding: str, bucket_size: int) -> int:
    """Return how long the rows of a micro-batch are made, from the longest real row (or pack) over all ranks.

    longest: the longest row; bucket: the next multiple of `bucket_size`; max_length: `capacity`. Never above
    `capacity`, and one bucket when there is no real token at all.
    """
    if padding == "max_length":
        return capacity
    if padding == "longest" and longest:
        return longest
    return max(1, min(max(1, -(-longest // bucket_size)) * bucket_size, capacity))


def collate(rows: Sequence[Sequence[Example]], width: int, pad_id: int, first_ids: Sequence[int]) -> Batch:
    """Return rows of examples as one micro-batch [len(rows), width].

    The examples of a row stand one behind the other, segments 1, 2 ..., and `row_ids` count them up from the row's
    number in `first_ids`. Positions begin anew with each example; padding has the positions of a lone example's.
    """
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, np.int32)
    labels = np.full(shape, IGNORE, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    row_ids = np.zeros(shape, np.int32)
    positions = np.arange(width, dtype=np.int32)
    position_ids = np.tile(positions, (len(rows), 1))
    for number, (examples, first) in enumerate(zip(rows, first_ids, strict=True)):
        start = 0
        for segment, example in enumerate(examples):
            place = np.s_[number, start : start + len(example.input_ids)]
            input_ids[place] = example.input_ids
            labels[place] = example.labels
            position_ids[place] = positions[: len(example.input_ids)]
            segment_ids[place] = segment + 1
            row_ids[place] = first + segment
            start += len(example.input_ids)
    return Batch(input_ids, labels, position_ids, segment_ids, row_ids)
