"""Protects how tokens are dealt to ranks that share rows: each once, evenly, and with exactly the keys before it."""

import numpy as np
import pytest

from msft.backend import context
from msft.backend.contract import IGNORE, Batch

ROWS = np.array([[1] * 9 + [2] * 3 + [0] * 2, [0] * 2 + [1] * 5 + [2] * 7], np.int32)


def packed(lengths):
    """One row of examples of these lengths."""
    return np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].astype(np.int32)


def scores(segment_ids, dealt, ranks):
    """How many scores of causal attention each rank computes."""
    found = np.zeros(ranks, int)
    for number in np.unique(segment_ids[segment_ids > 0]):
        owners = dealt[segment_ids == number]
        np.add.at(found, owners, np.arange(1, len(owners) + 1))
    return found


def test_chunks_worked_by_hand():
    """Nine tokens in four chunks of 3, 2, 2, 2, of which each rank has the first and the last, or those between."""
    assert context.owners(ROWS, 2).tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 0, -1, -1],
        [-1, -1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("lengths", [[8192], [5000, 3000], [900, 70, 2100, 333, 17, 1, 1, 1, 640], [200] * 40])
def test_ranks_have_as_many_tokens_and_as_many_scores(lengths, ranks):
    segment_ids = packed(lengths)
    dealt = context.owners(segment_ids, ranks)
    assert (dealt >= 0).all()
    tokens, pairs = np.bincount(dealt.ravel(), minlength=ranks), scores(segment_ids, dealt, ranks)
    assert tokens.max() / tokens.mean() < 1.02
    assert pairs.max() / pairs.mean() < 1.03


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("segment_ids", [ROWS, packed([300, 1, 77]), packed([1])], ids=["rows", "row", "token"])
def test_each_token_is_computed_once_and_sees_its_example_up_to_itself(segment_ids, ranks):
    line = np.flatnonzero(segment_ids)
    example = np.cumsum(np.diff(segment_ids.ravel()[line], prepend=0) != 0)
    seen = np.zeros((len(line), len(line)), int)
    gathered = []
    for rank in range(ranks):
        part = context.part(segment_ids, ranks, rank)
        gathered += [*part.places, *[-1] * (part.most - len(part.places))]
        queries = np.searchsorted(line, part.places)
        for first, end, start, stop in part.pieces:
            for query in range(first, end):
                seen[queries[query], start : stop - (end - 1 - query)] += 1
    order = np.arange(len(line))
    np.testing.assert_array_equal(seen, (example[:, None] == example) & (order[:, None] >= order))
    np.testing.assert_array_equal(np.array(gathered)[part.order(part.most)], line)


def test_the_parts_of_a_batch_count_its_tokens_and_labels_once():
    labels = np.where(ROWS > 0, 7, IGNORE).astype(np.int32)
    whole = Batch(ROWS, labels, ROWS, ROWS, ROWS)
    parts = [context.share(whole, 4, rank) for rank in range(4)]
    assert sum(part.tokens for part in parts) == whole.tokens == sum(part.supervised for part in parts)
    assert all((part.labels[~part.own] == IGNORE).all() and part.is_shared for part in parts)
    assert context.share(whole, 1, 0) is whole and not whole.is_shared


def test_ranks_without_a_token_have_a_stand_in():
    part = context.part(packed([1]), 2, 1)
    assert len(part.places) == 0 and len(part.pieces) == 0 and part.most == 1
    assert part.stand_in().places.tolist() == [0] and part.stand_in().pieces.tolist() == [[0, 1, 0, 1]]
    assert context.part(ROWS * 0, 2, 1).most == 0


def test_a_line_is_filled_up_with_tokens_that_see_themselves_or_the_first_of_all_ranks():
    """One token in all, which one rank of two has: it is all of the line there, and yet keys are gathered."""
    alone = context.part(packed([1])).filled(4)
    assert alone.pieces.tolist() == [[0, 1, 0, 1], [1, 4, 1, 4]] and alone.most == 4
    shared = context.part(packed([1]), 2, 0).filled(4, is_shared=True)
    assert shared.pieces.tolist() == [[0, 1, 0, 1], [1, 2, 0, 1], [2, 3, 0, 1], [3, 4, 0, 1]]
    assert context.part(packed([8]), 2, 0).filled(4, is_shared=True).pieces.tolist() == [[0, 2, 0, 2], [2, 4, 0, 8]]
