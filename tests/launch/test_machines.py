"""A job of several machines starts, ends and fails as one: real launchers on this machine, workers without a framework.

What a network does to them is tested by tests/conformance/test_machines.py.
"""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.launch.jobs import ROOT, alive, within

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
slow = pytest.mark.slow

LIFE = "\nfrom msft.launch import heartbeat\nheartbeat.start()\n"
MOVING = LIFE + "for step in range(1, 600):\n    heartbeat.beat(step, 'computing the step')\n    time.sleep(0.1)\n"
# What a rank says when another one is gone.
FOLLOWS = "print('error: Connection reset by peer', flush=True); sys.exit(1)"


@pytest.fixture
def port():
    """Of two that follow each other and are free, the first."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        number = one.getsockname()[1]
    return number - 1


@pytest.fixture
def machine(tmp_path, port):
    """Start the launcher of a machine, whose one worker runs `body`; it is killed at the end of the test."""
    started = []

    def start(node, body, nodes=2, **settings):
        folder = tmp_path / f"machine-{node}"
        folder.mkdir(exist_ok=True)
        (folder / "body").write_text(body)
        settings = json.dumps({"node": node, "nodes": nodes, "port": port} | settings)
        words = [sys.executable, "-m", "tests.launch.one_machine", str(folder), settings]
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def told(process, seconds=30):
    return process.communicate(timeout=seconds)[1]


def worker(tmp_path, rank):
    """The process id of a rank, which is alone on its machine."""
    file = tmp_path / f"machine-{rank}" / f"pid_{rank}"
    assert within(20, lambda: file.exists() and file.read_text())
    return int(file.read_text())


def test_a_machine_that_is_done_waits_for_the_others(machine):
    first = machine(0, "time.sleep(2); print('written')")
    second = machine(1, "print('done early')")
    assert told(second) == "" and second.returncode == 0
    assert told(first) == "" and first.returncode == 0


def test_a_machine_may_come_late(machine, tmp_path):
    first = machine(0, "print('trained')")
    time.sleep(3)
    assert first.poll() is None and not (tmp_path / "machine-0" / "pid_0").exists(), "started without the other"
    second = machine(1, "print('trained')")
    assert (told(first), told(second)) == ("", "") and (first.returncode, second.returncode) == (0, 0)


@pytest.mark.parametrize(("node", "missing"), [(0, "no launcher of machine 1 of 2"), (1, "machine 0 (127.0.0.1, port")])
def test_a_machine_never_comes(machine, tmp_path, node, missing):
    alone = machine(node, "print('trained')", timeout=2)
    text = told(alone, 15)
    assert alone.returncode == 1 and missing in text and "within 2 seconds, so the job was not started" in text
    assert not (tmp_path / f"machine-{node}" / f"pid_{node}").exists()


@pytest.mark.parametrize("failing", [pytest.param(0, marks=slow), 1])
def test_a_failure_ends_the_job_on_all_machines_and_each_tells_it(machine, tmp_path, failing):
    body = f"if rank == {failing}: time.sleep(1); raise ValueError('boom')\ntime.sleep(60)"
    began = time.monotonic()
    launchers = [machine(node, body) for node in range(3 - 1)]
    texts = [told(launcher) for launcher in launchers]
    assert time.monotonic() - began < 30
    for node, (launcher, text) in enumerate(zip(launchers, texts, strict=True)):
        where = "" if node == failing else f" on machine {failing} ({socket.gethostname()})"
        assert launcher.returncode == 1
        ended = f"error: rank {failing}{where} failed (exit code 1); all other processes on all machines were ended"
        assert ended in text and "  ValueError: boom" in text
        for rank in range(2):
            assert str(tmp_path / f"machine-{rank}" / "logs" / f"worker_{rank}.log") in text
    assert not any(alive(worker(tmp_path, rank)) for rank in range(2))


def test_bad_input_on_another_machine_is_not_tried_again(machine):
    bodies = ["time.sleep(60)", "print('error: data.yaml:3: no such key'); sys.exit(2)"]
    launchers = [machine(node, body, max_restarts=3) for node, body in enumerate(bodies)]
    for text in map(told, launchers):
        assert "  error: data.yaml:3: no such key" in text and "restart" not in text


def test_clocks_that_differ_by_a_day_do_not_change_which_failure_was_first(machine, tmp_path, monkeypatch):
    """Machine 1 fails first, machine 0 some seconds later with an error that could be a cause too.

    All clocks of machine 1 are a day ahead: by them its failure is the later one.
    """
    shift = "import time\nreal = time.monotonic\ntime.monotonic = lambda: real() + 86400\n"
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(shift)
    body = "time.sleep({}); raise ValueError('{}')"
    first = machine(0, body.format(6, "later"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/clock:{ROOT}")
    second = machine(1, body.format(1.5, "earlier"))
    texts = [told(launcher) for launcher in (first, second)]
    assert all("ValueError: earlier" in text and "ValueError: later" not in text for text in texts), texts


def test_no_decision_reads_the_wall_clock():
    """Ages and counts are told between machines, and within one the monotonic clock is the same for all processes."""
    for file in (ROOT / "msft" / "launch").glob("*.py"):
        text = file.read_text()
        assert "time.time()" not in text and "datetime" not in text and "st_mtime" not in text, file


@pytest.mark.parametrize("killed", [0, 1])
def test_a_launcher_that_is_killed_ends_the_job_on_the_other_machine(machine, tmp_path, killed):
    launchers = [machine(node, MOVING) for node in range(2)]
    workers = [worker(tmp_path, rank) for rank in range(2)]
    began = time.monotonic()
    launchers[killed].kill()
    text = told(launchers[1 - killed])
    assert launchers[1 - killed].returncode == 1 and time.monotonic() - began < 30
    assert f"error: machine {killed} (" in text and "has left: its launcher was killed" in text
    assert within(5, lambda: not any(map(alive, workers)))


def test_a_lost_machine_is_named_not_the_connections_that_broke(machine, tmp_path):
    body = MOVING.replace("time.sleep(0.1)", f"time.sleep(0.1)\n    if os.path.exists('{tmp_path}/gone'): {FOLLOWS}")
    launchers = [machine(0, body), machine(1, MOVING)]
    worker(tmp_path, 0), worker(tmp_path, 1)
    launchers[1].kill()
    (tmp_path / "gone").touch()
    text = told(launchers[0])
    assert "error: machine 1 (" in text and "has left: its launcher was killed" in text


@slow
def test_a_launcher_that_hangs_is_given_up(machine, tmp_path):
    """What a cut link is like: the connection stands, but nothing comes."""
    launchers = [machine(node, MOVING) for node in range(2)]
    worker(tmp_path, 0), worker(tmp_path, 1)
    began = time.monotonic()
    launchers[1].send_signal(signal.SIGSTOP)
    text = told(launchers[0])
    assert 11 < time.monotonic() - began < 30
    assert launchers[0].returncode == 1
    assert "was not heard for 12 s: it or the network is down" in text


@pytest.mark.parametrize("node", [0, pytest.param(1, marks=slow)])
def test_an_interruption_on_one_machine_is_a_stop_on_all_and_no_failure(machine, tmp_path, node):
    """The ranks agree to stop: here by a file, in training by their sum over all ranks."""
    body = f"""
