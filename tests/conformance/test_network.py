"""Two machines train as one process does, on both engines, and whatever befalls the network or one of them ends soon.

The machines are network namespaces (tests/launch/network.py). Most of it runs with `make test-netns`.
"""

import json
import os
import signal
import sys
import time

import pytest

from msft.cli.train import main as train
from msft.train import checkpoint
from tests.launch import network
from tests.launch.jobs import ROOT, alive, running_below, within
from tests.launch.network import Network

pytestmark = pytest.mark.skipif(not network.possible(), reason="needs root and ip to make network namespaces")

BACKENDS = ("torch", "mindspore")
BOUND = 30
ENDED = "all other processes on all machines were ended"
# Checkpoints at every step, and more steps than a test waits for.
LONG = {
    "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 1, "keep_checkpoint_max": 3}],
    "runner_config": {"epochs": 5000, "batch_size": 1},
    "model__pet_config__lora_dropout": 0.1,
}


@pytest.fixture
def machines(tmp_path):
    with Network(tmp_path) as made:
        yield made


def need(backend):
    pytest.importorskip(backend)


def launch(machines, number, recipe, *words, processes=2, clock=0):
    """Start a machine's launcher."""
    where = ["--nnodes", "2", "--node_rank", str(number), "--master_addr", machines.address(0)]
    where += ["--nproc_per_node", str(processes), "--log_dir", "logs"]
    return machines.start(
        number, sys.executable, "-m", "msft", "launch", str(recipe), *where, *words, clock=clock, GLOG_v="3"
    )


def both(machines, recipe, *words, **settings):
    return [launch(machines, number, recipe, *words, **settings) for number in range(2)]


def ended(launchers, seconds):
    """What each has printed (standard output and error), once all have ended."""
    deadline = time.monotonic() + seconds
    return ["".join(launcher.communicate(timeout=deadline - time.monotonic())) for launcher in launchers]


def one_process(recipe, *words):
    assert train([str(recipe), *words]) == 0


def losses(output):
    file = output / "trainer_log.jsonl"
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()] if file.exists() else []


def training(output, steps):
    """Whether a run has come so far."""
    return within(150, lambda: len(losses(output)) >= steps)


