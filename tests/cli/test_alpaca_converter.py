"""`alpaca_converter` writes MindFormers' bytes, and reports what it cannot convert."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from msft.cli.alpaca_converter import main
from msft.data.formats import conversation

SCRIPT = Path(__file__).parents[2] / "tools" / "preprocess" / "alpaca_converter.py"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ROWS = [
    {"instruction": "Name 3 colours.", "input": "", "output": 'Red\n\tgreen "blue" \\ / \u2028'},
    {"instruction": "Translate {input}", "input": "café 你好 😀", "output": ""},
    {"output": "No input.", "instruction": "Hello {0} %s", "extra": [1]},
    {"instruction": "", "input": " ", "output": "blank input counts"},
]


def mindformers(rows, path):
    """MindFormers 1.3.2's script: Stanford's prompts, ids from 1 as text, json.dump with indent 2."""
    data = [
        {
            "id": str(number),
            "conversations": [
                {
                    "from": "human",
                    "value": (WITH_INPUT if row.get("input", "") != "" else WITHOUT_INPUT).format_map(row),
                },
                {"from": "gpt", "value": row["output"]},
            ],
        }
        for number, row in enumerate(rows, 1)
    ]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, ensure_ascii=False, indent=2)


def convert(tmp_path, text, name="rows.json"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return main(["--data_path", str(tmp_path / name), "--output_path", str(tmp_path / "out.json")])


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []])
def test_bytes_equal_mindformers(tmp_path, rows):
    assert convert(tmp_path, json.dumps(rows)) == 0
    mindformers(rows, tmp_path / "expected.json")
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


def test_json_lines_give_the_same_bytes(tmp_path):
    assert convert(tmp_path, "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), "rows.jsonl") == 0
    mindformers(ROWS, tmp_path / "expected.json")
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


def test_bad_rows_are_reported_with_their_index_and_left_out(tmp_path, capsys):
    rows = [ROWS[0], {"instruction": "x"}, 7, {"conversations": []}, ROWS[1]]
    assert convert(tmp_path, json.dumps(rows)) == 0
    mindformers([ROWS[0], ROWS[1]], tmp_path / "expected.json")
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "expected.json").read_bytes()
    shown = capsys.readouterr()
    assert "row 1: 'output' is missing" in shown.err and "row 2: not an alpaca row" in shown.err
    assert "row 3: not an alpaca row" in shown.err
    assert "dropped: bad rows" in shown.out and "rows read" in shown.out


def test_history_and_system_become_turns(tmp_path):
    row = {"instruction": "Why?", "output": "So.", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    assert convert(tmp_path, json.dumps([row])) == 0
    (entry,) = json.loads((tmp_path / "out.json").read_text())
    assert [turn["from"] for turn in entry["conversations"]] == ["system", "human", "gpt", "human", "gpt"]
    read = conversation(entry)
    assert read.system == "Be brief." and read.turns[-1].text == "So."


def test_missing_file_and_broken_json(tmp_path, capsys):
    assert main(["--data_path", str(tmp_path / "no.json"), "--output_path", str(tmp_path / "out.json")]) == 2
    assert "--data_path: no file" in capsys.readouterr().err
    assert convert(tmp_path, '[{"instruction": "a"') == 2
    assert "rows.json row 0" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_the_script_runs_without_installation(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    command = [sys.executable, SCRIPT, "--data_path", "rows.json", "--output_path", "out.json"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert len(json.loads((tmp_path / "out.json").read_text())) == 4
