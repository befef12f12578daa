"""`msft train` stops, saves and goes on: resuming exactly, what is refused, what a checkpoint holds and serves for."""

import errno
import json
import os
import time

import numpy as np
import pytest

from msft.cli.train import main
from tests.cli.runs import SAVING, losses, records
from tests.conftest import counting_rows, write_rows

pytest.importorskip("torch")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.mark.parametrize("tuned", ["lora", "full"])
def test_a_stopped_run_resumes_exactly(write_recipe, output, tmp_path, tuned):
    full = {"model__pet_config": None, "optimizer__learning_rate": 0.003} if tuned == "full" else {}
    dropout = {} if full else {"model__pet_config__lora_dropout": 0.1}
    schedule = {"lr_schedule": {"type": "cosine", "warmup_ratio": 0.2}, "runner_config__gradient_accumulation_steps": 2}
    recipe = str(write_recipe(callbacks=[SAVING], **full, **dropout, **schedule))
    whole = tmp_path / "whole"
    assert main([recipe, "--output_dir", str(whole)]) == 0
    # It stops after step 9, in the second epoch, and goes on from its last checkpoint.
    assert main([recipe, "--runner_config.stop_step", "9"]) == 0
    assert (output / "checkpoints" / "step-9").is_dir()
    (output / "checkpoints" / "step-9" / "optimizer.safetensors").unlink()
    assert main([recipe, "--resume_training", "True"]) == 0
    assert len(losses(output)) == 12 and losses(output) == losses(whole)
    name = "model/model.safetensors" if full else "adapter/adapter_model.safetensors"
    assert (output / name).read_bytes() == (whole / name).read_bytes()
    # Nothing of the first attempt is lost, and nothing of it is in the way.
    assert (output / "earlier" / "run-1" / name).is_file()
    assert (output / "earlier" / "run-1" / "checkpoints" / "step-9").is_dir()
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-12", "step-8"]


def test_resuming_a_finished_run_only_writes_its_results_again(write_recipe, output, capsys):
    recipe = str(write_recipe(callbacks=[SAVING]))
    assert main([recipe, "--epochs", "1"]) == 0
    before = (output / "adapter" / "adapter_model.safetensors").read_bytes(), losses(output)
    assert main([recipe, "--epochs", "1", "--resume_training", "True"]) == 0
    assert "all 12 steps are done already" in capsys.readouterr().err
    assert ((output / "adapter" / "adapter_model.safetensors").read_bytes(), losses(output)) == before
    # More epochs go on from there.
    assert main([recipe, "--resume_training", "True"]) == 0
    assert "was made for 12 steps, this run has 24" in capsys.readouterr().err
    assert len(losses(output)) == 24 and losses(output)[:12] == before[1]


