"""Rows of every known format become the same conversation; a bad row says why and nothing else ever happens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msft.data.formats import BadRow, Conversation, Turn, conversation

QUESTION, ANSWER = Turn("user", "Why?"), Turn("assistant", "So.")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Why?", "input": "", "output": "So."},
        {"instruction": "Why?", "output": "So."},
        {"instruction": "Why?", "input": None, "output": "So.", "system": "", "history": None},
        {"instruction": "", "input": "Why?", "output": "So."},
        {"id": "1", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"conversations": [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": "So."}]},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
        {"conversation_id": 1, "category": "x", "conversation": [{"human": "Why?", "assistant": "So."}]},
    ],
)
def test_every_format_gives_the_same_conversation(row):
    assert conversation(row) == Conversation((QUESTION, ANSWER), None)


def test_instruction_and_input_are_joined_by_a_line_break():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert conversation(row).turns[0] == Turn("user", "Add.\n1 2")


def test_alpaca_history_and_system_are_kept():
    row = {"instruction": "Why?", "output": "So.", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    turns = (Turn("user", "Hi"), Turn("assistant", "Hello"), QUESTION, ANSWER)
    assert conversation(row) == Conversation(turns, "Be brief.")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Why?"}]},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Why?"}]},
        {"system": "S", "conversations": [{"from": "human", "value": "Why?"}]},
    ],
)
def test_system_messages(row):
    assert conversation(row) == Conversation((QUESTION,), "S")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "not a JSON object but text"),
        (None, "not a JSON object but nothing"),
        ({}, "no 'conversations', 'messages', 'conversation' or 'instruction' among its keys (none)"),
        ({"conversatoin": []}, "did you mean 'conversation'?"),
        ({"conversation": []}, "'conversation' is an empty list, not a list of {'human', 'assistant'} objects"),
        ({"conversation": [{"human": "Why?"}]}, "'conversation' entry 1: 'assistant' is nothing, not text"),
        ({"instruction": "Why?"}, "'output' is missing"),
        ({"instruction": "Why?", "output": None}, "'output' is null"),
        ({"instruction": 3, "output": "x"}, "'instruction' is a number, not text"),
        ({"instruction": " ", "output": "x"}, "'instruction' and 'input' are empty"),
        ({"instruction": "a", "output": "\ud800"}, "'output' holds half a surrogate pair"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "'history' entry 1 is not a [user, assistant] pair"),
        ({"conversations": []}, "'conversations' is an empty list"),
        ({"conversations": {}}, "'conversations' is an object, not a list of turns"),
        ({"conversations": [3]}, "'conversations' entry 1 is a number"),
        ({"conversations": [{"from": "humna", "value": "x"}]}, "unknown 'from' 'humna', did you mean 'human'?"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "unknown 'from' ['gpt']"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "'content' is a list, not text"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "must come first"),
        ({"messages": [{"role": "system", "content": "b"}]}, "'messages' has no turns"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool calls are not supported"),
    ],
)
def test_bad_rows_say_why(row, reason):
    with pytest.raises(BadRow) as caught:
        conversation(row)
    assert reason in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["conversations", "messages", "instruction", "input", "output", "history", "system"])
            | st.sampled_from(["from", "value", "role", "content", "tool_calls"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
@settings(max_examples=300, deadline=None)
def test_any_json_value_is_a_conversation_or_a_bad_row(row):
    try:
        result = conversation(row)
    except BadRow as reason:
        assert str(reason)
    else:
        assert result.turns and {turn.role for turn in result.turns} <= {"user", "assistant"}
