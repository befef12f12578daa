"""The system refuses to write: told with the path and the system's reason, exit code 1, earlier checkpoints whole."""

import json
import resource
import shutil
import subprocess
import sys

import pytest

from msft.cli.train import main
from msft.train import manifest
from tests.launch.jobs import ROOT, environment

pytest.importorskip("torch")

SAVING = {"type": "CheckpointMonitor", "save_checkpoint_steps": 4}


def only_whole(output, *steps):
    found = sorted((output / "checkpoints").iterdir())
    assert [path.name for path in found] == [f"step-{step}" for step in steps]
    assert not any(manifest.problems(path) for path in found)


@pytest.mark.parametrize("background", [True, False])
def test_a_file_that_may_not_grow(write_recipe, tmp_path, background):
    """The kernel's limit on a file's size stands for a full disk: writing fails in the middle of the weights."""
    saving = {**SAVING, "async_save": background}
    recipe = str(write_recipe(callbacks=[saving], model__pet_config=None, optimizer__learning_rate=0.003))
    assert main([recipe, "--runner_config.stop_step", "4"]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "msft", "train", recipe, "--resume_training", "True"],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    output = tmp_path / "output"
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {output / 'checkpoints' / 'step-8'}: cannot be written: File too large" in done.stderr
    only_whole(output, 4)
    assert not (output / "model").exists()


def test_a_ckpt_that_cannot_be_written_costs_no_checkpoint(write_recipe, tmp_path, monkeypatch, capsys):
    from msft.train.saving import Saver

    def obstructed(self, step):
        start(self, step)
        (tmp_path / "output" / "checkpoint").mkdir()
        (tmp_path / "output" / "checkpoint" / "rank_0").write_text("a file in the way")

    start = Saver.start
    monkeypatch.setattr(Saver, "start", obstructed)
    recipe = str(write_recipe(callbacks=[{**SAVING, "integrated_save": True}]))
    assert main([recipe, "--runner_config.stop_step", "4"]) == 1
    assert f"error: {tmp_path / 'output' / 'checkpoint'}: cannot be written: " in capsys.readouterr().err
    only_whole(tmp_path / "output", 4)


def test_a_full_disk_of_the_log(write_recipe, tmp_path, monkeypatch, capsys):
    from msft.train.metrics import TrainerLog

    opened = TrainerLog.__init__

    def on_a_full_disk(self, path, resumed_step):
        opened(self, path, resumed_step)
        self._file = open("/dev/full", "w")

    monkeypatch.setattr(TrainerLog, "__init__", on_a_full_disk)
    assert main([str(write_recipe())]) == 1
    told = capsys.readouterr().err
    assert f"error: {tmp_path / 'output'}: cannot be written: No space left on device" in told


def test_a_folder_that_vanishes(write_recipe, tmp_path, monkeypatch, capsys):
    from msft.train import tensorboard
    from msft.train.reporter import Reporter

    output, step = tmp_path / "output", Reporter.step
    # It would notice first.
    monkeypatch.setattr(tensorboard, "installed", lambda: False)

    def vanish(self, record):
        step(self, record)
        if record.step == 6:
            shutil.rmtree(output)

    monkeypatch.setattr(Reporter, "step", vanish)
    assert main([str(write_recipe(callbacks=[{**SAVING, "async_save": False}]))]) == 1
    path = output / "checkpoints" / "step-8"
    assert f"error: {path}: cannot be written: {output} is no longer there" in capsys.readouterr().err
    assert not output.exists()


def test_a_file_where_the_checkpoints_should_be(write_recipe, tmp_path, monkeypatch, capsys):
    from msft.train.reporter import Reporter

    output, step = tmp_path / "output", Reporter.step

    def disturb(self, record):
        step(self, record)
        if record.step == 6:
            (output / "checkpoints").rename(output / "elsewhere")
            (output / "checkpoints").write_text("")

    monkeypatch.setattr(Reporter, "step", disturb)
    assert main([str(write_recipe(callbacks=[{**SAVING, "async_save": False}]))]) == 1
    told = capsys.readouterr().err
    assert "step-8: cannot be written: File exists" in told or "step-8: cannot be written: Not a directory" in told
    assert not manifest.problems(output / "elsewhere" / "step-4")


@pytest.mark.parametrize("place", ["/proc/msft/output", "{recipe}/output"])
def test_an_output_folder_that_cannot_be(write_recipe, place, capsys):
    recipe = str(write_recipe())
    place = place.format(recipe=recipe)
    assert main([recipe, "--output_dir", place]) == 1
    told = capsys.readouterr().err
    assert f"error: {place}: cannot be written: " in told and "unexpected" not in told


def test_results_that_cannot_be_written_are_written_by_the_next_run(write_recipe, tmp_path, monkeypatch, capsys):
    from msft.train import saving

    recipe, output, write = str(write_recipe(callbacks=[SAVING])), tmp_path / "output", saving.write_lora

    def refuse(folder, *rest):
        if folder == output / "adapter":
            raise OSError(28, "No space left on device")
        write(folder, *rest)

    monkeypatch.setattr(saving, "write_lora", refuse)
    assert main([recipe, "--epochs", "1"]) == 1
    assert f"error: {output}: cannot be written: No space left on device" in capsys.readouterr().err
    only_whole(output, 12, 4, 8)
    monkeypatch.undo()
    assert main([recipe, "--epochs", "1", "--resume_training", "True"]) == 0
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((output / "train_summary.json").read_text())["steps"] == 12
