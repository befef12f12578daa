"""A job ends as a whole: whichever way one of its processes, or the launcher, goes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from msft.errors import RunError, Stopped
from msft.launch.supervise import supervise
from msft.launch.worker import RECORDS
from tests.launch.jobs import ROOT, alive, ended, job, pids, running_below, within

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

SLEEP = "\ntime.sleep(60)"
DRIVER = """
import signal
import sys
from pathlib import Path
from tests.launch import jobs
from msft.cli import guard
from msft.launch.supervise import supervise
folder = Path(sys.argv[1])
if (folder / "nohup").exists():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
command, layout = jobs.job(folder, (folder / "body").read_text())
sys.exit(guard.run(lambda _: supervise(command, layout), []))
"""


def supervised(folder, body, workers=2):
    supervise(*job(folder, body, workers))


@pytest.fixture
def launcher(tmp_path):
    """Start a launcher in a process of its own; returns it with its workers' process ids."""
    started = []

    def start(body):
        (tmp_path / "body").write_text(body)
        words = [sys.executable, "-c", DRIVER, str(tmp_path)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        started.append(process)
        workers = pids(tmp_path)
        return process, workers

    yield start
    for process in started:
        process.kill()


def test_success_shows_the_first_rank_and_keeps_all_logs(tmp_path, capfdbinary):
    supervised(tmp_path, "print(f'I am {rank}'); print('an error', file=sys.stderr)")
    assert capfdbinary.readouterr().out == b"I am 0\nan error\n"
    assert (tmp_path / "logs" / "worker_1.log").read_text() == "I am 1\nan error\n"
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        "launcher.log",
        "worker_0.log",
        "worker_1.log",
    ]


def test_progress_is_shown_while_it_happens(launcher):
    process, _ = launcher("print('step 1')" + SLEEP)
    assert process.stdout.readline() == "step 1\n"
    assert process.poll() is None
    process.terminate()
    process.communicate()


def test_older_logs_are_not_mixed_in(tmp_path):
    command, layout = job(tmp_path, "print('new')")
    for path in (*layout.logs, layout.log_dir / "mine.log"):
        path.write_text("old\n")
    supervise(command, layout)
    assert [path.read_text() for path in layout.logs[:2]] == ["new\n", "new\n"]
    assert (layout.log_dir / "mine.log").read_text() == "old\n"


def test_the_first_failure_is_told_and_the_others_are_ended(tmp_path, capsys):
    body = "\nif rank == 1:\n    time.sleep(0.5)\n    raise ValueError('boom')" + SLEEP
    began = time.monotonic()
    with pytest.raises(
        RunError, match=r"^rank 1 failed \(exit code 1\); all other processes on this machine were ended"
    ):
        supervised(tmp_path, body, workers=3)
    assert time.monotonic() - began < 20
    assert not any(map(alive, pids(tmp_path, 3)))
    told = capsys.readouterr().err
    assert "  ValueError: boom\n" in told
    for name in ("worker_0.log", "worker_1.log", "worker_2.log", "launcher.log"):
        assert str(tmp_path / "logs" / name) in told


def test_the_cause_is_told_even_when_a_consequence_ends_earlier(tmp_path):
    body = """
if rank == 1:
    print("error: the cause", flush=True)
    time.sleep(0.4)
    sys.exit(1)
print("error: Connection reset by peer", flush=True)
sys.exit(1)
"""
    with pytest.raises(RunError, match="^rank 1 failed"):
        supervised(tmp_path, body)


def test_the_cause_is_told_even_when_it_is_still_going_down(tmp_path):
    body = """
if rank == 1:
    print("error: the cause", flush=True)
    time.sleep(60)
print("error: Broken pipe")
sys.exit(1)
"""
    with pytest.raises(RunError, match="^rank 1 failed;"):
        supervised(tmp_path, body)


def test_a_killed_process_is_a_failure(tmp_path):
    body = "\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)" + SLEEP
    with pytest.raises(RunError, match="rank 1 was killed by SIGKILL"):
        supervised(tmp_path, body)
    assert not any(map(alive, pids(tmp_path)))


def test_processes_that_refuse_to_end_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("msft.launch.supervise.GRACE_SECONDS", 1.0)
    body = "\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank == 1: time.sleep(0.5); sys.exit(4)" + SLEEP
    with pytest.raises(RunError, match=r"rank 1 failed \(exit code 4\)"):
        supervised(tmp_path, body)
    assert ended(pids(tmp_path))


