"""`msft parity` through the command line: both engines, model folders, golden folders, one ulp, and wrong words."""

import json

import pytest

from msft.cli.main import main as msft
from tests.conftest import write_rows

BARS = ("BIT-EQUAL", "WITHIN fp32")


def parity(*words):
    return msft(["parity", *map(str, words)])


def report(output):
    return json.loads((output / "parity.json").read_text())


@pytest.fixture
def recipe(write_recipe):
    """LoRA with dropout, two micro-batches a step, warm-up from 0."""
    return write_recipe(
        model__pet_config__lora_dropout=0.05,
        runner_config__gradient_accumulation_steps=2,
        lr_schedule={"type": "cosine", "learning_rate": 0.003, "warmup_ratio": 0.2},
    )


def test_both_engines_from_one_recipe(recipe, tmp_path, capsys):
    assert parity(recipe, "--steps", 6) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "torch against mindspore" and lines[-1] == "parity: torch and mindspore are the same run"
    stages = [line.split()[0] for line in lines[2:11]]
    assert stages == "recipe data weights forward loss backward step trajectory generation".split()
    found = report(tmp_path / "output" / "parity")
    assert found["passed"] and found["steps"] == 6 and found["labels"] == ["torch", "mindspore"]
    assert all(stage["verdict"] in BARS for stage in found["stages"].values())
    rows = {row["name"]: row for row in found["stages"]["forward"]["rows"]}
    assert {"model.embed_tokens", "model.layers.1", "model.norm", "lm_head", "model.layers.0 (adapter off)"} <= set(
        rows
    )
    assert {"max_abs", "mean_abs", "cosine", "share_within_1e-3"} <= set(rows["model.layers.1"])
    # The adapters take part, or a wrong one would not show.
    on, off = rows["model.layers.1"], rows["model.layers.1 (adapter off)"]
    assert abs(on["norms"][0] - off["norms"][0]) > 1e-3
    assert found["stages"]["trajectory"]["summary"]["loss"]["max"] < 1e-5
    assert "supervised: '" in found["stages"]["data"]["notes"]["torch"]["sample"]
    assert (tmp_path / "output" / "parity" / "parity.png").read_bytes()[:4] == b"\x89PNG"


def test_a_recipe_of_several_processes(write_recipe, tmp_path):
    recipe = write_recipe(use_parallel=True, parallel_config={"data_parallel": 4, "model_parallel": 2})
    golden = tmp_path / "golden"
    assert parity(recipe, "--engines", "torch", "--steps", 1, "--export-golden", golden) == 0
    assert golden.is_dir()


def test_one_engine_against_itself_is_bit_equal(recipe, tmp_path):
    assert parity(recipe, "--engines", "torch,torch", "--steps", 2) == 0
    found = report(tmp_path / "output" / "parity")
    assert found["labels"] == ["torch", "torch again"]
    assert {stage["verdict"] for stage in found["stages"].values()} == {"BIT-EQUAL"}


def test_one_ulp_shows_the_natural_drift(recipe, tmp_path, capsys):
    assert parity("--perturb", "--steps", 4, recipe) == 0
    captured = capsys.readouterr()
    assert "model.layers.0.self_attn.q_proj.weight[0, 0], the next float32 away from 0" in captured.err
    assert "natural drift of one ulp" in captured.out and "FAILED" not in captured.out
    stages = report(tmp_path / "output" / "parity")["stages"]
    changed = [row["name"] for row in stages["weights"]["rows"] if row["verdict"] != "BIT-EQUAL"]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]
    assert stages["forward"]["verdict"] == "WITHIN fp32" and len(stages) == 9


def test_recorded_on_one_machine_and_compared_on_another(recipe, tmp_path, tiny_data, capsys):
    golden = tmp_path / "golden"
    assert parity(recipe, "--engines", "torch", "--steps", 3, "--export-golden", golden) == 0
    assert f"written: {golden}" in capsys.readouterr().out
    # Recipe, data and model may lie elsewhere on the other machine.
    moved = tmp_path / "elsewhere.mindrecord"
    for suffix in ("", ".db"):
        moved.with_name(moved.name + suffix).write_bytes(
            tiny_data[0].with_name(tiny_data[0].name + suffix).read_bytes()
        )
    words = ["--engines", "torch", "--train_dataset_dir", moved, "--against", golden]
    assert parity(recipe, *words) == 0
    assert "parity: torch (recorded) and torch are the same run" in capsys.readouterr().out
    # The same engine on other data stops at the data, or goes on when it is asked to.
    assert parity(recipe, "--engines", "torch", "--against", golden, "--seed", 4) == 1
    assert "parity: FAILED at recipe: seed" in capsys.readouterr().out
    assert parity(recipe, "--engines", "torch", "--against", golden, "--steps", 5) == 2
    assert "was recorded with 3 steps, not 5" in capsys.readouterr().err


