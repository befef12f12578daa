"""Protects checkpoints of parts from a rank that dies while they are written: what is there is whole, and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msft.train import checkpoint, manifest
from tests.conformance.test_cut_models import SCRIPT, train
from tests.launch.jobs import alone, environment, running_below

pytestmark = pytest.mark.slow


def pid_of(rank: int, launcher: int) -> int:
    """The training process of a rank below a launcher: the last of those that have its number."""
    found = []
    for pid in running_below(launcher):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if {f"RANK={rank}".encode(), f"RANK_ID={rank}".encode()} & set(variables):
            found.append(pid)
    return found[-1]


def kill_while_saving(command, folder, rank):
    """Start two processes, and kill one when the first part of a checkpoint after the first one is there."""
    words = ["bash", str(SCRIPT), " ".join(command), "2"]
    checkpoints = folder / "two" / "checkpoints"
    with alone(), (folder / "said").open("wb") as said:
        job = subprocess.Popen(words, cwd=folder, env=environment(PYTHON=sys.executable), stdout=said, stderr=said)
        while job.poll() is None:
            if checkpoint.steps_in(checkpoints) and [*checkpoints.glob(".step-*.part")]:
                os.kill(pid_of(rank, job.pid), signal.SIGKILL)
                break
            time.sleep(0.001)
        return job.wait(60)


CUT = ["--parallel_config.model_parallel", "2"]
FSDP = ["--strategy", "fsdp", "--batch_size", "2"]


@pytest.mark.parametrize(
    ("backend", "rank", "layout"),
    [("torch", 0, CUT), ("torch", 1, CUT), ("mindspore", 1, CUT), ("torch", 0, FSDP), ("torch", 1, FSDP)],
)
def test_a_rank_killed_while_it_saves_leaves_whole_checkpoints(backend, rank, layout, write_recipe, tmp_path):
    recipe = write_recipe(
        backend,
        model__pet_config=None,
        optimizer={"type": "AdamW", "learning_rate": 0.002},
        callbacks=[{"type": "CheckpointMonitor", "save_checkpoint_steps": 1}],
        runner_config={"epochs": 4, "batch_size": 4, "stop_step": 40},
    )
    common = ["--config", str(recipe)]
    command = ["run_finetune.py", *common, "--output_dir", "two", *layout]
    assert kill_while_saving(command, tmp_path, rank) == 1, (tmp_path / "said").read_text()
    place = tmp_path / "two" / "checkpoints"
    steps = checkpoint.steps_in(place)
    assert steps and all(manifest.problems(place / f"step-{step}") == [] for step in steps)
    for name, words in (("one", []), ("two", ["--resume_training", "True"])):
        done = train([*common, "--output_dir", name, *words], tmp_path)
        assert done.returncode == 0, done.stderr
    logs = [(tmp_path / name / "trainer_log.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = ([json.loads(line) for line in log] for log in logs)
    assert [record["step"] for record in two] == [record["step"] for record in one]
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=2e-5)
    assert not [*place.glob(".step-*.part")]
