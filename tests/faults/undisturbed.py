"""The run that fault tests disturb: its recipe, and what must be equal at its end whatever happened on the way."""

import json

SAVING = {"type": "CheckpointMonitor", "save_checkpoint_steps": 2, "keep_checkpoint_max": 2, "integrated_save": True}
STEPS = 8


def recipe_of(write_recipe, tuned, backend):
    """Write the recipe with the fixture `write_recipe`; `tuned` is lora or full. Returns its path."""
    full = {"model__pet_config": None} if tuned == "full" else {"model__pet_config__lora_dropout": 0.1}
    return write_recipe(
        backend=backend,
        callbacks=[SAVING, {"type": "MFLossMonitor"}],
        runner_config={"epochs": 2, "batch_size": 6, "gradient_accumulation_steps": 2},
        lr_schedule={"type": "cosine", "learning_rate": 0.003, "warmup_ratio": 0.2},
        **full,
    )


def results(output):
    """What must be equal whatever happened: final tensors, newest checkpoint, losses, the exported CKPT."""
    newest = output / "checkpoints" / f"step-{STEPS}"
    files = [*newest.glob("*.safetensors"), *(output / "adapter").glob("*.safetensors")]
    files += [*(output / "model").glob("*.safetensors"), *(output / "checkpoint").rglob("*.ckpt")]
    log = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    losses = [(record["step"], record["loss"], record["grad_norm"]) for record in log if "loss" in record]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}, losses


def check(output, whole):
    files, losses = results(output)
    expected, expected_losses = results(whole)
    assert losses == expected_losses and [step for step, *_ in losses] == list(range(1, STEPS + 1))
    assert files.keys() == expected.keys() and len(files) >= 4
    assert [name for name in files if files[name] != expected[name]] == []
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert kept == [f"step-{STEPS - 2}", f"step-{STEPS}"]
    left = [path for path in output.rglob("*.part") if "earlier" not in path.parts]
    assert left == []
