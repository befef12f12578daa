"""`packing` and `length_grouping` through the command line: what is said, what is learned, resuming, and parity."""

import json

import numpy as np
import pytest

from msft.cli.main import main as msft
from msft.cli.train import main
from tests.conftest import write_rows

SAVING = [{"type": "CheckpointMonitor", "save_checkpoint_steps": 1, "keep_checkpoint_max": 50}]


def short_rows(count, seed):
    """Rows of 25 ids of which 4 to 16 are real, so that 24 tokens hold two or three; they count up by 3."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        size = int(generator.integers(4, 17))
        ids = 3 + (int(generator.integers(0, 120)) + 3 * np.arange(size)) % 120
        labels = np.where(np.arange(size) < size // 4, -100, ids)
        ids, labels = np.pad(ids, (0, 25 - size)), np.pad(labels, (0, 25 - size), constant_values=-100)
        rows.append({"input_ids": ids.astype(np.int32), "labels": labels.astype(np.int32)})
    return rows


@pytest.fixture
def recipe(write_recipe, tmp_path):
    """A function that writes a recipe over 40 short rows with dropout and two micro-batches a step."""
    data = write_rows(tmp_path / "short.mindrecord", short_rows(40, seed=1))

    def write(**keys):
        block = {"data_loader": {"dataset_dir": str(data)}, **keys}
        return str(
            write_recipe(
                callbacks=SAVING,
                train_dataset=block,
                model__pet_config__lora_dropout=0.1,
                runner_config={"epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2},
            )
        )

    return write


def log(output):
    """The records of a run without what a clock measured."""
    timed = ("seconds", "tokens_per_second", "eval_seconds")
    records = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_a_packed_run_resumes_in_the_middle_of_an_epoch(backend, recipe, tmp_path, capsys):
    pytest.importorskip(backend)
    words = [recipe(packing=True, drop_remainder=False), "--backend", backend]
    assert main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().err
    # 351 tokens need 15 rows of 24 at least.
    tokens = [int((row["input_ids"] != 0).sum()) - 1 for row in short_rows(40, seed=1)]
    filled = 100 * sum(tokens) / (15 * 24)
    assert f"data: 40 examples packed into 15 rows of 24 tokens, {filled:.1f} % filled, 4 rows a step, 4 steps" in said
    assert main([*words, "--runner_config.stop_step", "6"]) == 0
    assert main([*words, "--resume_training", "True"]) == 0
    whole = log(tmp_path / "whole")
    assert len(whole) == 8 and log(tmp_path / "output") == whole
    # Every token of the data in every epoch, and something is learned of them.
    assert sum(record["tokens"] for record in whole[:4]) == sum(record["tokens"] for record in whole[4:]) == sum(tokens)
    assert whole[-1]["loss"] < whole[0]["loss"]
    summary = json.loads((tmp_path / "whole" / "train_summary.json").read_text())["data"]
    assert (summary["examples"], summary["rows"], round(100 * summary["filled"], 1)) == (40, 15, round(filled, 1))


def test_length_grouping_resumes_too_and_no_other_setting_does(recipe, tmp_path, capsys):
    pytest.importorskip("torch")
    path = recipe(length_grouping=True, padding="longest")
    assert main([path, "--output_dir", str(tmp_path / "whole")]) == 0
    assert main([path, "--runner_config.stop_step", "13"]) == 0
    for words, different in (
        (["--train_dataset.length_grouping", "False"], "length_grouping was True, here it is False"),
        (["--train_dataset.length_grouping", "False", "--train_dataset.packing", "True"], "packing was False, here it"),
    ):
        assert main([path, "--resume_training", "True", *words]) == 2
        error = capsys.readouterr().err
        assert different in error and "the rows of a step would differ: give the same num_samples, shuffle" in error
    assert main([path, "--resume_training", "True"]) == 0
    assert len(log(tmp_path / "output")) == 20 and log(tmp_path / "output") == log(tmp_path / "whole")


def test_a_packed_evaluation_is_the_plain_one(recipe, tmp_path, capsys):
    pytest.importorskip("torch")
    path, found = recipe(packing=True), []
    assert main([path, "--epochs", "1"]) == 0
    words = ["--run_mode", "eval", "--load_checkpoint", str(tmp_path / "output" / "adapter"), "--output_dir"]
    for packing in ("False", "True"):
        output = tmp_path / f"evaluation-{packing}"
        assert main([path, *words, str(output), "--train_dataset.packing", packing]) == 0
        found.append(json.loads((output / "eval_summary.json").read_text()))
    assert "evaluation data: 40 examples packed into 15 rows of 24 tokens, 97.5 % filled" in capsys.readouterr().err
    assert found[1]["supervised"] == found[0]["supervised"]
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)


def test_both_engines_train_a_packed_recipe_alike(recipe, tmp_path, capsys):
    pytest.importorskip("mindspore")
    assert msft(["parity", recipe(packing=True), "--steps", "3", "--output_dir", str(tmp_path / "check")]) == 0
    assert "parity: torch and mindspore are the same run" in capsys.readouterr().out
