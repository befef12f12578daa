"""Every row of the input is in the MindRecord file or in the report; the file reads back as it was made."""

import json

import numpy as np
import pytest
from text_folders import byte_level_folder, llama_model

from msft.data import qa
from msft.data.collate import align
from msft.data.mindrecord import open_mindrecord
from msft.data.preprocess import Options, preprocess
from msft.data.tokenizers import open_tokenizer
from msft.errors import InputError, RunError

IGNORE = -100
ROWS = [
    {"instruction": f"Count to {number}.", "input": "", "output": " ".join(map(str, range(number + 1)))}
    for number in range(40)
]


def write_rows(path, rows, lines=False):
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


def run(tmp_path, rows, name="out", lines=False, **options):
    source = write_rows(tmp_path / f"rows.{'jsonl' if lines else 'json'}", rows, lines)
    settings = {"dataset_type": "qa", "seq_length": 64, "model_file": str(llama_model())} | options
    report = preprocess(Options(input_glob=str(source), output_file=str(tmp_path / name), **settings))
    return report, read(tmp_path / name)


def read(path):
    data = open_mindrecord(path)
    return [data.row(number) for number in range(len(data))]


def texts(rows, tokenizer):
    return [tokenizer.decode(row["labels"][row["labels"] != IGNORE]) for row in rows]


def test_rows_have_one_token_more_than_seq_length_and_end_in_padding(tmp_path):
    report, rows = run(tmp_path, ROWS[:3])
    tokenizer = open_tokenizer(llama_model())
    assert texts(rows, tokenizer) == ["0", "0 1", "0 1 2"]
    for row in rows:
        assert {array.dtype for array in row.values()} == {np.dtype(np.int32)}
        assert len(row["input_ids"]) == len(row["labels"]) == 65
        real = np.flatnonzero(row["labels"] != IGNORE)[-1] + 1
        assert row["input_ids"][real - 1] == tokenizer.eos_id
        assert (row["input_ids"][real:] == 0).all() and (row["labels"][real:] == IGNORE).all()
    assert report.tokens["written"] + report.tokens["padding"] == 3 * 65


def test_mindspore_reads_the_file(tmp_path):
    from mindspore.dataset import MindDataset

    _, rows = run(tmp_path, ROWS[:5])
    data = MindDataset(str(tmp_path / "out"), columns_list=["input_ids", "labels"], shuffle=False)
    found = list(data.create_dict_iterator(num_epochs=1, output_numpy=True))
    assert len(found) == len(rows) == 5
    for theirs, ours in zip(found, rows, strict=True):
        for column in ("input_ids", "labels"):
            np.testing.assert_array_equal(theirs[column], ours[column])


@pytest.mark.parametrize("lines", [False, True])
def test_the_number_of_processes_changes_nothing(tmp_path, monkeypatch, lines):
    monkeypatch.setattr("msft.data.qa.BYTES_PER_WORKER", 500)
    monkeypatch.setattr("msft.data.rows.chunks.__defaults__", (700,))
    asked, in_order = [], qa.in_order
    monkeypatch.setattr("msft.data.qa.in_order", lambda *words: asked.append(words[-1]) or in_order(*words))
    bad = [*ROWS[:10], {"instruction": 1}, *ROWS[10:20], "x", *ROWS[20:]]
    results = [run(tmp_path, bad, f"out{workers}", lines, num_workers=workers) for workers in (1, 2)]
    (one, rows), (two, same) = results
    assert len(rows) == 40 and asked == [1, 2]
    for row, other in zip(rows, same, strict=True):
        np.testing.assert_array_equal(row["input_ids"], other["input_ids"])
        np.testing.assert_array_equal(row["labels"], other["labels"])
    assert (one.rows, one.tokens, one.dropped) == (two.rows, two.tokens, two.dropped)
    assert [each.row for each in one.dropped] == [10, 21]


def test_every_row_is_accounted_for(tmp_path, capsys):
    long_question = {"instruction": "why " * 100, "output": "So."}
    long_answer = {"instruction": "Go", "output": "word " * 100}
    rows = [ROWS[1], {"instruction": "Hi"}, long_question, long_answer, {"instruction": "Say nothing", "output": ""}]
    report, written = run(tmp_path, rows)
    assert report.rows == {"read": 5, "written": 2, "bad": 1, "without_supervision": 2, "cut": 2}
    assert report.remarks == {"empty_answer": 1}
    assert [(each.row, each.reason) for each in report.dropped] == [
        (1, "'output' is missing"),
        (2, "nothing supervised is left"),
        (4, "nothing supervised is left"),
    ]
    assert (written[1]["input_ids"] != 0).all() and written[1]["labels"][-1] != IGNORE
    saved = json.loads((tmp_path / "out.report.json").read_text())
    assert saved["rows"] == dict(report.rows) and saved["dropped"][0]["reason"] == "'output' is missing"
    assert saved["template"] == "vicuna_v1.1" and saved["seq_length"] == 64
    shown = capsys.readouterr()
    assert "dropped: bad rows" in shown.out and "nothing supervised left" in shown.out and "rows/s" in shown.out
    assert "row 1: 'output' is missing" in shown.err


