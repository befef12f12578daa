"""The road of the MindFormers guide through the command line: alpaca JSON -> conversations -> MindRecord."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from msft.cli.llama_preprocess import main, parser
from msft.data.mindrecord import open_mindrecord
from tests.data.text_folders import byte_level_folder, llama_model

TOOLS = Path(__file__).parents[2] / "tools" / "preprocess"
ROWS = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("one", "two", "three")]


def arguments(tmp_path, **more):
    words = {
        "dataset_type": "qa",
        "input_glob": tmp_path / "rows.json",
        "model_file": llama_model(),
        "seq_length": 64,
        "output_file": tmp_path / "out.mindrecord",
    } | more
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


def answers(tokenizer, path):
    data = open_mindrecord(path)
    labels = [data.row(number)["labels"] for number in range(len(data))]
    return [tokenizer.decode([token for token in row.tolist() if token != -100]) for row in labels]


def test_the_guides_two_scripts(tmp_path):
    (tmp_path / "alpaca.json").write_text(json.dumps(ROWS))
    convert = [
        sys.executable,
        TOOLS / "alpaca_converter.py",
        "--data_path",
        "alpaca.json",
        "--output_path",
        "rows.json",
    ]
    subprocess.run(convert, cwd=tmp_path, check=True, capture_output=True)
    command = [
        sys.executable,
        TOOLS / "llama_preprocess.py",
        *arguments(tmp_path, seq_length=256, num_workers=2, tokenizer="llama"),
    ]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "rows written" in result.stdout and "KiB of rows" in result.stderr
    from msft.data.tokenizers import open_tokenizer

    assert answers(open_tokenizer(llama_model()), tmp_path / "out.mindrecord") == ["one", "two", "three"]
    data = open_mindrecord(tmp_path / "out.mindrecord")
    text = open_tokenizer(llama_model()).decode(data.row(0)["input_ids"])
    assert "### Instruction:\nSay one.\n\n### Response: ASSISTANT: one" in text


def test_the_tokenizers_own_chat_template(rows):
    from msft.data.tokenizers import open_tokenizer

    folder = byte_level_folder(rows / "tokenizer")
    assert main(arguments(rows, model_file=folder, template="chat", file_partition=2)) == 0
    # The first file of a set stands for all of it; rows went to the two files in turn.
    assert answers(open_tokenizer(folder), rows / "out.mindrecord0") == ["one", "three", "two"]


def test_defaults_are_mindformers():
    words = parser().parse_args(["--input_glob", "a", "--model_file", "b", "--output_file", "c"])
    assert (words.dataset_type, words.seq_length, words.file_partition) == ("wiki", 2048, 1)
    assert (words.repeat, words.samples_num, words.tokenizer) == (1, 10000, "llama")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"input_glob": "nothing*.json"}, "error: --input_glob: no file matches 'nothing*.json'"),
        ({"template": "vicuna_v1"}, "did you mean 'vicuna_v1.1'?"),
        ({"template": "chat"}, "the tokenizer has no chat template"),
        ({"seq_length": 0}, "--seq_length must be 1 or more"),
    ],
)
def test_bad_input_is_one_clear_error(rows, capsys, more, message):
    assert main(arguments(rows, **more)) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert not list(rows.glob("out*"))


def test_unknown_dataset_types_and_options_name_what_is_there(rows, capsys):
    for words, message in [
        (["--dataset_type", "squad"], "invalid choice: 'squad'"),
        (["--seq_len", "3"], "--seq_length"),
    ]:
        with pytest.raises(SystemExit) as caught:
            main([*arguments(rows), *words])
        assert caught.value.code == 2 and message in capsys.readouterr().err


def test_no_framework_is_imported(rows):
    code = (
        "import sys\nfrom msft.cli.llama_preprocess import main\n"
        f"main({arguments(rows)!r})\n"
        "found = {'torch', 'mindspore', 'transformers', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
