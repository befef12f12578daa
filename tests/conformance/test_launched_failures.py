"""A job whose rank is killed or stuck ends soon, on both engines, tells who it was, and goes on by itself if asked."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT, alive, alone, environment, running_below, within

STUCK = Path(__file__).with_name("stuck_program.py")
SAVING = [{"type": "CheckpointMonitor", "save_checkpoint_steps": 1, "keep_checkpoint_max": 3}]
BOUND = 30
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def only_job():
    with alone():
        yield


def start(command, cwd, **variables):
    """Start a command on two processes through the launcher script."""
    words, pipe = ["bash", str(ROOT / "scripts/msrun/msrun_launcher.sh"), command, "2"], subprocess.PIPE
    variables = environment(PYTHON=sys.executable, **variables)
    return subprocess.Popen(words, cwd=cwd, env=variables, stdout=pipe, stderr=pipe, text=True)


def records(output):
    file = output / "trainer_log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def of_rank(launcher, rank):
    """(the process that trains as a rank, the one that started it and tells how it ended)."""
    found = {}
    for pid in running_below(launcher.pid):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        own = {b"RANK=%d" % rank, b"RANK_ID=%d" % rank} & set(variables) and b"MS_ROLE=MS_SCHED" not in variables
        if own and b"run_finetune.py" in words:
            found[b"msft.launch.worker" in words] = pid
    return found[False], found[True]


@pytest.mark.parametrize("backend", ["torch", pytest.param("mindspore", marks=slow)])
def test_a_stuck_rank_is_named_with_where_it_stands_and_all_are_ended(backend, write_recipe, tmp_path):
    """The other rank waits for it in a sum over all ranks: by its steps alone it could as well be the one."""
    pytest.importorskip(backend)
    recipe = write_recipe(backend)
    # Longer than a later step may take to compile for a new length, and a third of what imports take.
    seconds = {"torch": 8, "mindspore": 60}[backend]
    process = start(f"{STUCK} --config {recipe} --hang_timeout {seconds}", tmp_path)
    shown, told = process.communicate(timeout=400)
    ended = time.time()
    assert process.returncode == 1 and "step 2/12" in shown, shown + told
    line = STUCK.read_text().splitlines().index("    time.sleep(3600)") + 1
    where = f'File "{STUCK}", line {line} in wait_for_ever'
    assert f"error: no progress of any rank for {seconds} s (hang_timeout): rank 1 is behind in step 3" in told, told
    assert f"computing the step: {where}; all other processes on this machine were ended\n" in told
    assert re.search(r"^rank 0: step 3, computing the step \(waits for the others\): File ", told, re.M)
    logs = [tmp_path / "output" / "msrun_log" / f"worker_{rank}.log" for rank in range(2)]
    assert all(str(log.relative_to(tmp_path)) in told for log in logs)
    assert f"  {where}\n" in logs[1].read_text() and "msft/train/loop.py" in logs[0].read_text()
    assert all("Thread 0x" in log.read_text() for log in logs)
    last = (tmp_path / "output" / "trainer_log.jsonl").stat().st_mtime
    assert seconds < ended - last < seconds + BOUND
    assert running_below(process.pid) == []


@pytest.mark.parametrize("backend", ["torch", pytest.param("mindspore", marks=slow)])
@pytest.mark.parametrize("killed", ["rank", pytest.param("its parent", marks=slow)])
def test_a_killed_rank_ends_the_job_and_the_restarted_one_equals_the_undisturbed(
    backend, killed, write_recipe, tmp_path
):
    """kill -9, also of the process that hosts a rank. No step is lost or done twice, bit for bit."""
    pytest.importorskip(backend)
    recipe = write_recipe(
        backend,
        callbacks=SAVING,
        model__pet_config__lora_dropout=0.1,
        runner_config={"epochs": 1000, "batch_size": 2, "stop_step": 60},
        lr_schedule={"type": "CosineWithWarmUpLR", "warmup_steps": 8},
    )
    output = tmp_path / "restarted"
    process = start(f"run_finetune.py --config {recipe} --output_dir {output}", tmp_path, MSFT_MAX_RESTARTS="1")
    attempt = tmp_path / "output" / "msrun_log" / "attempt-1"
    assert within(150, lambda: len(records(output)) > 3), process.communicate(timeout=5)
    below = running_below(process.pid)
    os.kill(of_rank(process, 1)[killed != "rank"], signal.SIGKILL)
    began = time.monotonic()
    assert within(60, attempt.exists)
    assert time.monotonic() - began < BOUND
    assert not any(map(alive, below))
    shown, told = process.communicate(timeout=200)
    assert process.returncode == 0, shown + told
    assert "restart 1 (1 of 1 without progress) goes on after step " in told
    assert re.search(r"^restart 1 .*; the cause: rank 1 was killed by SIGKILL", told, re.M), told
    assert all((attempt / f"worker_{rank}.log").exists() for rank in range(2))
    whole = tmp_path / "whole"
    done = start(f"run_finetune.py --config {recipe} --output_dir {whole}", tmp_path)
    assert done.wait(timeout=200) == 0
    assert [record["loss"] for record in records(output)] == [record["loss"] for record in records(whole)]
    assert len(records(output)) == 60
    name = "adapter/adapter_model.safetensors"
    assert (output / name).read_bytes() == (whole / name).read_bytes()