def check_equal_to_one_process(machines, write_recipe, tmp_path, backend, processes, steps, **start):
    recipe = write_recipe(backend, model__pet_config__lora_dropout=0.1)
    stop = ("--runner_config.stop_step", str(steps))
    size = ("--batch_size", str(4 // (2 * processes)))
    words = (*stop, *size, "--output_dir", str(tmp_path / "two"))
    launchers = both(machines, recipe, *words, processes=processes, **start)
    texts = ended(launchers, 180)
    assert [launcher.returncode for launcher in launchers] == [0, 0], texts
    one_process(recipe, *stop, "--batch_size", "4", "--output_dir", str(tmp_path / "one"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == steps and two == pytest.approx(one, abs=1e-5)
    assert json.loads((tmp_path / "two" / "train_summary.json").read_text())["processes"] == 2 * processes


@pytest.mark.parametrize("backend", ["torch", pytest.param("mindspore", marks=pytest.mark.netns)])
def test_two_machines_are_one_run(machines, write_recipe, tmp_path, backend):
    need(backend)
    check_equal_to_one_process(machines, write_recipe, tmp_path, backend, processes=1, steps=3)


@pytest.mark.netns
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_on_each_of_two_machines_are_one_run(machines, write_recipe, tmp_path, backend):
    need(backend)
    check_equal_to_one_process(machines, write_recipe, tmp_path, backend, processes=2, steps=12)


def running(machines, write_recipe, tmp_path, backend, *words, processes=1):
    """A job of two machines that has come to its third step: (recipe, launchers, output folder)."""
    recipe = write_recipe(backend, **LONG)
    output = tmp_path / "stopped"
    launchers = both(machines, recipe, "--output_dir", str(output), *words, processes=processes)
    assert training(output, 3), [launcher.poll() for launcher in launchers]
    return recipe, launchers, output


def check_resumed_equals_undisturbed(machines, recipe, output, tmp_path, processes=1):
    """The run goes on from its last whole checkpoint, bit for bit as one that nothing befell."""
    last = checkpoint.read_state(checkpoint.latest_whole(output / checkpoint.FOLDER)).step + 3
    stop = ("--runner_config.stop_step", str(last))
    for folder, resume in ((output, ("--resume_training", "True")), (tmp_path / "whole", ())):
        launchers = both(machines, recipe, *stop, "--output_dir", str(folder), *resume, processes=processes)
        texts = ended(launchers, 240)
        assert [launcher.returncode for launcher in launchers] == [0, 0], texts
    check_same(output, tmp_path / "whole", last)


def check_same(left, right, steps):
    assert losses(left) == losses(right) and len(losses(left)) == steps
    name = "adapter/adapter_model.safetensors"
    assert (left / name).read_bytes() == (right / name).read_bytes()


@pytest.mark.netns
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cut_link_ends_the_job_on_both_sides(machines, write_recipe, tmp_path, backend):
    need(backend)
    recipe, launchers, output = running(machines, write_recipe, tmp_path, backend, processes=2)
    began = time.monotonic()
    machines.cut(1)
    texts = ended(launchers, 90)
    seconds = time.monotonic() - began
    for number, text in enumerate(texts):
        assert launchers[number].returncode == 1, text
        other = f"machine {1 - number} (node{1 - number}) was not heard for 12 s: it or the network is down"
        assert f"error: {other}" in text, text
        assert f"logs/worker_{2 * number}.log logs/worker_{2 * number + 1}.log" in text
    assert seconds < BOUND
    assert not any(network.processes(name) for name in machines.names)
    machines.join(1)
    check_resumed_equals_undisturbed(machines, recipe, output, tmp_path, processes=2)


@pytest.mark.netns
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_machine_whose_power_fails_ends_the_job_on_the_other(machines, write_recipe, tmp_path, backend, killed):
    need(backend)
    recipe, launchers, output = running(machines, write_recipe, tmp_path, backend)
    began = time.monotonic()
    machines.kill(killed)
    text = ended([launchers[1 - killed]], 90)[0]
    seconds = time.monotonic() - began
    assert launchers[1 - killed].returncode == 1
    assert f"error: machine {killed} (node{killed}) was not heard for 12 s" in text or "has left" in text, text
    assert seconds < BOUND
    assert not network.processes(machines.names[1 - killed])
    if killed:
        check_resumed_equals_undisturbed(machines, recipe, output, tmp_path)


@pytest.mark.netns
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_rank_ends_all_on_both_machines_and_both_tell_it(machines, write_recipe, tmp_path, backend):
    need(backend)
    _, launchers, _ = running(machines, write_recipe, tmp_path, backend, processes=2)
    began = time.monotonic()
    os.kill(rank_process(machines, launchers[1], 3), signal.SIGKILL)
    texts = ended(launchers, 90)
    seconds = time.monotonic() - began
    for number, text in enumerate(texts):
        assert launchers[number].returncode == 1, text
        where = "" if number == 1 else " on machine 1 (node1)"
        assert f"error: rank 3{where} was killed by SIGKILL" in text and ENDED in text, text
        for rank in range(4):
            assert f"logs/worker_{rank}.log" in text
    assert seconds < BOUND
    assert not any(network.processes(name) for name in machines.names)


def rank_process(machines, launcher, rank):
    """The process that trains as a rank: its parent has written its log's name and rank."""
    below = [pid for pid in running_below(launcher.pid) if alive(pid)]
    for pid in below:
        variables = open(f"/proc/{pid}/environ", "rb").read().split(b"\0")
        words = open(f"/proc/{pid}/cmdline", "rb").read()
        own = {b"RANK=%d" % rank, b"RANK_ID=%d" % rank} & set(variables) and b"MS_ROLE=MS_SCHED" not in variables
        if own and b"msft.launch.worker" not in words and b"msft\0train" in words:
            return pid
    raise AssertionError(f"no process of rank {rank} among {below}")


@pytest.mark.netns
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_machine_that_dies_and_comes_back_is_taken_in_again(machines, write_recipe, tmp_path, backend):
    """--max_restarts: the first machine waits for the other, whose launcher is started anew; the run is the same."""
    need(backend)
    recipe = write_recipe(backend, **LONG)
    output, stop = tmp_path / "stopped", ("--runner_config.stop_step", "40", "--max_restarts", "2")
    words = ("--output_dir", str(output), *stop)
    launchers = both(machines, recipe, *words)
    assert training(output, 3)
    machines.kill(1)
    assert within(60, lambda: (tmp_path / "node0" / "logs" / "attempt-1").exists())
    launchers[1] = launch(machines, 1, recipe, *words)
    texts = ended(launchers, 240)
    assert [launcher.returncode for launcher in launchers] == [0, 0], texts
    assert "restart 1 (1 of 2 without progress) goes on after step" in texts[0]
    whole = both(machines, recipe, "--output_dir", str(tmp_path / "whole"), *stop)
    ended(whole, 240)
    check_same(output, tmp_path / "whole", 40)


@pytest.mark.netns
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_machine_that_comes_late_with_another_clock_is_waited_for(machines, write_recipe, tmp_path, backend):
    """A day ahead, in a time namespace of its own; the job has begun on neither machine before both are there."""
    need(backend)
    recipe = write_recipe(backend, runner_config={"epochs": 1, "batch_size": 2})
    words = ("--output_dir", str(tmp_path / "two"), "--runner_config.stop_step", "3")
    first = launch(machines, 0, recipe, *words, processes=1)
    time.sleep(14)
    assert first.poll() is None and not (tmp_path / "node0" / "logs" / "worker_0.log").exists()
    second = launch(machines, 1, recipe, *words, processes=1, clock=86400)
    texts = ended([first, second], 120)
    assert (first.returncode, second.returncode) == (0, 0), texts
    assert "waiting: no launcher of machine 1 of 2 (counted from 0) has come yet" in texts[0]
    one_process(recipe, "--batch_size", "4", "--output_dir", str(tmp_path / "one"), "--runner_config.stop_step", "3")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def script(machines, number, recipe, seconds):
    """The nine words of the launcher script: two machines with a process each."""
    words = ["2", "1", machines.address(0), "8118", str(number), "logs", "True", str(seconds)]
    path = str(ROOT / "scripts" / "msrun" / "msrun_launcher.sh")
    return machines.start(number, "bash", path, f"run_finetune.py --config {recipe}", *words)


@pytest.mark.netns
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [0, 1])
def test_a_machine_that_never_comes_is_not_waited_for_for_ever(machines, write_recipe, backend, number):
    need(backend)
    alone = script(machines, number, write_recipe(backend), 5)
    (text,) = ended([alone], 40)
    missing = ("no launcher of machine 1 of 2", "machine 0 (10.77.0.1, port 8119) was not ready")[number]
    assert alone.returncode == 1 and f"error: {missing}" in text and "within 5 seconds" in text, text


@pytest.mark.netns
@pytest.mark.parametrize("port", [8118, 8119])
def test_a_port_that_is_taken_on_the_first_machine_is_told_there(machines, write_recipe, port):
    need("torch")
    listen = f"import socket, time; s = socket.create_server(('', {port})); print('ready', flush=True); time.sleep(60)"
    taken = machines.start(0, sys.executable, "-c", listen)
    assert taken.stdout.readline() == "ready\n"
    recipe = write_recipe()
    launchers = [script(machines, number, recipe, 5) for number in range(2)]
    first, second = ended(launchers, 60)
    assert launchers[0].returncode == 2 and f"error: port {port} is in use on this machine" in first, first
    assert launchers[1].returncode == 1 and "machine 0 (10.77.0.1, port 8119) was not ready" in second, second


@pytest.mark.netns
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hostfile_tells_each_machine_its_number_by_its_name_or_address(machines, write_recipe, tmp_path, backend):
    need(backend)
    (tmp_path / "hostfile").write_text("node0 slots=1\n10.77.0.2 slots=1  # by its address\n")
    recipe = write_recipe(backend)
    words = ["-m", "msft", "launch", str(recipe), "--hostfile", str(tmp_path / "hostfile"), "--batch_size", "2"]
    words += ["--runner_config.stop_step", "2"]
    launchers = [machines.start(number, sys.executable, *words, GLOG_v="3") for number in range(2)]
    texts = ended(launchers, 120)
    assert [launcher.returncode for launcher in launchers] == [0, 0], texts
    assert all(f"(1 here, machine {number} of 2)" in text for number, text in enumerate(texts))
    assert len(losses(tmp_path / "output")) == 2
