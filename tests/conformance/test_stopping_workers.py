"""A job of two processes, stopped in the middle, goes on bit for bit: all ranks stop after the same step and save."""

import json
import shlex
import signal
import subprocess
import sys

import pytest

from msft.train import checkpoint, manifest
from tests.launch.jobs import ROOT, alone, environment, within

SCRIPT = "scripts/msrun/msrun_launcher.sh"


@pytest.fixture(autouse=True)
def only_job():
    with alone():
        yield


def start(words, cwd):
    """Start the launcher script with its words."""
    pipe, variables, words = subprocess.PIPE, environment(PYTHON=sys.executable), ["bash", str(ROOT / SCRIPT), *words]
    return subprocess.Popen(words, cwd=cwd, env=variables, stdout=pipe, stderr=pipe, text=True)


def finished(words, cwd):
    process = start(words, cwd)
    shown, told = process.communicate(timeout=300)
    assert process.returncode == 0, shown + told


def records(output):
    file = output / "trainer_log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize(
    ("backend", "number"),
    [
        ("torch", signal.SIGTERM),
        pytest.param("torch", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("mindspore", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("mindspore", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_job_goes_on_exactly(backend, number, write_recipe, tmp_path):
    pytest.importorskip(backend)
    recipe = write_recipe(
        backend,
        model__pet_config__lora_dropout=0.1,
        runner_config={"epochs": 1000, "batch_size": 2, "gradient_accumulation_steps": 2},
        lr_schedule={"type": "CosineWithWarmUpLR", "warmup_steps": 8},
    )
    command, output = f"run_finetune.py --config {recipe} --output_dir {tmp_path}", tmp_path / "stopped"
    process = start([f"{command}/stopped", "2"], tmp_path)
    assert within(120, lambda: len(records(output)) >= 3), process.communicate(timeout=5)
    process.send_signal(number)
    shown, told = process.communicate(timeout=120)
    assert process.returncode == 128 + number, shown + told
    last = records(output)[-1]["step"]
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{last}"]
    assert manifest.problems(checkpoint.folder(output, last)) == []
    logs = [(tmp_path / "output" / "msrun_log" / f"worker_{rank}.log").read_text() for rank in range(2)]
    assert all("Traceback" not in log for log in logs)
    line = next(line for line in shown.splitlines() if f" goes on after step {last}" in line)
    words = shlex.split(line.removesuffix(f" goes on after step {last}"))
    assert words == ["bash", SCRIPT, f"{command}/stopped --resume_training True", "2"]
    stop = f"--runner_config.stop_step {last + 3}"
    finished([f"{words[2]} {stop}", "2"], tmp_path)
    finished([f"{command}/whole {stop}", "2"], tmp_path)
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("stopped", "whole")]
    assert len(losses[0]) == last + 3 and losses[0] == losses[1]
    name = "adapter/adapter_model.safetensors"
    assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
