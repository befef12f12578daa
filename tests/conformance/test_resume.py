"""Resuming: bit for bit on the same engine from any step, and within 1e-5 on the other one."""

import json
from functools import cache

import numpy as np
import pytest
from safetensors.numpy import load_file

from msft.cli.train import main
from tests.conftest import recipe_writer

pytest.importorskip("torch")
pytest.importorskip("mindspore")

SAVING = [{"type": "CheckpointMonitor", "save_checkpoint_steps": 1, "keep_checkpoint_max": 50}]
LORA = {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1}
slow = pytest.mark.slow


def losses(output):
    lines = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def tensors(checkpoint, tuned):
    weights = "adapter_model.safetensors" if tuned == "lora" else "model.safetensors"
    return load_file(checkpoint / weights) | load_file(checkpoint / "optimizer.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, tiny_data):
    """A function that runs a recipe with everything that a resumed run could get wrong, and gives its output folder.

    Warm-up, a falling rate, weight decay, clipping, dropout (LoRA), accumulation, rows of different lengths, shuffled.
    """
    folder = tmp_path_factory.mktemp("resume")
    write_recipe = recipe_writer(folder, tiny_model, tiny_data)

    def start(tuned, output, *words):
        rate = 0.01 if tuned == "lora" else 0.001
        path = write_recipe(
            callbacks=SAVING,
            model__pet_config=LORA if tuned == "lora" else None,
            lr_schedule={"type": "CosineWithWarmUpLR", "warmup_steps": 3},
            optimizer={"type": "AdamW", "learning_rate": rate, "weight_decay": 0.1},
            runner_config={"epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2},
            runner_wrapper={"use_clip_grad": True, "max_grad_norm": 0.8},
            train_dataset__padding="bucket",
            train_dataset__bucket_size=8,
        )
        assert main([str(path), "--output_dir", str(folder / output), *words]) == 0
        return folder / output

    return start


@pytest.fixture(scope="module")
def whole(run):
    """A function that gives the output folder of an engine's run of 30 steps that was not stopped, made once."""

    @cache
    def of(backend, tuned):
        return run(tuned, f"{backend}-{tuned}", "--backend", backend, "--runner_config.stop_step", "30")

    return of


# 12 steps an epoch: in the warm-up, in the middle and at the end of the first epoch, and in the second.
@pytest.mark.parametrize(
    ("backend", "tuned", "stops"),
    [
        ("torch", "lora", (1, 7, 12, 13)),
        ("torch", "full", (2, 12, 14)),
        ("mindspore", "lora", (7,)),
        ("mindspore", "full", (13,)),
        pytest.param("mindspore", "lora", (1, 12, 13), marks=slow),
        pytest.param("mindspore", "full", (2, 7, 12), marks=slow),
    ],
)
def test_a_run_stopped_at_any_step_equals_the_one_that_was_not(backend, tuned, stops, run, whole):
    engine, last = ("--backend", backend), ("--runner_config.stop_step", "15")
    expected = tensors(whole(backend, tuned) / "checkpoints" / "step-15", tuned)
    steps = losses(whole(backend, tuned))[:15]
    assert len(steps) == 15 and steps[-1] < steps[0]
    for stop in stops:
        output = f"{backend}-{tuned}-stop-{stop}"
        run(tuned, output, *engine, "--runner_config.stop_step", str(stop))
        resumed = run(tuned, output, *engine, *last, "--resume_training", "True")
        assert losses(resumed) == steps
        found = tensors(resumed / "checkpoints" / "step-15", tuned)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(array, expected[name]) for name, array in found.items())


@pytest.mark.parametrize("tuned", ["lora", "full"])
def test_torch_mindspore_and_torch_again_are_one_run(tuned, run, whole):
    for steps, backend in ((10, "torch"), (20, "mindspore"), (30, "torch")):
        words = ("--backend", backend, "--runner_config.stop_step", str(steps), "--resume_training", "True")
        crossed = run(tuned, f"crossed-{tuned}", *words)
    assert len(losses(crossed)) == 30
    for alone in (whole("torch", tuned), whole("mindspore", tuned)):
        # Absolute where the loss is above 1, relative below.
        allowed = 1e-5 * np.minimum(1, losses(alone))
        assert (np.abs(np.subtract(losses(crossed), losses(alone))) < allowed).all()
        expected = tensors(alone / "checkpoints" / "step-30", tuned)
        for name, array in tensors(crossed / "checkpoints" / "step-30", tuned).items():
            distance, size = np.linalg.norm(array - expected[name]), np.linalg.norm(expected[name])
            assert distance <= 1e-3 * size, name
