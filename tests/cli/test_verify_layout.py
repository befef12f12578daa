"""Protects `msft verify_layout`: a layout that is the same run passes, another run does not, wrong words are told."""

import json

import pytest

from msft.cli.main import main as msft
from msft.config.load import load_recipe
from msft.parity import layout
from msft.parity.compare import Verdict, compare_facts, compare_numbers
from msft.parity.judge import NUMBER_SLACK
from tests.launch.jobs import alone


@pytest.fixture
def recipe(write_recipe):
    """LoRA with dropout, two micro-batches a step, each model cut in two."""
    return write_recipe(
        "torch",
        model__pet_config__lora_dropout=0.05,
        runner_config__gradient_accumulation_steps=2,
        parallel_config={"data_parallel": 1, "model_parallel": 2},
    )


@pytest.mark.parametrize("backend", ["torch", pytest.param("mindspore", marks=pytest.mark.slow)])
def test_a_layout_is_held_against_one_process(backend, recipe, tmp_path, capsys):
    with alone():
        words = ["--backend", backend, "--nproc_per_node", "2", "--steps", "2", "--device", "cpu"]
        assert msft(["verify_layout", str(recipe), *words, "--output_dir", str(tmp_path / "found")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"one process against 2: {backend} on cpu, ") for line in lines)
    assert lines[-1] == "layout: the same run as one process over 2 steps"
    found = json.loads((tmp_path / "found" / "verify_layout.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert found["passed"] and len(rows) == 6
    assert 0 < rows["loss of step 2"]["left"] != rows["loss of step 1"]["left"]
    assert rows["supervised tokens of step 1"]["both"] > 0
    # Two processes do not add in the order of one: equal to the last bit, they would have been the same job.
    assert any(row["error"] > 0 for row in found["rows"])


@pytest.mark.slow
@pytest.mark.parametrize(("data", "context"), [(2, 1), (1, 2)])
def test_shares_of_a_batch_are_micro_batches_of_one_process_and_parts_of_rows_are_not(recipe, tmp_path, data, context):
    words = ["--nproc_per_node", "2", "--steps", "2", "--device", "cpu", "--output_dir", str(tmp_path / "found")]
    sizes = {"data_parallel": data, "model_parallel": 1, "context_parallel": context}
    layout = [word for key, size in sizes.items() for word in (f"--parallel_config.{key}", str(size))]
    with alone():
        assert msft(["verify_layout", str(recipe), *words, *layout]) == 0


def test_another_run_fails(tmp_path, capsys):
    """A gradient norm that is 2 % off, as of a sum over ranks that is missing somewhere."""
    rows = compare_facts({"supervised tokens of step 1": 7}, {"supervised tokens of step 1": 7})
    one = {"loss of step 1": 2.0, "gradient norm of step 1": 1.0}
    rows += compare_numbers(one, one | {"gradient norm of step 1": 1.02}, NUMBER_SLACK)
    job = layout.Job("recipe.yaml", (), 2, 1, tmp_path)
    assert not layout._tell(job, rows, Verdict.FP32, "one process against 2")
    shown = capsys.readouterr().out
    assert "gradient norm      WITHIN bf16  largest error 0.02 (gradient norm of step 1), bar 0.0001" in shown
    assert shown.endswith("layout: FAILED: further apart than WITHIN fp32\n")


def test_wrong_words_are_told_before_anything_starts(recipe, capsys):
    assert load_recipe(recipe).parallel_config.model_parallel == 2
    for words, message in [
        ([], "which recipe?"),
        ([str(recipe), "--steps", "0"], "--steps is 0"),
        ([str(recipe), "--nproc_per_node", "1"], "a layout has 2 processes or more"),
        ([str(recipe), "--nproc_per_node", "3"], "works for 3"),
    ]:
        assert msft(["verify_layout", *words]) == 2
        assert message in capsys.readouterr().err
