"""Rows of JSON become one MindRecord below output_dir, once, whoever asks; what does not fit names the recipe."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from msft.config.load import load_recipe
from msft.data.columns import Columns
from msft.data.mindrecord import open_mindrecord
from msft.data.preprocess import preprocess
from msft.data.rows import Source
from msft.errors import InputError
from msft.train import raw_data

ROWS = [{"instruction": f"w{number}", "output": f"w{number + 1} w{number + 2}"} for number in range(3, 23)]


@pytest.fixture
def recipe(tmp_path, write_recipe):
    """A function that loads a recipe with these raw keys beside its files."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))

    def load(**raw):
        found = {
            "files": [{"path": str(tmp_path / "rows.json")}],
            "template": "llama_factory:default",
            "max_length": 20,
        }
        return load_recipe(write_recipe(train_dataset={"data_loader": {"raw": {**found, **raw}}}))

    return load


def test_several_processes_at_once_make_one_file(recipe, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(raw_data, "preprocess", lambda options: calls.append(preprocess(options)))
    loaded = recipe()
    with ThreadPoolExecutor(4) as pool:
        made = [*pool.map(lambda _: raw_data.made(loaded, ["train_dataset"]), range(4))]
    assert sum(report is not None for report in calls) == 1 and len(calls) == 4
    loader = made[0].train_dataset.data_loader
    assert loader.raw is None and loader.dataset_dir == str(tmp_path / "output" / "data" / "train_dataset.mindrecord")
    data = open_mindrecord(loader.dataset_dir)
    assert len(data) == len(ROWS) and len(data.row(0)["input_ids"]) == 20


def test_blocks_that_a_run_does_not_open_are_left_alone(recipe, tmp_path):
    loaded = recipe()
    assert raw_data.made(loaded, ["eval_dataset"]) is loaded and not (tmp_path / "output").exists()


def test_columns_leave_out_what_they_do_not_name_and_folders_stand_for_their_files(recipe, tmp_path):
    (tmp_path / "more" / "inner").mkdir(parents=True)
    for name in ("b.jsonl", "a.json", "inner/c.jsonl", "no.txt"):
        (tmp_path / "more" / name).write_text("[]")
    files = [
        {"path": str(tmp_path / "more")},
        {"path": "x", "formatting": "alpaca", "columns": {"prompt": "q"}, "num_samples": 2},
        {"path": "y", "formatting": "sharegpt", "tags": {"role_tag": "role"}},
    ]
    *inside, alpaca, chats = raw_data.sources(recipe(files=files).train_dataset.data_loader.raw)
    assert inside == [Source(str(tmp_path / "more" / name)) for name in ("a.json", "b.jsonl", "inner/c.jsonl")]
    assert alpaca == Source("x", Columns(prompt="q", query=None, response=None), 2)
    tags = dict.fromkeys(("content_tag", "user_tag", "assistant_tag", "system_tag"))
    assert chats == Source("y", Columns(is_turns=True, role_tag="role", **tags))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"template": "llama_factory:lama3"},
            "data_loader.raw.template: 'llama_factory:lama3' is unknown, did you mean",
        ),
        ({"template": "chat"}, "data_loader.raw.template chat: the tokenizer has no chat template"),
        ({"files": [{"path": "empty"}]}, "data_loader.raw.files: empty holds no .json or .jsonl file"),
        ({"max_length": 2, "template": "llama_factory:default"}, "rows.json: no row is left to write"),
    ],
)
def test_what_does_not_fit_names_the_recipe_and_its_line(recipe, tmp_path, monkeypatch, raw, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(InputError) as refusal:
        raw_data.made(recipe(**raw), ["train_dataset"])
    (problem,) = refusal.value.problems
    assert "recipe.yaml:" in problem and message in problem
