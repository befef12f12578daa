"""Protects the order in which stages compute: 1F1B by hand, never more kept than it allows, and never a deadlock."""

import itertools

import pytest

from msft.backend.pipeline import Backward, Exchange, Forward, run, schedule


def words(stage, stages, count):
    """A schedule in short: F0 and B0 compute; >0 gives hidden states ahead, <0 a gradient behind, 1 and 2 meet at once.

    '>1<0' is a meeting in which both go.
    """

    def word(action):
        if isinstance(action, Exchange):
            forward = "" if action.forward is None else f">{action.forward}"
            backward = "" if action.backward is None else f"<{action.backward}"
            return f"{'next' if action.ahead else 'before'}{forward}{backward}"
        return f"{'F' if isinstance(action, Forward) else 'B'}{action.number}"

    return " ".join(map(word, schedule(stage, stages, count)))


@pytest.mark.parametrize(
    ("stage", "stages", "count", "expected"),
    [
        (0, 1, 2, "F0 B0 F1 B1"),
        (0, 2, 3, "F0 next>0 F1 next>1<0 B0 F2 next>2<1 B1 next<2 B2"),
        (1, 2, 3, "before>0 F0 B0 before>1<0 F1 B1 before>2<1 F2 B2 before<2"),
        (0, 4, 4, "F0 next>0 F1 next>1 F2 next>2 F3 next>3<0 B0 next<1 B1 next<2 B2 next<3 B3"),
        (
            1,
            4,
            4,
            "before>0 F0 next>0 before>1 F1 next>1 before>2 F2 next>2<0 B0 before>3<0 F3 next>3<1 B1 before<1 "
            "next<2 B2 before<2 next<3 B3 before<3",
        ),
        (
            2,
            4,
            4,
            "before>0 F0 next>0 before>1 F1 next>1<0 B0 before>2<0 F2 next>2<1 B1 before>3<1 F3 next>3<2 B2 before<2 "
            "next<3 B3 before<3",
        ),
        (3, 4, 4, "before>0 F0 B0 before>1<0 F1 B1 before>2<1 F2 B2 before>3<2 F3 B3 before<3"),
    ],
)
def test_orders_by_hand(stage, stages, count, expected):
    assert words(stage, stages, count) == expected


SIZES = [*itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4, 5, 9)), (8, 0)]


@pytest.mark.parametrize(("stages", "count"), SIZES)
def test_stages_meet_each_other_and_all_come_to_their_end(stages, count):
    """Stages go on in turn; a meeting takes place when both are at it, and then gives and takes the same."""
    left = [list(schedule(stage, stages, count)) for stage in range(stages)]

    def step():
        for stage, actions in enumerate(left):
            if not actions:
                continue
            if not isinstance(actions[0], Exchange):
                actions.pop(0)
                return True
            other = left[stage + 1] if actions[0].ahead else left[stage - 1]
            if other and other[0] == actions[0]._replace(ahead=not actions[0].ahead):
                actions.pop(0), other.pop(0)
                return True
        return False

    while step():
        pass
    assert not any(left)


@pytest.mark.parametrize(("stages", "count"), SIZES)
def test_every_micro_batch_goes_there_and_back_and_few_are_kept(stages, count):
    for stage in range(stages):
        actions = list(schedule(stage, stages, count))
        assert [action.number for action in actions if isinstance(action, Forward)] == list(range(count))
        assert [action.number for action in actions if isinstance(action, Backward)] == list(range(count))
        kept, most = 0, 0
        for action in actions:
            kept += isinstance(action, Forward) - isinstance(action, Backward)
            most = max(most, kept)
        assert most == min(stages - stage, count)


def test_run_hands_on_what_was_computed_and_taken():
    seen = []

    class Middle:
        def forward(self, number, taken):
            seen.append(("forward", number, taken))
            return f"hidden {number}"

        def backward(self, number, taken):
            seen.append(("backward", number, taken))
            return f"gradient {number}"

        def exchange(self, given, taken, ahead):
            seen.append((given, taken, ahead))
            return None if taken is None else f"{'next' if ahead else 'before'} {taken}"

    run(schedule(1, 3, 2), Middle())
    assert seen == [
        (None, 0, False),
        ("forward", 0, "before 0"),
        ("hidden 0", None, True),
        (None, 1, False),
        ("forward", 1, "before 1"),
        ("hidden 1", 0, True),
        ("backward", 0, "next 0"),
        ("gradient 0", None, False),
        (None, 1, True),
        ("backward", 1, "next 1"),
        ("gradient 1", None, False),
    ]
