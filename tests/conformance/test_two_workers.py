"""Two processes started by msrun_launcher.sh train as one process does, on both engines, and fail as one."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT, alive, alone, environment, pids

SCRIPT = ROOT / "scripts" / "msrun" / "msrun_launcher.sh"
PROGRAM = Path(__file__).with_name("two_workers_program.py")
LORA = {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1}
# Compared to 1e-5; tokens and supervised tokens are counts and have to be equal.
MEASURED = ("loss", "grad_norm", "eval_loss")


def two_workers(command, cwd, **variables):
    """Run a command on two workers through the launcher script."""
    variables = environment(PYTHON=sys.executable, **variables)
    words = ["bash", str(SCRIPT), command, "2"]
    with alone():
        return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True)


def records(folder):
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("backend", "tuned", "padding", "strategy"),
    [
        ("torch", "full", "longest", "ddp"),
        ("mindspore", "lora", "max_length", "ddp"),
        pytest.param("torch", "lora", "max_length", "ddp", marks=pytest.mark.slow),
        pytest.param("torch", "lora", "longest", "fsdp", marks=pytest.mark.slow),
        pytest.param("torch", "full", "max_length", "fsdp", marks=pytest.mark.slow),
        pytest.param("mindspore", "full", "longest", "ddp", marks=pytest.mark.slow),
    ],
)
def test_two_workers_reproduce_one_process(backend, tuned, padding, strategy, write_recipe, tmp_path, tiny_data):
    """Same global batch, same losses: dropout, accumulation, clipping, decay, and a last step with a row for one rank.

    41 rows in steps of 8: of the last step's micro-batches, one has a row on rank 0 and none on rank 1, the other
    has none at all.
    """
    pytest.importorskip(backend)
    recipe = write_recipe(
        backend,
        strategy=strategy,
        model__pet_config=LORA if tuned == "lora" else None,
        optimizer={"type": "AdamW", "learning_rate": 0.02 if tuned == "lora" else 0.002, "weight_decay": 0.1},
        runner_config={"epochs": 1, "gradient_accumulation_steps": 2},
        runner_wrapper={"use_clip_grad": True, "max_grad_norm": 0.8},
        train_dataset={
            "data_loader": {"dataset_dir": str(tiny_data[0]), "num_samples": 41},
            "drop_remainder": False,
            "padding": padding,
        },
        eval_dataset={"data_loader": {"dataset_dir": str(tiny_data[1])}, "padding": "max_length"},
        do_eval=True,
        eval_step_interval=3,
    )
    command = f"run_finetune.py --config {recipe}"
    done = two_workers(f"{command} --batch_size 2 --output_dir two", tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    alone = [sys.executable, str(ROOT / "run_finetune.py"), "--config", str(recipe)]
    subprocess.run([*alone, "--batch_size", "4", "--output_dir", "one"], cwd=tmp_path, capture_output=True, check=True)
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(one) == len(two) == 6 + 2
    for left, right in zip(one, two, strict=True):
        for name in MEASURED:
            if name in left:
                assert right[name] == pytest.approx(left[name], abs=1e-5), (left, right)
        for name in ("step", "tokens", "supervised", "eval_supervised"):
            assert left.get(name) == right.get(name)
    assert one[0]["loss"] > one[5]["loss"] > 0
    # The first rank's progress is on the console, and only there.
    assert "step 6/6" in done.stdout and done.stdout.splitlines()[-1].startswith("next: msft generate")
    assert "step 6/6" not in (tmp_path / "output" / "msrun_log" / "worker_1.log").read_text()


def check_sums_and_failure(backend, write_recipe, tmp_path, **variables):
    pytest.importorskip(backend)
    done = two_workers(f"{PROGRAM} --config {write_recipe(backend)}", tmp_path, BACKEND=backend, **variables)
    ended = time.time()
    logs = [tmp_path / "output" / "msrun_log" / f"worker_{rank}.log" for rank in range(2)]
    assert "sums are right" in done.stdout and "sums are right" in logs[1].read_text(), done.stdout + done.stderr
    assert done.returncode == 1
    assert re.search(r"^error: rank 1 failed.*; all other processes on this machine were ended$", done.stderr, re.M)
    assert "  error: boom\n" in done.stderr
    for log in logs:
        assert str(log.relative_to(tmp_path)) in done.stderr
    assert ended - float((tmp_path / "failed_at").read_text()) < 20
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_sums_are_exact_and_a_failing_rank_ends_the_job(backend, write_recipe, tmp_path):
    check_sums_and_failure(backend, write_recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_a_rank_may_be_late_for_long(backend, write_recipe, tmp_path):
    """MindSpore by itself gives up after 30 seconds on CPU."""
    check_sums_and_failure(backend, write_recipe, tmp_path, WAIT_SECONDS="40")
