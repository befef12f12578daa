"""A job in which nothing moves is seen, and the rank that holds it up is named."""

import os
import subprocess
import sys
import time

import pytest

from msft.errors import RunError
from msft.launch import RECORDS, hang, heartbeat
from msft.launch.hang import Place, Watch
from msft.launch.heartbeat import Beat
from msft.launch.supervise import supervise
from tests.launch.jobs import alive, job, pids

LIFE = "\nfrom msft.launch import heartbeat\nheartbeat.start()\n"
BEAT = "heartbeat.beat({}, 'computing the step')\n"


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def beats(*counts, patient=False):
    return {rank: Beat(1, count, count, patient, "computing") for rank, count in enumerate(counts)}


def test_any_sign_of_any_rank_is_progress(clock):
    watch = Watch(10)
    for count in range(5):
        assert not watch.stalled(beats(7, count))
        clock[0] += 9
    clock[0] += 0.9
    assert not watch.stalled(beats(7, 4))
    clock[0] += 0.2
    assert watch.stalled(beats(7, 4))


def test_a_start_a_first_step_and_saving_have_three_times_as_long(clock):
    watch = Watch(10)
    signs = {**beats(1, 1), 2: Beat(1, 1, 1, True, "saving")}
    assert not watch.stalled(signs)
    clock[0] += 29.9
    assert not watch.stalled(signs)
    clock[0] += 0.2
    assert watch.stalled(signs)


def test_zero_is_never_and_programs_that_give_no_sign_are_not_watched(clock):
    off, silent = Watch(0), Watch(10)
    off.stalled(beats(1)), silent.stalled({})
    clock[0] += 1e6
    assert not off.stalled(beats(1)) and not silent.stalled({})


def test_the_one_that_does_not_wait_is_behind():
    waiting = Place(4, "computing the step", 'File "msft/backend/torch/distributed.py", line 1 in f', True)
    busy = Place(4, "computing the step", 'File "x.py", line 1 in f', False)
    assert hang.behind({0: waiting, 1: busy, 2: waiting}) == {1: busy}
    # A waiting rank is not behind, whatever its step; of those that do not wait, the earliest.
    assert hang.behind({0: waiting._replace(step=3), 1: busy, 2: busy._replace(step=5)}) == {1: busy}
    assert hang.behind({0: waiting, 1: waiting._replace(step=3)}) == {1: waiting._replace(step=3)}
    assert hang.behind({0: waiting, 1: waiting}) == {0: waiting, 1: waiting}


def test_the_main_threads_stack_is_read_as_python_writes_it(tmp_path):
    program = (
        "import faulthandler, threading, time, sys\n"
        "def other(): time.sleep(60)\n"
        "def inner(): faulthandler.dump_traceback(all_threads=True)\n"
        "def outer(): inner()\n"
        "for _ in range(3): threading.Thread(target=other, daemon=True).start()\n"
        "outer()\n"
    )
    (tmp_path / "p.py").write_text(program)
    done = subprocess.run([sys.executable, tmp_path / "p.py"], capture_output=True, text=True, check=True)
    assert done.stderr.count("most recent call first") == 4
    file = str(tmp_path / "p.py")
    assert hang.main_stack("loading\n" + done.stderr) == [
        (file, "3", "inner"),
        (file, "4", "outer"),
        (file, "6", "<module>"),
    ]
    assert hang.main_stack("nothing\n") == []


def test_a_sign_is_overwritten_in_place_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv(RECORDS, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(heartbeat, "_descriptor", None)
    monkeypatch.setattr(heartbeat, "_count", 0)
    heartbeat.beat(1, "nobody listens yet")
    assert list(tmp_path.iterdir()) == []
    heartbeat.start()
    assert heartbeat.read(tmp_path) == {3: Beat(os.getpid(), 1, 0, True, "starting")}
    heartbeat.beat(12345678, "x" * 200)
    heartbeat.beat(7, "saving", patient=True)
    assert heartbeat.read(tmp_path) == {3: Beat(os.getpid(), 3, 7, True, "saving")}
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 80
    (tmp_path / "worker_4.beat").touch()
    assert set(heartbeat.read(tmp_path)) == {3}
    os.close(heartbeat._descriptor)


def test_a_sign_costs_next_to_nothing(tmp_path, monkeypatch):
    """A step takes a tenth of a second at the very least; it gives three signs."""
    monkeypatch.setattr(heartbeat, "_descriptor", os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT))
    began = time.process_time()
    for step in range(1000):
        heartbeat.beat(step, "computing the step")
    assert (time.process_time() - began) / 1000 < 0.0005
    os.close(heartbeat._descriptor)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_all_show_their_stacks_and_are_ended(tmp_path, capsys):
    body = LIFE + BEAT.format("1 + (rank != 1)") + "def stand():\n    time.sleep(600)\nstand()\n"
    command, layout = job(tmp_path, body, 3)
    began = time.monotonic()
    with pytest.raises(
        RunError, match=r"^no progress of any rank for 1 s \(hang_timeout\): rank 1 is behind in step 1"
    ):
        supervise(command, layout, hang_timeout=1)
    assert time.monotonic() - began < 20
    assert not any(map(alive, pids(tmp_path, 3)))
    told = capsys.readouterr().err
    for rank in range(3):
        assert f"rank {rank}: step {1 + (rank != 1)}, computing the step: File" in told
        assert "in stand\n" in (layout.log_dir / f"worker_{rank}.log").read_text()
    assert "logs, with the stacks of all threads:" in told


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.slow
def test_a_halted_process_shows_no_stack_and_is_the_one_named(tmp_path):
    body = LIFE + BEAT.format(1) + "if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(600)\n"
    with pytest.raises(RunError, match="rank 1 .*it showed no Python stack"):
        supervise(*job(tmp_path, body), hang_timeout=1)
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_job_that_moves_slowly_is_left_alone(tmp_path):
    body = LIFE + "for step in range(1, 6):\n    heartbeat.beat(step, 'computing')\n    time.sleep(0.7 * (rank + 1))\n"
    supervise(*job(tmp_path, body), hang_timeout=2)
