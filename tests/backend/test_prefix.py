"""Protects where a context ends, what its tokens see and which positions tokens have, worked out by hand."""

import numpy as np
import pytest

from msft.backend import line, prefix
from msft.backend.contract import Batch
from msft.errors import RunError
from tests.conformance.families import spec_of

SPEC = spec_of("chatglm1")
SOP, GMASK, MASK = SPEC.prefix.begin, *SPEC.prefix.masks


@pytest.mark.parametrize(
    ("text", "context", "places", "blocks"),
    [
        # A question of two tokens, [gMASK], <sop>, an answer of two.
        ([5, 6, GMASK, SOP, 7, 8], 3, [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        # A blank in the middle of the context.
        ([5, MASK, 6, SOP, 7], 3, [0, 1, 2, 1, 1], [0, 0, 0, 1, 2]),
        # [gMASK] goes before [MASK], whichever comes first; the first of several.
        ([MASK, 5, GMASK, GMASK, SOP], 4, [0, 1, 2, 3, 2], [0, 0, 0, 0, 1]),
        # The first <sop> alone ends a context; a mask of the answer is no blank.
        ([5, GMASK, SOP, 7, SOP, 8], 2, [0, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4]),
        ([5, 6, SOP, GMASK, 7], 2, [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]),
        # Without one all is context.
        ([5, GMASK, 6], 3, [0, 1, 2], [0, 0, 0]),
        ([SOP, 5], 0, [0, 1], [1, 2]),
    ],
)
def test_positions_are_those_worked_out_by_hand(text, context, places, blocks):
    assert prefix.context(SPEC.prefix, np.array(text)) == context
    assert prefix.of_text(SPEC.prefix, np.array(text)).tolist() == [places, blocks]


IDS = np.array([[5, GMASK, SOP, 7, 6, 6, 6, 0], [0, 6, SOP, 7, 8, GMASK, SOP, 9]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 2, 2, 2, 2]], np.int32)


def batch_of(labels):
    zeros = np.zeros_like(IDS)
    return Batch(IDS, np.array(labels, np.int32), zeros, SEGMENTS, zeros)


def test_each_text_of_a_batch_has_its_own_context_and_positions():
    assert prefix.contexts(SPEC, IDS, SEGMENTS).tolist() == [[2, 2, 2, 2, 3, 3, 3, 0], [0, 1, 1, 1, 2, 2, 2, 2]]
    first, second = prefix.positions(SPEC, IDS, IDS * 0, SEGMENTS).tolist()
    assert first == [[0, 1, 1, 1, 0, 1, 2, 0], [0, 0, 1, 2, 0, 1, 1, 1]]
    assert second == [[0, 0, 1, 2, 0, 0, 0, 0], [0, 0, 1, 2, 0, 0, 1, 2]]
    assert prefix.positions(spec_of("llama"), IDS, IDS, SEGMENTS) is IDS


def test_what_follows_keeps_the_place_of_the_blank():
    last = prefix.positions(SPEC, IDS, IDS, SEGMENTS)[..., -1:]
    assert prefix.following(SPEC, last).tolist() == [[[0], [1]], [[1], [3]]]
    assert prefix.following(spec_of("llama"), np.array([[4]])).tolist() == [[5]]


def seen_by(tiles, count):
    """Which tokens of a line see which, from its tiles."""
    found = np.zeros((count, count), bool)
    for each in tiles:
        for queries, keys, allowed, real in zip(each.queries, each.keys, each.allowed, each.real, strict=True):
            for query, is_real, row in zip(queries, real, allowed, strict=True):
                if is_real:
                    found[query, keys[row]] = True
    return found


def test_tiles_let_a_context_see_itself_and_what_follows_all_before_it(monkeypatch):
    monkeypatch.setattr(line, "TILE", 2)
    contexts = prefix.contexts(SPEC, IDS, SEGMENTS)
    found = line.line(IDS, IDS * 0, SEGMENTS, contexts=contexts)
    assert found.contexts.tolist() == [2, 3, 1, 2]
    seen = seen_by(line.tiles(found.pieces, 0, found.contexts), 14)
    expected = np.zeros((14, 14), bool)
    for first, end, context in ((0, 4, 2), (4, 7, 3), (7, 10, 1), (10, 14, 2)):
        for query in range(first, end):
            expected[query, first : max(query + 1, first + context)] = True
    np.testing.assert_array_equal(seen, expected)


def test_a_long_context_is_seen_by_the_first_tile():
    pieces = np.array([[0, 200, 0, 200]])
    seen = seen_by(line.tiles(pieces, 0, np.array([150])), 200)
    assert seen[:150, :150].all() and not seen[:150, 150:].any()
    np.testing.assert_array_equal(seen[150:, 150:], np.tri(50, dtype=bool))
    assert seen[150:, :150].all()


def test_labels_inside_a_context_are_refused():
    """The token before <sop> says it without seeing it; those before see what they would learn."""
    nothing = np.full(IDS.shape, -100)
    fine = nothing.copy()
    fine[0, 1:4], fine[1, 5:] = 7, 7
    prefix.check_labels(SPEC, batch_of(fine))
    prefix.check_labels(spec_of("llama"), batch_of(IDS))
    fine[1, 4] = GMASK
    with pytest.raises(RunError, match=r"row 1 of a batch has labels before <sop> \(token 12\): chatglm1 reads"):
        prefix.check_labels(SPEC, batch_of(fine))
    nothing[0, 4] = 6
    with pytest.raises(RunError, match="row 0 of a batch"):
        prefix.check_labels(SPEC, batch_of(nothing))


def test_a_prompt_whose_answer_has_not_begun_is_refused():
    prefix.check_prompts(SPEC, [[5, GMASK, SOP]])
    with pytest.raises(RunError, match=r"prompt 2 has no <sop> \(token 12\), behind which chatglm1 answers"):
        prefix.check_prompts(SPEC, [[SOP], [5, GMASK]])
