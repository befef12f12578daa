"""The exact lines that start msrun and torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from msft.errors import InputError
from msft.launch.command import Command, build
from msft.launch.layout import Layout

PROGRAM = ("run_finetune.py", "--config", "X.yaml")
LAYOUT = Layout(8, 4, "10.0.0.7", 8200, 1, Path("logs"), True, 300)


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


def test_msrun(four_cores, monkeypatch):
    pytest.importorskip("mindspore")
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin")
    assert str(build(LAYOUT, 8200, "mindspore", PROGRAM)) == (
        f"OMP_NUM_THREADS=1 {folder}/msrun --worker_num 8 --local_worker_num 4 --master_addr 10.0.0.7 "
        "--master_port 8200 --node_rank 1 --log_dir logs --join True --cluster_time_out 300 --tail_worker_log 8 "
        "python3 -m msft.launch.worker logs run_finetune.py --config X.yaml"
    )


def test_torchrun(four_cores):
    pytest.importorskip("torch")
    assert str(build(LAYOUT, 8200, "torch", PROGRAM)) == (
        f"OMP_NUM_THREADS=1 {sys.executable} -m torch.distributed.run --nnodes 2 --nproc_per_node 4 --node_rank 1 "
        "--master_addr 10.0.0.7 --master_port 8200 --rdzv_conf timeout=300 "
        "-m msft.launch.worker logs run_finetune.py --config X.yaml"
    )


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_one_process_needs_no_launcher(backend):
    words = build(Layout(1, 1, log_dir=Path("logs")), 8118, backend, PROGRAM).words
    assert words == (sys.executable, "-m", "msft.launch.worker", "logs", *PROGRAM)


def test_threads_share_the_cores_unless_the_user_has_decided(four_cores, monkeypatch):
    pytest.importorskip("torch")
    assert build(Layout(2, 2), 8118, "torch", PROGRAM).variables == {"OMP_NUM_THREADS": "2"}
    assert build(Layout(16, 16), 8118, "torch", PROGRAM).variables == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert build(Layout(2, 2), 8118, "torch", PROGRAM).variables == {}


def test_msrun_gets_the_python_that_runs_now(monkeypatch, tmp_path):
    pytest.importorskip("mindspore")
    (tmp_path / "python3").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    command = build(Layout(2, 2), 8118, "mindspore", PROGRAM)
    seen = subprocess.run(
        ["python3", "-c", "import sys; print(sys.executable)"],
        env=command.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(seen.stdout.strip()).parent == Path(sys.executable).parent
    assert f'PATH={Path(sys.executable).parent}:"$PATH"' in str(command)


def test_a_python_that_msrun_cannot_find_is_refused(monkeypatch, tmp_path):
    (tmp_path / "msrun").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3.11"))
    with pytest.raises(InputError, match="msrun starts `python3`"):
        build(Layout(2, 2), 8118, "mindspore", PROGRAM)


def test_a_missing_framework_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    with pytest.raises(InputError, match=r"no msrun beside .*pip install 'msft\[mindspore\]'"):
        build(Layout(2, 2), 8118, "mindspore", PROGRAM)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"torch is not installed .*pip install 'msft\[torch\]'"):
        build(Layout(2, 2), 8118, "torch", PROGRAM)


def test_the_rank_of_a_surrounding_job_is_not_handed_on(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MS_ROLE", "RANK_ID"):
        monkeypatch.setenv(name, "5")
    environment = Command(("true",), {"X": "1"}).environment()
    assert environment["X"] == "1"
    assert not {"RANK", "WORLD_SIZE", "MS_ROLE", "RANK_ID"} & set(environment)
