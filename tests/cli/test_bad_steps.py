"""Steps that go wrong, through the command line: skipped, counted, told, and never written over a good checkpoint."""

import json
import math

import pytest

from msft.cli.train import main
from msft.train import manifest

pytest.importorskip("torch")

SAVING = {"type": "CheckpointMonitor", "save_checkpoint_steps": 4}


@pytest.fixture
def disturb(monkeypatch):
    """A function that makes the losses (and with them the gradients) of some steps, from 1, so many times as large."""
    from msft.backend.torch.model import Model

    original = Model.loss_and_gradients

    def change(factors, gradients_too=True):
        def disturbed(self, batch, scale, step):
            loss, gradients = original(self, batch, scale, step)
            factor = factors.get(step + 1, 1.0)
            if gradients_too:
                gradients = {name: gradient * factor for name, gradient in gradients.items()}
            return loss * factor, gradients

        monkeypatch.setattr(Model, "loss_and_gradients", disturbed)

    return change


def summary(output):
    return json.loads((output / "train_summary.json").read_text())


def records(output):
    return [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]


def test_a_skipped_step_is_in_the_log_the_summary_and_on_the_console(write_recipe, tmp_path, disturb, capsys):
    disturb({1: math.nan, 4: math.nan})
    assert main([str(write_recipe(callbacks=[SAVING])), "--runner_config.stop_step", "12"]) == 0
    output, told = tmp_path / "output", capsys.readouterr()
    log = records(output)
    assert [record["step"] for record in log if record["skipped"]] == [1, 4]
    assert log[0]["loss"] is None and log[1]["loss"] > 0
    assert summary(output)["skipped"] == 2 and summary(output)["first_loss"] == log[1]["loss"]
    assert "warning: step 4: skipped, loss nan, gradient norm nan at loss scale 1; rows " in told.err
    assert "2 of 12 steps were skipped (loss or gradients were not finite)" in told.err
    # Step 4 was due and is the fourth: its checkpoint is the fifth step's.
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-12", "step-5", "step-8"]
    assert "step 4: the checkpoint waits" in told.err


def test_too_many_in_a_row_end_the_run_and_the_last_good_checkpoint_goes_on(write_recipe, tmp_path, disturb, capsys):
    recipe, output = str(write_recipe(callbacks=[SAVING])), tmp_path / "output"
    assert main([recipe, "--output_dir", str(tmp_path / "whole")]) == 0
    disturb({step: math.inf for step in range(7, 25)})
    assert main([recipe, "--runner_config.max_skipped_steps", "3"]) == 1
    told = capsys.readouterr().err
    assert "error: step 9: the loss is inf (gradient norm inf), rows " in told
    assert "no step of the last 3 could be taken (runner_config.max_skipped_steps)" in told
    assert "the checkpoint of step 4 is untouched" in told
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-4"]
    assert manifest.problems(output / "checkpoints" / "step-4") == []
    assert not (output / "adapter").exists()
    disturb({})
    assert main([recipe, "--resume_training", "True"]) == 0
    name = "adapter/adapter_model.safetensors"
    assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_spikes_are_told_once_and_counted_over_a_resumed_run(write_recipe, tmp_path, disturb, capsys):
    recipe = str(write_recipe(callbacks=[SAVING], optimizer__learning_rate=1e-4))
    disturb({15: 10.0, 18: 10.0}, gradients_too=False)
    assert main([recipe, "--runner_config.stop_step", "16"]) == 0
    output, told = tmp_path / "output", capsys.readouterr().err
    assert summary(output)["loss_spikes"] == [15]
    assert told.count("the loss jumped to") == 1
    assert main([recipe, "--resume_training", "True"]) == 0
    assert summary(output)["loss_spikes"] == [15, 18]
    assert "the loss jumped at steps 15, 18" in capsys.readouterr().err
