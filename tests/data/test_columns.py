"""Rows with other keys are read as LLaMA-Factory's dataset_info.json says, and rows that do not fit say why."""

import json

import numpy as np
import pytest
from text_folders import llama_model

from msft.data.columns import Columns
from msft.data.formats import BadRow, Conversation, Turn
from msft.data.mindrecord import open_mindrecord
from msft.data.preprocess import Options, preprocess
from msft.data.rows import Source
from msft.data.tokenizers import open_tokenizer

CHATS = Columns(
    is_turns=True, messages="messages", role_tag="role", content_tag="content", user_tag="user", assistant_tag="bot"
)


def test_a_question_and_its_answer_under_other_names():
    columns = Columns(prompt="q", query=None, response="a", history="before", system="s")
    row = {"q": "Why?", "a": "So.", "input": "not asked", "before": [["Hi", "Hello"]], "s": "Be brief."}
    turns = (Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Why?"), Turn("assistant", "So."))
    assert columns.conversation(row) == Conversation(turns, "Be brief.")
    # Without a name for them, neither is read.
    plain = {"instruction": "Why?", "input": "Here?", "output": "So.", "history": [["Hi", "Hello"]], "system": "S"}
    assert Columns().conversation(plain) == Conversation((Turn("user", "Why?\nHere?"), Turn("assistant", "So.")), None)


def test_turns_under_other_names():
    said = [("system", "S"), ("user", "Why?"), ("bot", "So.")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    assert CHATS.conversation(row) == Conversation((Turn("user", "Why?"), Turn("assistant", "So.")), "S")


@pytest.mark.parametrize(
    ("columns", "row", "reason"),
    [
        (Columns(), "text", "not a JSON object"),
        (
            Columns(),
            {"instruction": "", "input": None, "output": "x"},
            "nothing is asked: instruction and input are empty",
        ),
        (Columns(), {"instruction": "x"}, "'output' is missing"),
        (CHATS, {"messages": []}, "'messages' is no list of turns"),
        (CHATS, {"messages": [{"role": "gpt", "content": "x"}]}, "turn 1 has 'role' 'gpt', expected the user's"),
        (CHATS, {"messages": [{"role": "user", "content": "x"}]}, "the last turn is not the assistant's"),
        (CHATS._replace(system_tag=None), {"messages": [{"role": "system", "content": "x"}]}, "'role' 'system'"),
    ],
)
def test_rows_that_do_not_fit_say_why(columns, row, reason):
    with pytest.raises(BadRow) as refusal:
        columns.conversation(row)
    assert reason in str(refusal.value)


def prepared(tmp_path, **options):
    output = tmp_path / "out.mindrecord"
    report = preprocess(Options("", str(llama_model()), str(output), **options))
    data = open_mindrecord(output)
    return report, [data.row(number) for number in range(len(data))]


def test_several_files_each_with_its_columns_and_its_first_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"q": f"q{n}", "a": f"{n}"} for n in range(5)]))
    lines = [{"messages": [{"role": "user", "content": "x"}, {"role": "bot", "content": f"b{n}"}]} for n in range(3)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = (
        Source(str(tmp_path / "a.json"), Columns(prompt="q", response="a"), 2),
        Source(str(tmp_path / "b.jsonl"), CHATS),
    )
    report, rows = prepared(tmp_path, dataset_type="qa", seq_length=40, sources=sources)
    decode = open_tokenizer(llama_model()).decode
    assert [decode(row["labels"][row["labels"] != -100]) for row in rows] == ["0", "1", "b0", "b1", "b2"]
    assert report.rows["read"] == report.rows["written"] == 5
    again = preprocess(Options("", str(llama_model()), str(tmp_path / "out.mindrecord"), "qa", 40, sources=sources))
    assert again is None
    # Another limit is other data.
    fewer = (sources[0]._replace(limit=1), sources[1])
    report, rows = prepared(tmp_path, dataset_type="qa", seq_length=40, sources=fewer)
    assert len(rows) == 4


@pytest.mark.parametrize(("begin", "end"), [(True, False), (False, True)])
def test_running_text_is_joined_and_cut(tmp_path, begin, end):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"no": 1}\n{"text": "three"}\n{"text": "four five six"}')
    report, rows = prepared(
        tmp_path, dataset_type="text", seq_length=3, sources=(Source(str(tmp_path / "a.jsonl")),), begin=begin, end=end
    )
    tokenizer = open_tokenizer(llama_model())
    ids = [
        token
        for text in ("one two", "three", "four five six")
        for token in [*[1] * begin, *tokenizer.encode([text])[0].ids.tolist(), *[2] * end]
    ]
    whole = len(ids) // 4 * 4
    np.testing.assert_array_equal([row["input_ids"] for row in rows], np.reshape(ids[:whole], (-1, 4)))
    assert [entry.reason for entry in report.dropped] == ["'text' is missing"]