def stop(*_): open("{tmp_path}/stop", "w")
signal.signal(signal.SIGINT, stop)
while not os.path.exists("{tmp_path}/stop"): time.sleep(0.1)
time.sleep(1)
sys.exit(130)
"""
    launchers = [machine(number, body, max_restarts=2) for number in range(2)]
    worker(tmp_path, 0), worker(tmp_path, 1)
    time.sleep(1)
    launchers[node].send_signal(signal.SIGINT)
    texts = [told(launcher) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [130, 130], texts
    assert not any("restart" in text or "failed" in text for text in texts)


def test_a_stuck_rank_on_another_machine_is_named(machine, tmp_path):
    stuck = "def wait_for_ever():\n    time.sleep(600)\n" + LIFE
    body = f"{stuck}for step in range(1, 9):\n    heartbeat.beat(step, 'computing the step')\n    time.sleep(0.1)\n"
    bodies = [body + "heartbeat.beat(9, 'computing the step'); wait_for_ever()", body + "wait_for_ever()"]
    launchers = [machine(node, text, hang_timeout=2) for node, text in enumerate(bodies)]
    for node, launcher in enumerate(launchers):
        text = told(launcher)
        assert launcher.returncode == 1
        assert "error: no progress of any rank for 2 s (hang_timeout): rank 1 is behind in step 8, computing" in text
        program = (tmp_path / "machine-1" / "program.py").read_text().splitlines()
        line = program.index("    time.sleep(600)") + 1
        assert f'machine-1/program.py", line {line} in wait_for_ever; all other processes on all machines' in text
        log = (tmp_path / f"machine-{node}" / "logs" / f"worker_{node}.log").read_text()
        assert "most recent call first" in log and "in wait_for_ever" in log


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"nodes": 3}, "machine 1 was told 3 processes, machine 0 was told 2"),
        ({"max_restarts": 1}, "machine 1 was told 1 restarts at most, machine 0 was told 0"),
    ],
)
def test_a_machine_that_was_told_otherwise_is_sent_away_and_may_come_again(machine, settings, problem):
    first = machine(0, "print('trained')")
    wrong = machine(1, "print('trained')", **settings)
    assert f"error: {problem}" in told(wrong) and wrong.returncode == 2
    assert first.poll() is None
    right = machine(1, "print('trained')")
    text = told(first)
    assert problem in text and told(right) == "" and (first.returncode, right.returncode) == (0, 0)


def test_two_machines_with_one_number(machine, tmp_path):
    first, second = machine(0, MOVING), machine(1, MOVING)
    worker(tmp_path, 1)
    third = machine(1, MOVING)
    assert "error: node rank 1 is taken: another machine" in told(third) and third.returncode == 2
    assert first.poll() is None and second.poll() is None


def test_after_a_failure_all_machines_start_again_together(machine, tmp_path):
    """Each has ended its processes before; the first one decides from which checkpoint, and when it is enough."""
    body = (
        LIFE
        + f"""
