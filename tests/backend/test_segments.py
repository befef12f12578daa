"""Protects the ranges that attention is computed in: an example too long sees its neighbour, one too short forgets."""

import numpy as np
import pytest

from msft.backend.segments import spans


@pytest.mark.parametrize(
    ("segment_ids", "expected"),
    [
        ([[1, 1, 2, 2, 2, 0, 0]], [(0, 0, 2), (0, 2, 5)]),
        ([[1, 1, 1]], [(0, 0, 3)]),
        ([[0, 0]], []),
        ([[1, 1], [1, 0]], [(0, 0, 2), (1, 0, 1)]),
        ([[0, 3, 3, 0, 1]], [(0, 1, 3), (0, 4, 5)]),
    ],
)
def test_spans_are_the_runs_of_each_row(segment_ids, expected):
    found = spans(np.array(segment_ids, np.int32))
    assert [tuple(span) for span in found.tolist()] == expected
