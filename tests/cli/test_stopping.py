"""Real signals to a real process, on both engines: the step is finished and saved, and the command it names goes on."""

import json
import shlex
import signal
import subprocess
import sys
import time

import pytest

from msft.cli.train import main
from msft.train import checkpoint, manifest
from tests.launch.jobs import ROOT, environment, within

SAVING = {"type": "CheckpointMonitor", "save_checkpoint_steps": 1000}
# A checkpoint that takes a minute to write.
SLOW = """
import sys, time
from msft.cli.train import main
from msft.train import checkpoint
write = checkpoint._write_moments
checkpoint._write_moments = lambda path, state: (write(path, state), time.sleep(60))
sys.exit(main(sys.argv[1:]))
"""


def records(output):
    file = output / "trainer_log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def start(tmp_path):
    """Start `msft train` (or a program of its own) in a process; it is gone at the end."""
    started = []

    def begin(*words, program=("-m", "msft", "train")):
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, *program, *words],
            cwd=tmp_path,
            env=environment(PYTHONPATH=str(ROOT)),
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()


@pytest.mark.parametrize(
    ("backend", "number", "callbacks"),
    [
        ("torch", signal.SIGTERM, [SAVING]),
        # Without CheckpointMonitor a stopped run saves all the same.
        ("torch", signal.SIGINT, []),
        ("mindspore", signal.SIGTERM, [SAVING]),
        pytest.param("mindspore", signal.SIGINT, [], marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_exactly(backend, number, callbacks, write_recipe, start, tmp_path):
    pytest.importorskip(backend)
    recipe = str(write_recipe(backend, callbacks=callbacks, runner_config__epochs=1000))
    output = tmp_path / "output"
    process = start(recipe, "--output_dir", "output")
    assert within(120, lambda: len(records(output)) >= 3), process.communicate(timeout=5)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    # MindSpore's own handler turns a SIGINT that meets a compiled function into a SIGTERM.
    seen = {128 + number, 143} if backend == "mindspore" else {128 + number}
    assert process.returncode in seen, told
    assert f"{signal.Signals(process.returncode - 128).name}: this step is finished and saved" in told
    assert "Traceback" not in told
    steps = [record["step"] for record in records(output)]
    assert steps == list(range(1, len(steps) + 1))
    newest = checkpoint.folder(output, steps[-1])
    assert [path.name for path in newest.parent.iterdir()] == [newest.name] and not manifest.problems(newest)
    # The command that it names, for two more steps, beside a run that was never stopped.
    command = next(line for line in told.splitlines() if f" goes on after step {steps[-1]}" in line)
    words = shlex.split(command.removesuffix(f" goes on after step {steps[-1]}"))
    assert words == ["msft", "train", recipe, "--output_dir", "output", "--resume_training", "True"]
    last = ("--runner_config.stop_step", str(steps[-1] + 2))
    resumed = start(*words[2:], *last)
    _, told = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, told
    assert main([recipe, "--output_dir", str(tmp_path / "whole"), *last]) == 0
    losses = ([record["loss"] for record in records(folder)] for folder in (output, tmp_path / "whole"))
    assert next(losses) == next(losses)


def test_a_second_signal_stops_at_once_and_what_is_half_written_is_removed_later(write_recipe, start, tmp_path):
    pytest.importorskip("torch")
    recipe, output = str(write_recipe(callbacks=[SAVING], runner_config__epochs=1000)), tmp_path / "output"
    process = start(recipe, program=("-c", SLOW))
    assert within(60, lambda: len(records(output)) >= 3)
    process.send_signal(signal.SIGINT)
    assert within(30, lambda: list((output / "checkpoints").glob(".step-*.part/optimizer.safetensors")))
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 143 and time.monotonic() - began < 15
    assert "no checkpoint was written" in told
    (half,) = (output / "checkpoints").iterdir()
    assert main([recipe, "--resume_training", "True", "--runner_config.stop_step", "2"]) == 0
    assert not half.exists()


def test_the_scripts_own_name_is_in_the_command(write_recipe, start, tmp_path):
    pytest.importorskip("torch")
    recipe = str(write_recipe(runner_config__epochs=1000))
    words = ("--config", recipe, "--resume_training", "True")
    process = start(*words, program=(str(ROOT / "run_finetune.py"),))
    assert within(60, lambda: len(records(tmp_path / "output")) >= 1)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"\npython run_finetune.py {shlex.join(words)} goes on after step" in told


def test_signals_are_as_before_when_a_run_is_over(write_recipe):
    pytest.importorskip("torch")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main([str(write_recipe()), "--runner_config.stop_step", "1"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