def test_the_agent_itself_may_fail(tmp_path, capsys):
    command, layout = job(tmp_path, "")
    (tmp_path / "agent.py").write_text("raise OSError('no rendezvous')")
    with pytest.raises(RunError, match="msrun or torchrun ended with exit code 1"):
        supervise(command, layout)
    assert "OSError: no rendezvous" in capsys.readouterr().err


def test_the_agents_death_ends_its_workers(tmp_path):
    body = "\nif rank == 1: time.sleep(0.5); os.kill(int(os.environ['AGENT']), signal.SIGKILL)"
    command, layout = job(tmp_path, body + SLEEP)
    agent = tmp_path / "agent.py"
    agent.write_text("import os\nos.environ['AGENT'] = str(os.getpid())\n" + agent.read_text())
    with pytest.raises(RunError, match="msrun or torchrun ended with exit code -9"):
        supervise(command, layout)
    assert within(5, lambda: not any(map(alive, pids(tmp_path))))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_ends_everything_after_a_chance_to_save(launcher, tmp_path, number):
    body = f"""
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5 * rank)
    open("{tmp_path}/saved_" + str(rank), "w")
"""
    process, workers = launcher(body)
    time.sleep(0.5)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == (143 if number == signal.SIGTERM else 130)
    assert "interrupted: the processes have 300 s to save" in told
    assert not any(map(alive, workers))
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


def test_they_have_longer_to_save_than_torchrun_gives_and_their_words_are_shown(launcher, tmp_path):
    # torchrun and msrun end their workers on a signal; here the agent would, 1 s later.
    body = f"""
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("saving", flush=True)
    time.sleep(7)
    open("{tmp_path}/saved_" + str(rank), "w")
    sys.exit(130)
"""
    process, _ = launcher(body)
    time.sleep(0.5)
    process.terminate()
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "saving" in shown
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


def test_the_time_to_save_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("msft.launch.supervise.SAVE_SECONDS", 1.0)
    monkeypatch.setenv("TEST", str(os.getpid()))
    # The signal comes when both are deaf and known to the launcher.
    body = f"""
from glob import glob
signal.signal(signal.SIGINT, signal.SIG_IGN)
open(f"{tmp_path}/deaf_{{rank}}", "w")
while rank == 0 and len(glob("{tmp_path}/deaf_*") + glob(os.environ["{RECORDS}"] + "/*.started")) < 4:
    time.sleep(0.05)
if rank == 0: os.kill(int(os.environ['TEST']), signal.SIGTERM)
"""
    with pytest.raises(Stopped) as stopped:
        supervised(tmp_path, body + SLEEP)
    assert stopped.value.exit_code == 143
    assert ended(pids(tmp_path))


def test_processes_that_were_stopped_themselves_are_no_failure(tmp_path):
    with pytest.raises(Stopped) as stopped:
        supervised(tmp_path, "\nsys.exit(143)")
    assert stopped.value.exit_code == 143


def test_a_hangup_is_ignored_under_nohup(launcher, tmp_path):
    (tmp_path / "nohup").touch()
    process, workers = launcher("\ntime.sleep(2)")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_second_interruption_does_not_wait(launcher):
    process, workers = launcher("\nsignal.signal(signal.SIGINT, signal.SIG_IGN)" + SLEEP)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=30)
    assert time.monotonic() - began < 4
    assert within(2, lambda: not any(map(alive, workers)))


def test_nothing_is_left_when_the_launcher_is_killed(launcher):
    process, workers = launcher(SLEEP)
    below = running_below(process.pid)
    assert set(workers) < set(below)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert within(5, lambda: not any(map(alive, below)))


def test_a_worker_that_is_killed_with_all_that_belongs_to_it_is_a_failure(tmp_path):
    """The process that starts a rank and tells how it ended is gone too, so nobody writes it down."""
    body = "\nif rank == 1: time.sleep(0.5); os.kill(os.getppid(), signal.SIGKILL)" + SLEEP
    began = time.monotonic()
    with pytest.raises(RunError, match="rank 1 was killed by SIGKILL"):
        supervised(tmp_path, body, workers=3)
    assert time.monotonic() - began < 20
    assert not any(map(alive, pids(tmp_path, 3)))
