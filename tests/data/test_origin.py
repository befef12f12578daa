"""What is there already, whole and made from the very same, is not made again; anything else is made anew."""

import json
import os
import signal
import subprocess
import sys

import pytest
from text_folders import CHATML, byte_level_folder, llama_model, write_config

from msft.data import origin, qa
from msft.data.preprocess import Options, preprocess

ROWS = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A finished run with a chat template, and what makes it again; `runs` counts the runs that read rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    byte_level_folder(tmp_path / "tokenizer")
    encode_files = qa.encode_files
    runs = []
    monkeypatch.setattr("msft.data.qa.encode_files", lambda *words: runs.append(words) or encode_files(*words))

    def make(**more):
        settings = {"dataset_type": "qa", "seq_length": 64, "template": "chat", "file_partition": 2} | more
        return preprocess(Options("rows.json", **({"model_file": "tokenizer", "output_file": "out"} | settings)))

    assert make().rows["written"] == 3 and len(runs) == 1
    make.runs = runs
    return make


def test_the_same_is_not_made_again(made, tmp_path, capsys):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("out*")}
    capsys.readouterr()
    assert made() is None and made(num_workers=1) is None
    assert len(made.runs) == 1
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("out*")} == before
    shown = capsys.readouterr().out
    assert "out: is there already, made from the same data, tokenizer and options" in shown and "--overwrite" in shown


def test_overwrite_makes_it_anew(made, tmp_path):
    before = (tmp_path / "out0").stat().st_mtime_ns
    assert made(overwrite=True).rows["written"] == 3
    assert (tmp_path / "out0").stat().st_mtime_ns > before and made() is None


def _one_byte(path):
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    stamp = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def _other_words(path):
    stamp = path.stat()
    path.write_text(path.read_text().replace("two", "TWO"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


INPUTS = {
    "data of the same size and time": lambda root: _other_words(root / "rows.json"),
    "tokenizer": lambda root: _other_token(root / "tokenizer" / "tokenizer.json"),
    "template": lambda root: byte_level_folder(root / "tokenizer", chat_template=CHATML + "\n"),
    "template file": lambda root: (root / "tokenizer" / "chat_template.jinja").write_text(CHATML),
    "end token": lambda root: write_config(root / "tokenizer", eos_token="<|endoftext|>", chat_template=CHATML),
}


def _other_token(path):
    state = json.loads(path.read_text())
    state["model"]["merges"].pop()
    path.write_text(json.dumps(state))


@pytest.mark.parametrize("changed", INPUTS)
def test_another_input_is_new_work(made, tmp_path, changed):
    INPUTS[changed](tmp_path)
    assert made().rows["written"] == 3 and made() is None


@pytest.mark.parametrize("options", [{"seq_length": 63}, {"template": "zephyr"}, {"samples_num": 3}])
def test_another_option_is_new_work(made, options):
    assert made(**options).rows["written"] == 3 and made(**options) is None
    assert made().rows["written"] == 3


def test_another_kind_of_data_is_new_work(made, tmp_path):
    (tmp_path / "rows.json").write_text("word " * 200)
    wiki = {"dataset_type": "wiki", "template": "vicuna_v1.1", "model_file": str(llama_model())}
    assert made(**wiki).rows["written"] > 0
    assert made(**wiki) is None and made(**wiki, repeat=2).rows["written"] > 0


def test_another_format_or_library_is_new_work(made, monkeypatch):
    monkeypatch.setattr(origin, "FORMAT", origin.FORMAT + 1)
    assert made() is not None
    monkeypatch.setattr(origin.importlib.metadata, "version", lambda name: "0.0")
    assert made() is not None and made() is None


def test_a_template_that_shows_the_time_is_never_the_same(made, tmp_path):
    byte_level_folder(tmp_path / "tokenizer", chat_template="{{ strftime_now('%f') }}" + CHATML)
    assert made() is not None and made() is not None


def _cut(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(("name", "damage"), [("out0", _one_byte), ("out1", _cut), ("out0.db", os.remove)])
def test_damaged_output_is_made_anew(made, tmp_path, name, damage):
    whole = (tmp_path / name).read_bytes()
    damage(tmp_path / name)
    assert made().rows["written"] == 3
    assert (tmp_path / name).read_bytes() == whole and made() is None


@pytest.mark.parametrize("content", [None, b"\xff", b'{"made_from": 1, "files": []}', b"[" * 10**5])
def test_a_report_that_says_nothing_is_no_record(made, tmp_path, content):
    report = tmp_path / "out.report.json"
    os.remove(report) if content is None else report.write_bytes(content)
    assert made().rows["written"] == 3 and made() is None


def test_a_report_of_other_files_is_no_record(made, tmp_path):
    recorded = json.loads((tmp_path / "out.report.json").read_text())
    assert sorted(recorded["files"]) == ["out0", "out0.db", "out1", "out1.db"]
    del recorded["files"]["out1.db"]
    (tmp_path / "out.report.json").write_text(json.dumps(recorded))
    assert made() is not None


def test_data_that_changes_during_the_run_leaves_no_record(made, tmp_path, monkeypatch):
    encode_files = qa.encode_files

    def changing(*words):
        yield from encode_files(*words)
        (tmp_path / "rows.json").write_text(json.dumps(ROWS[:2]))

    with monkeypatch.context() as patch:
        patch.setattr("msft.data.qa.encode_files", changing)
        report = made(overwrite=True)
    assert any("the data changed while it was read" in note for note in report.notes)
    assert "made_from" not in json.loads((tmp_path / "out.report.json").read_text())
    assert made().rows["written"] == 2


def test_a_run_that_was_killed_is_no_record(made, tmp_path):
    """Killed when the files are in place and the report is not written."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:2]))
    code = (
        "import os, signal, sys\nfrom msft.cli.llama_preprocess import main\nfrom msft.data.report import Report\n"
        "Report.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nmain(sys.argv[1:])"
    )
    words = "--dataset_type qa --input_glob rows.json --model_file tokenizer --output_file out --seq_length 64"
    command = [sys.executable, "-c", code, *words.split(), "--template", "chat", "--file_partition", "2"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert made().rows["written"] == 2 and made() is None
