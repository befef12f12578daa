"""One recipe on both engines: equal losses, each loads the other's adapter, a run changes engines half-way.

MindSpore compiles for seconds, so its runs are few and shared.
"""

import json

import numpy as np
import pytest

from msft.cli.train import main

pytest.importorskip("torch")
pytest.importorskip("mindspore")

ENGINES = ("torch", "mindspore")
STEPS = 8
SAVING = [{"type": "CheckpointMonitor", "save_checkpoint_steps": 4}]


def losses(output):
    lines = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def adapter(output):
    from safetensors.numpy import load_file

    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def recipe(write_recipe, tmp_path):
    """A function that runs the LoRA recipe (dropout, accumulation, cosine) on an engine and gives its output folder."""

    def run(backend, name, *words):
        path = write_recipe(
            backend,
            callbacks=SAVING,
            model__pet_config__lora_dropout=0.1,
            lr_schedule={"type": "CosineWithWarmUpLR", "warmup_ratio": 0.25},
            runner_config={"epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 6},
            optimizer__learning_rate=0.01,
        )
        assert main([str(path), "--output_dir", str(tmp_path / name), *words]) == 0
        return tmp_path / name

    return run


def test_both_engines_train_alike_and_take_over_from_each_other(recipe, tmp_path, tiny_data, capsys):
    torch = recipe("torch", "torch")
    mindspore = recipe("mindspore", "mindspore")
    assert len(losses(torch)) == STEPS and losses(torch)[-1] < losses(torch)[0]
    np.testing.assert_allclose(losses(mindspore), losses(torch), rtol=1e-5)
    ours, theirs = adapter(mindspore), adapter(torch)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)

    # The last four steps again, each from the other engine's checkpoint of step 4.
    for first, second in ((torch, "mindspore"), (mindspore, "torch")):
        crossed = recipe(second, f"to_{second}", "--resume_training", str(first / "checkpoints" / "step-4"))
        np.testing.assert_allclose(losses(crossed), losses(torch)[4:], rtol=1e-5)

    # Each evaluates the other's adapter to the same loss.
    values = []
    for first, second in ((torch, "mindspore"), (mindspore, "torch")):
        words = ["--run_mode", "eval", "--eval_dataset_dir", str(tiny_data[1])]
        output = recipe(second, f"eval_{second}", *words, "--load_checkpoint", str(first / "adapter"))
        values.append(json.loads((output / "eval_summary.json").read_text())["loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_mindspore_refuses_half_precision_on_cpu(write_recipe, capsys):
    assert main([str(write_recipe("mindspore")), "--model.compute_dtype", "bfloat16"]) == 2
    assert "no bfloat16 matrix product on CPU" in capsys.readouterr().err
