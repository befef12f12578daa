"""Protects `make bench`: its questions exist, wrong arguments end at once, our start-up is measured for real."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import growth, startup
from benchmarks.common.answer import Answer, absolute
from benchmarks.common.process import Failed, run
from benchmarks.common.rows import write_alpaca
from benchmarks.run import QUESTIONS, main

ROOT = Path(__file__).parents[2]
MEGA = 1 << 20


def test_the_list_names_every_question_and_each_is_a_file(capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(QUESTIONS)
    for name in QUESTIONS:
        module = import_module(f"benchmarks.{name}")
        assert module.QUESTION and callable(module.measure)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["speed"], "no question is named speed"),
        (["startup"], "which alpaca rows"),
        (["startup", "--data", "nowhere.json"], "there is no nowhere.json"),
        (["startup", "--data", __file__, "--model", "nowhere"], "make model"),
        (["startup", "--rows", "8"], "32 at least"),
    ],
)
def test_wrong_arguments_end_before_anything_is_measured(words, said, monkeypatch):
    monkeypatch.delenv("DATA", raising=False)
    with pytest.raises(SystemExit, match=said):
        main(words)


def test_a_question_that_fails_does_not_take_the_others_along(tmp_path, monkeypatch, capsys):
    def fail(settings):
        raise Failed("a peer ended with 1")

    monkeypatch.setattr(startup, "measure", fail)
    monkeypatch.setattr(growth, "measure", lambda settings: Answer("?", [], [absolute("time", 1, "s", 2)]))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "data.json").write_text("[]")
    words = ["--data", str(tmp_path / "data.json"), "--model", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["startup", "growth", *words]) == 1
    printed = capsys.readouterr()
    assert "a peer ended with 1" in printed.err and "not measured: startup" in printed.err
    assert "## growth" in printed.out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["questions"]) == ["growth"] and results["machine"]["threads"] == 2
    assert (tmp_path / "out" / "ratios.png").exists() and "| met |" in (tmp_path / "out" / "results.md").read_text()


def test_repeated_rows_differ(tmp_path):
    given = {"instruction": "Add one to two.", "input": "", "output": "three"}
    (tmp_path / "data.json").write_text(json.dumps([given]))
    write_alpaca(tmp_path / "data.json", tmp_path / "rows.json", 6)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows[0] == given
    assert rows[1] == {"instruction": "one to two. Add (1)", "input": "", "output": "three (1)"}
    assert rows[5]["instruction"] == "one to two. Add (5)"


def test_our_start_up_is_measured(tmp_path):
    msft = [sys.executable, "-m", "msft"]
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("runner_confg: {epochs: 1}\n")
    runs = {
        startup.HELP: [run([*msft, "--help"], interval=startup.INTERVAL)],
        startup.ERROR: [run([*msft, "train", recipe], interval=startup.INTERVAL, expect=2)],
    }
    assert "runner_config" in runs[startup.ERROR][0].err
    figures = startup.figures_of(runs)
    assert all(0 < figure.value < 60 and 2 * MEGA < figure.peak < 300 * MEGA for figure in figures.values())
    assert [verdict.unit for verdict in startup.verdicts(figures)] == ["s", "MB", "s"]