def test_only_the_first_bad_rows_are_shown(tmp_path, capsys):
    report, _ = run(tmp_path, [{}] * 30 + ROWS[:1])
    shown = capsys.readouterr().err
    assert shown.count("warning: dropped") == 10 and "and 20 more dropped rows, all in the report" in shown
    assert len(json.loads((tmp_path / "out.report.json").read_text())["dropped"]) == 30


@pytest.mark.parametrize("config", [{}, {"pad_token": None}, {"pad_token": "<|endoftext|>"}])
def test_readers_find_the_end_of_the_text_whatever_pads(tmp_path, config):
    """Padding may equal the end token or stand in the text: what batches take as real is what was tokenized."""
    folder = byte_level_folder(tmp_path / "tokenizer", **config)
    tokenizer = open_tokenizer(folder)
    talks = [["Say <|endoftext|>", "<|endoftext|> <|im_end|>"], ["Hi", "Hello", "Empty?", ""], ["a", "b"]]
    data = [
        {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(talk)]}
        for talk in talks
    ]
    for template in ("chat", "vicuna_v1.1"):
        _, rows = run(tmp_path, data, template, model_file=str(folder), template=template, seq_length=400)
        assert len(rows) == 3
        for row in rows:
            end = np.flatnonzero(row["labels"] != IGNORE)[-1] + 1
            example = align(row, tokenizer.pad_id)
            assert len(example.input_ids) >= end - 1
            np.testing.assert_array_equal(example.labels[: end - 1], row["labels"][1:end])
            assert (example.labels[end - 1 :] == IGNORE).all()


def test_shards(tmp_path):
    report, rows = run(tmp_path, ROWS, file_partition=3)
    assert sorted(path.name for path in tmp_path.glob("out?")) == ["out0", "out1", "out2"]
    assert len(rows) == report.rows["written"] == 40


def test_several_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        write_rows(tmp_path / f"{name}.json", [{"instruction": "x", "output": name}, 3])
    options = Options(str(tmp_path / "*.json"), str(llama_model()), str(tmp_path / "out"), "qa", 64)
    report = preprocess(options)
    assert texts(read(tmp_path / "out"), open_tokenizer(llama_model())) == ["a", "b"]
    assert [(each.file[-6:], each.row) for each in report.dropped] == [("a.json", 1), ("b.json", 1)]


def test_notes_say_how_answers_end_and_what_had_no_effect(tmp_path):
    report, _ = run(tmp_path, ROWS[:1], repeat=2, samples_num=5)
    assert "template vicuna_v1.1: an answer ends with '</s>' (stop ids: 2)" in report.notes
    assert "--repeat is for --dataset_type wiki and had no effect" in report.notes
    assert "--samples_num is for --dataset_type wikipedia and had no effect" in report.notes
    report, _ = run(tmp_path, ROWS[:1], "raw", template="raw")
    assert "template raw: no end mark of its own, so the end token is added (stop ids: 2)" in report.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_length": 0, "num_workers": 0}, "--seq_length must be 1 or more, not 0\n--num_workers must be 1 or more"),
        ({"dataset_type": "squad"}, "--dataset_type 'squad' must be one of qa, wiki, wikipedia"),
        ({"model_file": "nowhere.model"}, "tokenizer: no file or folder 'nowhere.model'"),
        ({"template": "vicuna"}, "did you mean 'vicuna_v1.1'"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        run(tmp_path, ROWS[:1], **options)
    assert message in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_left_behind_when_no_row_or_no_file_is_good(tmp_path):
    with pytest.raises(InputError, match="no row is left to write"):
        run(tmp_path, [{}, {}])
    with pytest.raises(InputError, match="no file matches"):
        preprocess(Options(str(tmp_path / "*.txt"), str(llama_model()), str(tmp_path / "out"), "qa"))
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}, {')
    with pytest.raises(InputError, match="rows.json row 1"):
        preprocess(Options(str(tmp_path / "rows.json"), str(llama_model()), str(tmp_path / "out"), "qa"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_an_old_output_survives_a_failure(tmp_path, monkeypatch):
    _, rows = run(tmp_path, ROWS[:2])
    monkeypatch.setattr("msft.data.preprocess.qa.encode_files", _broken)
    with pytest.raises(RunError):
        run(tmp_path, ROWS)
    assert len(read(tmp_path / "out")) == len(rows) == 2


def _broken(*arguments):
    raise RunError("a worker process died")
    yield


def test_without_a_named_template_the_tokenizers_own_or_its_familys_is_taken(tmp_path):
    """A sentencepiece model alone gets vicuna_v1.1, as in MindFormers."""
    own, bare = byte_level_folder(tmp_path / "own"), byte_level_folder(tmp_path / "bare", chat_template=None)
    (bare / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    for model_file, template in ((own, "chat"), (bare, "qwen-7b-chat"), (llama_model(), "vicuna_v1.1")):
        report, _ = run(tmp_path, ROWS[:3], template, model_file=str(model_file), seq_length=256)
        assert report.settings["template"] == template
        assert any(note.startswith(f"template {template}: an answer ends with") for note in report.notes)
    (bare / "config.json").write_text(json.dumps({"model_type": ["no", "name"]}))
    report, _ = run(tmp_path, ROWS[:3], "unknown", model_file=str(bare), seq_length=256)
    assert report.settings["template"] == "vicuna_v1.1"
