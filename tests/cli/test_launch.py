"""`msrun_launcher.sh` and `msft launch` as users call them."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from msft.cli import launch
from tests.launch.jobs import ROOT, alive, environment, within

SCRIPT = ROOT / "scripts" / "msrun" / "msrun_launcher.sh"
BACKENDS = ("torch", "mindspore")


def script(*words, cwd, **variables):
    """Run the script with this python, from any folder."""
    variables = environment(PYTHON=sys.executable, **variables)
    return subprocess.run(["bash", str(SCRIPT), *words], cwd=cwd, env=variables, capture_output=True, text=True)


def need(backend):
    pytest.importorskip(backend)


@pytest.fixture
def program(tmp_path):
    """A program that prints where it is and then sleeps for as long as it is told."""
    text = "import os, sys, time\nprint('pid', os.getpid(), sys.argv[1:], flush=True)\n"
    (tmp_path / "mine.py").write_text(text + "time.sleep(float(os.environ.get('SECONDS_TO_SLEEP', 0)))\n")
    return "mine.py"


@pytest.mark.parametrize("words", [(), ("x", "2", "8118"), ("x",) * 7])
def test_other_counts_of_words_are_a_usage_error(tmp_path, words):
    done = script(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert f"these are {len(words)} words" in done.stderr and "1, 2, 6 or 9 words" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_help(tmp_path):
    done = script("--help", cwd=tmp_path)
    assert done.returncode == 0 and "9 words: COMMAND WORKER_NUM LOCAL_WORKER MASTER_ADDR" in done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dry_run_prints_the_line_and_starts_nothing(write_recipe, tmp_path, backend):
    need(backend)
    recipe = write_recipe(backend)
    before = set(tmp_path.iterdir())
    command = f"run_finetune.py --config {recipe.name} --seed 7"
    done = script("--dry-run", command, "4", "2", "127.0.0.1", "9118", "1", "logs", "True", "60", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    agent = {
        "torch": "-m torch.distributed.run --nnodes 2 --nproc_per_node 2 --node_rank 1 --master_addr 127.0.0.1 "
        "--master_port 9118 --rdzv_conf timeout=60",
        "mindspore": "/msrun --worker_num 4 --local_worker_num 2 --master_addr 127.0.0.1 --master_port 9118 "
        "--node_rank 1 --log_dir logs --join True --cluster_time_out 60",
    }[backend]
    assert agent in done.stdout
    assert f"logs {ROOT}/run_finetune.py --config {recipe.name} --seed 7 --use_parallel True" in done.stdout
    assert set(tmp_path.iterdir()) == before


def test_a_wrong_recipe_is_told_once_before_anything_starts(write_recipe, tmp_path):
    write_recipe(sed=1, runner_config__epochs="many")
    done = script("run_finetune.py --config recipe.yaml", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("did you mean 'seed'") == 1 and done.stderr.count("epochs") == 1
    assert not (tmp_path / "output").exists()


def test_a_port_in_use_is_told(write_recipe, tmp_path):
    need("torch")
    write_recipe()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        done = script("run_finetune.py --config recipe.yaml", "2", port, "logs", "True", "60", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: port {port} is in use .*: choose another, \d+ is free\n", done.stderr)


def test_one_worker_runs_and_waits(write_recipe, tmp_path, program):
    write_recipe()
    done = script(f"{program} --config recipe.yaml --seed 9", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"pid \d+ \['--config', 'recipe.yaml', '--seed', '9'\]\n", done.stdout)
    assert (tmp_path / "output" / "msrun_log" / "worker_0.log").read_text() == done.stdout


def test_join_false_returns_at_once_and_goes_on_in_the_background(write_recipe, tmp_path, program):
    write_recipe()
    words = (f"{program} --config recipe.yaml", "1", "8118", "logs", "False", "60")
    done = script(*words, cwd=tmp_path, SECONDS_TO_SLEEP="60")
    assert done.returncode == 0 and done.stdout == ""
    launcher = int(re.search(r"tail -f logs/worker_0.log` shows it, `kill (\d+)` ends it", done.stderr)[1])
    log = tmp_path / "logs" / "worker_0.log"
    assert within(20, lambda: log.is_file() and log.read_text().startswith("pid "))
    worker = int(log.read_text().split()[1])
    assert alive(launcher) and alive(worker)
    os.kill(launcher, signal.SIGTERM)
    assert within(20, lambda: not alive(launcher) and not alive(worker))
    assert "interrupted: the processes have" in (tmp_path / "logs" / "launcher.log").read_text()


def test_a_failure_in_the_background_is_in_the_launchers_log(write_recipe, tmp_path):
    write_recipe()
    (tmp_path / "mine.py").write_text("raise ValueError('boom')")
    assert script("mine.py --config recipe.yaml", "1", "8118", "logs", "False", "60", cwd=tmp_path).returncode == 0
    log = tmp_path / "logs" / "launcher.log"
    assert within(20, lambda: log.is_file() and "error: rank 0 failed (exit code 1)" in log.read_text())
    assert "ValueError: boom" in log.read_text()


def test_the_python_is_the_active_environments_or_the_projects(tmp_path):
    """Without PYTHON: the one on PATH where an environment is active, else the project's .venv, else python3."""
    project = tmp_path / "project"
    (project / "scripts" / "msrun").mkdir(parents=True)
    shutil.copy(SCRIPT, project / "scripts" / "msrun")
    for folder in (project / ".venv" / "bin", tmp_path / "active"):
        folder.mkdir(parents=True)
        (folder / "python3").write_text(f"#!/bin/sh\necho {folder} $PYTHONPATH\n")
        (folder / "python3").chmod(0o755)
    base = {"PATH": f"{tmp_path}/active:/usr/bin:/bin"}

    def chosen(**variables):
        words = ["bash", str(project / "scripts" / "msrun" / "msrun_launcher.sh"), "x"]
        return subprocess.run(words, env=base | variables, capture_output=True, text=True, check=True).stdout.split()

    assert chosen() == [f"{project}/.venv/bin", str(project)]
    assert chosen(VIRTUAL_ENV="/x", PYTHONPATH="/y") == [f"{tmp_path}/active", f"{project}:/y"]
    assert chosen(PYTHON=f"{tmp_path}/active/python3") == [f"{tmp_path}/active", str(project)]
    shutil.rmtree(project / ".venv")
    assert chosen() == [f"{tmp_path}/active", str(project)]


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """No variables of a cluster around; everything relative goes to a folder of its own."""
    names = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    for name in (*names, "MSFT_MAX_RESTARTS", *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_msft_launch(write_recipe, plain, capsys):
    need("torch")
    recipe = write_recipe()
    words = [str(recipe), "--seed", "7", "--nproc_per_node", "2", "--nnodes", "2", "--node_rank", "1"]
    assert launch.main([*words, "--master_addr", "localhost", "--master_port", "9118", "--dry-run"]) == 0
    line = capsys.readouterr().out
    assert "--nnodes 2 --nproc_per_node 2 --node_rank 1 --master_addr localhost --master_port 9118" in line
    assert line.endswith(
        f"-m msft.launch.worker output/msrun_log -m msft train --config {recipe} --seed 7 --use_parallel True\n"
    )


def test_msft_launch_takes_a_clusters_variables(write_recipe, plain, capsys, monkeypatch):
    need("torch")
    variables = {"NPROC_PER_NODE": "3", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "9119"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.main([str(write_recipe()), "--dry-run"]) == 0
    expected = "--nnodes 2 --nproc_per_node 3 --node_rank 1 --master_addr ::1 --master_port 9119"
    assert expected in capsys.readouterr().out


AGENTS = {
    "torch": "-m torch.distributed.run --nnodes 2 --nproc_per_node 4 --node_rank 1 --master_addr 127.0.0.2 "
    "--master_port 9118 ",
    "mindspore": "/msrun --worker_num 8 --local_worker_num 4 --master_addr 127.0.0.2 --master_port 9118 --node_rank 1 ",
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hostfile_a_slurm_allocation_and_flags_give_the_same_line(write_recipe, plain, capsys, monkeypatch, backend):
    """127.0.0.2 stands for another machine: a machine is found by its name first, by its addresses only then."""
    need(backend)
    recipe, port = str(write_recipe(backend)), ("--master_port", "9118", "--dry-run")
    Path("hosts").write_text("127.0.0.2 slots=4\nthis-machine slots=4\n")
    monkeypatch.setattr(socket, "gethostname", lambda: "this-machine")
    layout = ("--nnodes", "2", "--nproc_per_node", "4", "--node_rank", "1", "--master_addr", "127.0.0.2")
    lines = []
    slurm = {"SLURM_JOB_NODELIST": "127.0.0.[2-3]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    for words, variables in (
        (layout, {}),
        (("--hostfile", "hosts"), {}),
        (("--hostfile", "hosts"), {"SLURM_JOB_NODELIST": "other[1-9]", "SLURM_NNODES": "9", "SLURM_NODEID": "4"}),
        ((), slurm | {"SLURM_NTASKS_PER_NODE": "4"}),
        (("--nproc_per_node", "4"), slurm | {"SLURM_TASKS_PER_NODE": "8(x2)"}),
    ):
        with monkeypatch.context() as inside:
            for name, value in variables.items():
                inside.setenv(name, value)
            assert launch.main([recipe, *words, *port]) == 0
        lines.append(capsys.readouterr().out)
    assert len(set(lines)) == 1 and AGENTS[backend] in lines[0]


def test_one_machine_of_an_allocation_alone(write_recipe, plain, capsys, monkeypatch):
    """--nnodes 1 means this machine, whichever of the allocation it is."""
    need("torch")
    for name, value in {"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_NNODES": "4", "SLURM_NODEID": "2"}.items():
        monkeypatch.setenv(name, value)
    assert launch.main([str(write_recipe()), "--nnodes", "1", "--nproc_per_node", "2", "--dry-run"]) == 0
    assert "--nnodes 1 --nproc_per_node 2 --node_rank 0 --master_addr 127.0.0.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--hostfile", "hosts", "--nnodes", "3"], "--nnodes 3: hosts names 2: this-machine, other"),
        (["--hostfile", "hosts", "--node_rank", "1"], "this machine is number 0 (this-machine) of hosts"),
        (["--hostfile", "uneven"], "unequal slots (a 2, b 3)"),
        (["--hostfile", "nowhere"], "--hostfile nowhere: cannot be read"),
        (["--max_restarts", "-1"], "-1"),
        (["--hang_timeout", "soon"], "--hang_timeout: must be a whole number, not 'soon'"),
        (["--hang_timeout", "-5"], "--hang_timeout"),
    ],
)
def test_contradictions_are_one_line(write_recipe, plain, capsys, monkeypatch, words, problem):
    monkeypatch.setattr(socket, "gethostname", lambda: "this-machine")
    Path("hosts").write_text("this-machine slots=2\nother slots=2\n")
    Path("uneven").write_text("a slots=2\nb slots=3\n")
    assert launch.main([str(write_recipe()), *words, "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and problem in told and told.count("\n") == 1


def test_a_wrong_number_of_restarts_in_the_variable(write_recipe, plain, capsys, monkeypatch):
    monkeypatch.setenv("MSFT_MAX_RESTARTS", "many")
    words = [f"run_finetune.py --config {write_recipe()}", "2"]
    assert launch.msrun_launcher(["--dry-run", *words]) == 2
    assert "MSFT_MAX_RESTARTS or --max_restarts: 'many' is not a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "code", "told"), [("9119", 0, "--master_port 9119"), ("x", 2, "MASTER_PORT: 'x'")]
)
def test_two_words_meet_at_the_port_of_the_variable(write_recipe, plain, capsys, monkeypatch, variable, code, told):
    need("torch")
    monkeypatch.setenv("MASTER_PORT", variable)
    assert launch.msrun_launcher(["--dry-run", f"run_finetune.py --config {write_recipe('torch')}", "2"]) == code
    assert told in "".join(capsys.readouterr())


def test_the_help_says_how_several_machines_start_and_what_hang_timeout_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        launch.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for words in ("each machine runs its own launcher", "over ssh", "srun --ntasks-per-node=1", "which is 1200"):
        assert words in told


def test_msft_launch_uses_every_accelerator(write_recipe, plain, capsys, monkeypatch):
    need("torch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5")
    assert launch.main([str(write_recipe(device="cuda")), "--dry-run"]) == 0
    assert "--nproc_per_node 3 " in capsys.readouterr().out
    assert launch.main([str(write_recipe(device="cpu")), "--dry-run"]) == 0
    assert "torch.distributed.run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "which recipe?"),
        (["--nproc_per_node", "2"], "which recipe?"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["recipe.yaml", "--nproc_per_node", "0"], "0 processes: there must be 1 or more"),
        (["recipe.yaml", "--nnodes", "2", "--node_rank", "2"], "node rank 2"),
        (["recipe.yaml", "--sed", "2"], "did you mean '--seed'?"),
    ],
)
def test_msft_launch_refuses(write_recipe, plain, capsys, words, problem):
    write_recipe()
    assert launch.main([*words, "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert problem in told and "Traceback" not in told
    assert not Path("output").exists()


def test_a_mistyped_option_of_the_launcher_is_no_key_of_the_recipe(write_recipe, plain, capsys):
    with pytest.raises(SystemExit, match="2"):
        launch.main([str(write_recipe()), "--nproc_per_nod", "2", "--dry-run"])
    assert "unknown option --nproc_per_nod, did you mean '--nproc_per_node'?" in capsys.readouterr().err


def test_devices_are_counted_without_a_framework(write_recipe, plain, tmp_path, monkeypatch):
    from msft.config.load import load_recipe
    from msft.launch.devices import count

    dev = tmp_path / "dev"
    dev.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "davinci0", "davinci_manager"):
        (dev / name).touch()
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    for device, expected in {"cuda": 2, "npu": 1, "cpu": 1, "auto": 2}.items():
        assert count(load_recipe(write_recipe(device=device)), dev) == expected


def test_a_dry_run_of_parallel_mode_1_shows_what_mindspore_would_be_told(write_recipe, plain, capsys):
    """On a machine without Ascend; what is started there refuses its device in one line."""
    asked = {"parallel": {"parallel_mode": 1}, "parallel_config": {"model_parallel": 2}}
    recipe = str(write_recipe(backend="mindspore", device=None, **asked))
    words = [recipe, "--context.device_target", "Ascend", "--nproc_per_node", "4"]
    assert launch.main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "parallel_mode: semi_auto_parallel" in out and "wo, w2: ((2, 2), (1, 2))" in out and "msrun" in out
    assert launch.main([*words, "--device", "cpu", "--dry-run"]) == 2
    assert "semi-automatic mode exists on Ascend alone" in capsys.readouterr().err
