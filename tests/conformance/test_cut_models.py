"""Protects tensor parallelism: a model that is cut over two or four processes trains as the whole one, on both engines.

Biases, all kinds of linear module, dropout, accumulation, clipping, decay; ranks take over what one process wrote.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conformance import cut_models
from tests.launch.jobs import ROOT, alone, environment

PROGRAM = Path(__file__).with_name("cut_model_program.py")
SCRIPT = ROOT / "scripts" / "msrun" / "msrun_launcher.sh"


def shared_out(backend, kind, tensor, workers, recipe, folder, settings=None):
    """Results of the program's steps, and of the one that goes on from what one process wrote."""
    variables = environment(PYTHON=sys.executable, BACKEND=backend, KIND=kind, TENSOR=str(tensor))
    variables["SETTINGS"] = json.dumps(settings or {})
    words = ["bash", str(SCRIPT), f"{PROGRAM} --config {recipe}", str(workers)]
    with alone():
        done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return np.load(folder / "result.npz"), np.load(folder / "again.npy")


@pytest.mark.parametrize(
    ("backend", "kind", "tensor", "workers"),
    [
        ("torch", "full", 2, 4),
        ("mindspore", "full", 2, 2),
        pytest.param("mindspore", "lora", 2, 4, marks=pytest.mark.slow),
        pytest.param("torch", "lora", 2, 4, marks=pytest.mark.slow),
        pytest.param("torch", "lora", 4, 4, marks=pytest.mark.slow),
        pytest.param("torch", "full", 4, 4, marks=pytest.mark.slow),
        pytest.param("mindspore", "full", 2, 4, marks=pytest.mark.slow),
        pytest.param("mindspore", "lora", 4, 4, marks=pytest.mark.slow),
        pytest.param("mindspore", "full", 4, 4, marks=pytest.mark.slow),
    ],
)
def test_a_cut_model_trains_as_the_whole_one(backend, kind, tensor, workers, write_recipe, tmp_path):
    check_equal_to_one_process(backend, kind, tensor, workers, write_recipe(backend), tmp_path)


def check_equal_to_one_process(backend, kind, tensor, workers, recipe, folder, settings=None):
    whole = cut_models.engine(backend, kind, max_grad_norm=(settings or {}).get("max_grad_norm", 1.0))
    shown = (settings or {}).get("strategy") != "deepspeed"
    expected = cut_models.measure(whole, lambda batch: batch, gradients=shown)
    again = whole.train_step(cut_models.micro_batches(9), cut_models.RATE)
    np.savez(folder / "start.npz", **expected)
    found, found_again = shared_out(backend, kind, tensor, workers, recipe, folder, settings)
    assert set(found) == set(expected)
    assert np.abs(found["losses"] - expected["losses"]).max() < 1e-5
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=2e-4, rtol=1e-4)
    np.testing.assert_array_equal(found["counters"], expected["counters"])
    for name in expected:
        if name.startswith("gradients "):
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(found[name], expected[name], atol=max(scale * 1e-5, 1e-7), err_msg=name)
        elif name.startswith("first "):
            # Clipping shows here alone: what AdamW does with gradients knows no scale.
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(found[name], expected[name], atol=max(scale * 1e-2, 1e-7), err_msg=name)
        elif name.startswith(("weights ", "second ")):
            # AdamW makes a step of any gradient, be it rounding alone.
            np.testing.assert_allclose(found[name], expected[name], atol=2e-4, err_msg=name)
    assert found_again == pytest.approx([again.loss, again.grad_norm], abs=1e-5)


def train(words, folder, workers=1):
    command = ["run_finetune.py", *words]
    if workers > 1:
        command = ["bash", str(SCRIPT), " ".join(command), str(workers)]
    else:
        command = [sys.executable, str(ROOT / command[0]), *words]
    with alone():
        return subprocess.run(
            command, cwd=folder, env=environment(PYTHON=sys.executable), capture_output=True, text=True
        )


@pytest.mark.parametrize("backend", ["torch", pytest.param("mindspore", marks=pytest.mark.slow)])
def test_a_run_on_cut_models_is_gone_on_with_by_one_process(backend, write_recipe, tmp_path):
    """Two models, each cut in two; the whole model reads their checkpoint, and the log is that of one process."""
    recipe = write_recipe(
        backend,
        train_dataset__padding="longest",
        callbacks=[{"type": "CheckpointMonitor", "save_checkpoint_steps": 3}],
        runner_config={"epochs": 1, "stop_step": 6},
    )
    common = ["--config", str(recipe)]
    done = train([*common, "--batch_size", "4", "--output_dir", "one"], tmp_path)
    assert done.returncode == 0, done.stderr
    cut_words = ["--batch_size", "2", "--parallel_config.model_parallel", "2", "--runner_config.stop_step", "3"]
    done = train([*common, *cut_words, "--output_dir", "two"], tmp_path, workers=4)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "processes: 4, 2 shares of every batch, each for a model that is cut over 2" in done.stdout + done.stderr
    done = train([*common, "--batch_size", "4", "--output_dir", "two", "--resume_training", "True"], tmp_path)
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / name / "trainer_log.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = ([json.loads(line) for line in log] for log in logs)
    assert [record["step"] for record in two] == [1, 2, 3, 4, 5, 6]
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=1e-5)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], abs=1e-5)
        assert (right["tokens"], right["supervised"]) == (left["tokens"], left["supervised"])


def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(write_recipe, tmp_path):
    recipe = write_recipe("torch")
    words = ["--config", str(recipe), "--parallel_config.model_parallel", "3"]
    done = train(words, tmp_path, workers=3)
    assert done.returncode == 2
    assert "--parallel_config.model_parallel: parallel_config.model_parallel: 3 does not divide" in done.stderr
    assert "data_parallel 3, model_parallel 1 works for 3" in done.stderr
    assert not (tmp_path / "output").exists()