def test_an_interrupted_run_leaves_nothing_half_and_resumes(write_recipe, output, tmp_path, monkeypatch, capsys):
    from msft.train import manifest
    from msft.train.reporter import Reporter

    recipe = str(write_recipe(callbacks=[SAVING]))
    assert main([recipe, "--output_dir", str(tmp_path / "whole")]) == 0
    original = Reporter.step

    def interrupted(self, record):
        original(self, record)
        if record.step == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "step", interrupted)
    assert main([recipe]) == 130
    assert "--resume_training True goes on after step 8" in capsys.readouterr().err
    monkeypatch.undo()
    checkpoints = sorted((output / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-4", "step-8"]
    assert not any(manifest.problems(path) for path in checkpoints)
    assert main([recipe, "--resume_training", "True"]) == 0
    assert losses(output) == losses(tmp_path / "whole")
    assert [record["step"] for record in records(output)] == list(range(1, 25))


def test_lora_with_freed_base_parameters(write_recipe, output, tmp_path):
    recipe = str(write_recipe(callbacks=[SAVING], model__pet_config__freeze_exclude=["*norm*"]))
    assert main([recipe, "--output_dir", str(tmp_path / "whole")]) == 0
    assert main([recipe, "--runner_config.stop_step", "8"]) == 0
    assert main([recipe, "--resume_training", "True"]) == 0
    assert losses(output) == losses(tmp_path / "whole")
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(output / "model")
    load_file = pytest.importorskip("safetensors.numpy").load_file
    assert not np.array_equal(load_file(output / "model" / "model.safetensors")["model.norm.weight"], np.ones(32))


def test_a_new_run_sets_the_earlier_one_aside(write_recipe, output, capsys):
    recipe = str(write_recipe(callbacks=[SAVING]))
    assert main([recipe, "--runner_config.stop_step", "2"]) == 0
    first = losses(output)
    assert main([recipe, "--runner_config.stop_step", "3", "--seed", "8"]) == 0
    assert "earlier results were moved" in capsys.readouterr().err
    assert losses(output / "earlier" / "run-1") == first
    assert len(losses(output)) == 3 and (output / "checkpoints" / "step-3").is_dir()
    assert not (output / "checkpoints" / "step-2").exists()
    # What would be moved away cannot be an input.
    for given in (output / "adapter", output):
        assert main([recipe, "--load_checkpoint", str(given)]) == 2
        assert "choose another output_dir" in capsys.readouterr().err
    assert (output / "checkpoints" / "step-3").is_dir()


def test_resuming_with_other_data_or_batches_is_refused(write_recipe, output, tmp_path, capsys):
    recipe = str(write_recipe(callbacks=[SAVING]))
    assert main([recipe, "--runner_config.stop_step", "4"]) == 0
    other = write_rows(tmp_path / "other.mindrecord", counting_rows(48, seed=9))
    assert main([recipe, "--resume_training", "True", "--train_dataset_dir", str(other), "--batch_size", "2"]) == 2
    error = capsys.readouterr().err
    assert "trained on other data" in error and "has 4 rows a step, this run 2" in error
    # The same rows a step in other micro-batches are fine.
    words = ["--resume_training", "True", "--batch_size", "2", "--gradient_accumulation_steps", "2"]
    assert main([recipe, *words, "--runner_config.stop_step", "5"]) == 0
    assert len(losses(output)) == 5


def test_another_schedule_is_reported_another_order_of_rows_refused(write_recipe, output, capsys):
    recipe = str(write_recipe(callbacks=[SAVING]))
    assert main([recipe, "--runner_config.stop_step", "4"]) == 0
    resume = [recipe, "--resume_training", "True", "--runner_config.stop_step", "5"]
    loader = "--train_dataset.data_loader"
    for words, different in (
        ([f"{loader}.shuffle", "False"], "shuffle was True, here it is False"),
        ([f"{loader}.num_samples", "40"], "rows was 48, here it is 40, steps_per_epoch was 12, here it is 10"),
    ):
        assert main([*resume, *words]) == 2
        assert f"step-4: {different}: the rows of a step would differ" in capsys.readouterr().err
    assert main([*resume, "--optimizer.learning_rate", "0.01", "--lr_schedule.warmup_steps", "2"]) == 0
    told = "was trained with another schedule: peak was 0.02, here it is 0.01, warmup_steps was 0, here it is 2; this"
    assert told in capsys.readouterr().err


def test_a_checkpoint_says_where_the_run_stands(write_recipe, output):
    recipe = write_recipe(callbacks=[SAVING], lr_schedule={"type": "cosine", "warmup_ratio": 0.25, "lr_end": 0.001})
    assert main([str(recipe), "--runner_config.stop_step", "16"]) == 0
    state = json.loads((output / "checkpoints" / "step-16" / "trainer_state.json").read_text())
    assert state["schedule"] == {
        "kind": "cosine",
        "peak": 0.02,
        "total_steps": 24,
        "warmup_steps": 6,
        "warmup_start": 0.0,
        "lr_end": 0.001,
        "num_cycles": 0.5,
    }
    # 48 rows, 4 a step: 12 steps an epoch.
    order = {"rows": 48, "steps_per_epoch": 12, "shuffle": True, "packing": False, "length_grouping": False}
    assert state["order"] == order
    assert state["position"] == {"epoch": 1, "step_in_epoch": 4, "rows_taken": 64}
    assert state["random"] == {"seed": 3, "dropout_step": 16, "epoch": 1}
    assert state["versions"]["torch"] and state["world"] == 1


def test_a_checkpoint_serves_as_load_checkpoint(write_recipe, output, tiny_data, tmp_path):
    recipe = str(write_recipe(callbacks=[SAVING]))
    words = ["--do_eval", "True", "--eval_dataset_dir", str(tiny_data[1])]
    assert main([recipe, *words]) == 0
    trained = records(output)[-1]["eval_loss"]
    for place in (output / "checkpoints" / "step-24", output / "adapter"):
        words = ["--run_mode", "eval", *words[2:], "--load_checkpoint", str(place)]
        assert main([recipe, *words, "--output_dir", str(tmp_path / "evaluation")]) == 0
        value = json.loads((tmp_path / "evaluation" / "eval_summary.json").read_text())["loss"]
        assert value == pytest.approx(trained, rel=1e-6)
    # Training goes on from the adapter: the first loss is where the first run ended, not where it began.
    words = ["--load_checkpoint", str(output / "adapter"), "--output_dir", str(tmp_path / "more"), "--epochs", "1"]
    assert main([recipe, *words]) == 0
    assert np.mean(losses(tmp_path / "more")) < np.mean(losses(output)[:12])


@pytest.mark.parametrize("background", [True, False])
def test_steps_go_on_while_a_checkpoint_is_written(write_recipe, output, monkeypatch, background):
    from msft.train import checkpoint

    began, write = {}, checkpoint.write

    def slow(path, *rest):
        began[path.name] = len(losses(output))
        if path.name == "step-4":
            # Until step 6 is done, which it never is when steps wait.
            deadline = time.monotonic() + (30 if background else 1)
            while len(losses(output)) < 6 and time.monotonic() < deadline:
                time.sleep(0.01)
            began["end of step-4"] = len(losses(output))
        write(path, *rest)

    monkeypatch.setattr(checkpoint, "write", slow)
    recipe = str(write_recipe(callbacks=[{**SAVING, "async_save": background}]))
    assert main([recipe, "--runner_config.stop_step", "8"]) == 0
    # Step 8's checkpoint waits for it.
    assert began["end of step-4"] in ((6, 7, 8) if background else (4,))
    monkeypatch.undo()
    # What was written is the state of step 4, not of the steps that went on.
    assert main([recipe, "--output_dir", str(output.parent / "short"), "--runner_config.stop_step", "4"]) == 0
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        written = (folder / "checkpoints" / "step-4" / name for folder in (output, output.parent / "short"))
        assert len({file.read_bytes() for file in written}) == 1


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_harms_no_other(write_recipe, output, monkeypatch, capsys):
    from msft.train import checkpoint, manifest

    write = checkpoint._write_moments

    def full(path, state):
        if "step-8" in path.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, state)

    monkeypatch.setattr(checkpoint, "_write_moments", full)
    assert main([str(write_recipe(callbacks=[SAVING]))]) == 1
    assert f"{output / 'checkpoints' / 'step-8'}: cannot be written: No space left on device" in capsys.readouterr().err
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-4"]
    assert manifest.problems(output / "checkpoints" / "step-4") == []
    # It came up at the next save at the latest.
    assert 8 <= len(losses(output)) <= 12