def test_bfloat16_is_told_from_float32(recipe, tmp_path, capsys):
    golden = tmp_path / "golden"
    assert parity(recipe, "--engines", "torch", "--steps", 2, "--export-golden", golden) == 0
    words = [
        "--engines",
        "torch",
        "--against",
        golden,
        "--model.compute_dtype",
        "bfloat16",
        "--model.param_init_type",
        "float32",
    ]
    assert parity(recipe, *words, "--all") == 1
    stages = report(tmp_path / "output" / "parity")["stages"]
    assert len(stages) == 9 and stages["recipe"]["first_difference"] == "model.compute_dtype"
    differing = [row["name"] for row in stages["recipe"]["rows"] if row["verdict"] != "BIT-EQUAL"]
    assert "dtype of compute" in differing
    assert stages["data"]["verdict"] == "BIT-EQUAL"
    rows = {row["name"]: row for row in stages["forward"]["rows"]}
    assert stages["forward"]["bar"] == rows["model.layers.0 (adapter off)"]["verdict"] == "WITHIN bf16"


def test_a_model_folder_is_recorded_and_compared(tiny_model, tmp_path, capsys):
    words = ["--model", tiny_model, "--random_data", "--steps", 2, "--device", "cpu", "--engines", "torch"]
    assert parity(*words, "--output_dir", tmp_path / "first", "--export-golden", tmp_path / "golden") == 0
    assert parity(*words, "--output_dir", tmp_path / "second", "--against", tmp_path / "golden") == 0
    assert capsys.readouterr().out.count("torch (recorded) and torch are the same run") == 2


def test_what_is_changed_in_a_recipe_is_said(recipe, capsys):
    words = ["--engines", "torch,torch", "--steps", 2, "--run_mode", "eval", "--resume_training", "True"]
    assert parity(recipe, *words) == 0
    said = capsys.readouterr().err
    assert "run_mode eval is taken as finetune" in said and "resume_training and do_eval are off" in said


def test_the_run_stops_at_the_first_failure(recipe, tmp_path, capsys):
    golden = tmp_path / "golden"
    assert parity(recipe, "--engines", "torch", "--steps", 2, "--export-golden", golden) == 0
    rows = [{"input_ids": [5] * 25, "labels": [5] * 25}] * 48
    other = write_rows(tmp_path / "other.mindrecord", rows)
    assert parity(recipe, "--engines", "torch", "--against", golden, "--train_dataset_dir", other) == 1
    stages = report(tmp_path / "output" / "parity")["stages"]
    assert list(stages) == ["recipe", "data"]
    assert stages["data"]["first_difference"] == "step 1: input_ids"
    assert "not run: weights, forward" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,message",
    [
        (["--engines", "torch,mindspor"], "unknown engine 'mindspor', did you mean 'mindspore'?"),
        (["--engines", "torch"], "--engines: two are compared"),
        (["--engines", "torch,mindspore", "--perturb"], "--perturb runs one engine: --engines torch"),
        (["--export-golden", "a", "--against", "b"], "do not go together"),
        (["--steps", "0"], "--steps is 0, it must be 1 or more"),
        (["--steps", "100"], "--steps: the recipe has 12 steps, not 100 (add --epochs 17)"),
        (["--lora_rank", "4"], "--lora_rank"),
        (["--against", "nowhere"], "--against: nowhere/manifest.json is missing"),
        (["--random_data"], "--model and --random_data go together"),
        (["--output_dir", "FILE"], "FILE is a file"),
        (["--engines", "torch", "--export-golden", "FILE"], "FILE exists: name a new folder"),
    ],
)
def test_wrong_words(recipe, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    assert parity(recipe, *words) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_or_a_model(tmp_path, capsys):
    assert parity("--steps", 2) == 2
    assert "name a recipe, or a model with --model HF_DIR --random_data" in capsys.readouterr().err
    assert parity("--model", tmp_path, "--random_data") == 2
    assert "config.json" in capsys.readouterr().err