heartbeat.beat(1, "computing the step")
open("{tmp_path}/starts", "a").write(str(rank))
time.sleep(1)
if rank == 1:
    count = open("{tmp_path}/starts").read().count("1")
    if count < 3: open("{tmp_path}/checkpoint", "w").write(str(10 * count)); raise ValueError("boom")
"""
    )
    launchers = [machine(node, body, max_restarts=1) for node in range(2)]
    texts = [told(launcher, 60) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], texts
    # Each restart had a newer checkpoint, so it is the first one without progress.
    for number, step in ((1, 10), (2, 20)):
        assert f"restart {number} (1 of 1 without progress) goes on after step {step}; the cause: rank 1 on" in texts[0]
        assert f"restart {number}, when machine 0 is ready for it: rank 1 failed" in texts[1]
    assert sorted((tmp_path / "starts").read_text()) == list("000111")
    for rank in range(2):
        folder = tmp_path / f"machine-{rank}"
        assert (folder / "resume").read_text() == "True"
        assert (folder / "logs" / "attempt-2" / f"worker_{rank}.log").exists()


def test_a_machine_that_was_lost_comes_back_and_the_job_goes_on(machine, tmp_path):
    body = MOVING.replace("range(1, 600)", f"range(1, 600 if not os.path.exists('{tmp_path}/back') else 5)")
    launchers = [machine(node, body, max_restarts=2) for node in range(2)]
    worker(tmp_path, 0), worker(tmp_path, 1)
    launchers[1].kill()
    (tmp_path / "back").touch()
    second = machine(1, body, max_restarts=2)
    assert told(second) == "" and second.returncode == 0
    text = told(launchers[0])
    assert launchers[0].returncode == 0 and "restart 1 (1 of 2 without progress) begins at the beginning" in text
    assert "has left: its launcher was killed" in text or "was started anew" in text


def test_when_the_first_machine_gives_up_the_others_do(machine, tmp_path):
    launchers = [machine(node, LIFE + "time.sleep(1); raise ValueError('boom')", max_restarts=1) for node in range(2)]
    texts = [told(launcher) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [1, 1]
    assert "restarted 1 times, 1 in a row without a newer checkpoint" in texts[0]
    assert "error: machine 0 (" in texts[1] and "has ended the job" in texts[1]


def test_strangers_on_the_port_do_no_harm(machine, port):
    first = machine(0, "print('trained')")
    assert within(20, lambda: socket.socket().connect_ex(("127.0.0.1", port + 1)) == 0)
    for text in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b'{"machine": 7, "facts": {}}\n',
        b'{"machine": 1}\n',
        b"\xff" * 9,
    ):
        with socket.create_connection(("127.0.0.1", port + 1)) as stranger:
            stranger.sendall(text)
    second = machine(1, "print('trained')")
    assert (told(first), told(second)) == ("", "") and (first.returncode, second.returncode) == (0, 0)


def test_a_taken_port_is_told(machine, port):
    with socket.create_server(("", port + 1)):
        first = machine(0, "print('trained')")
        text = told(first)
    assert first.returncode == 2 and f"error: port {port + 1} is in use on this machine" in text
