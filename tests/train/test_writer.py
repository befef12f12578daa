"""Writing in the background: one write at a time, the run goes on meanwhile, no error and no write is lost."""

import threading
import time

import pytest

from msft.errors import RunError, Stopped
from msft.train.writer import Writer


def test_the_caller_goes_on_while_it_is_written():
    release, written = threading.Event(), []
    with Writer(background=True) as writer:
        writer.start(lambda: release.wait(10) and written.append(1))
        assert not written
        release.set()
    assert written == [1]


def test_in_the_foreground_it_is_written_at_once():
    written = []
    with Writer(background=False) as writer:
        writer.start(lambda: written.append(threading.current_thread()))
        assert written == [threading.main_thread()]


def test_the_next_write_waits_for_the_one_before():
    running, most = [], []

    def write():
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()

    with Writer(background=True) as writer:
        for _ in range(4):
            writer.start(write)
    assert most == [1, 1, 1, 1]


def fail():
    raise RunError("disk is full")


def test_an_error_comes_up_at_the_next_write_and_once():
    with Writer(background=True) as writer:
        writer.start(fail)
        with pytest.raises(RunError, match="disk is full"):
            writer.start(lambda: None)


def test_an_error_of_the_last_write_comes_up_at_the_end():
    with pytest.raises(RunError, match="disk is full"), Writer(background=True) as writer:
        writer.start(fail)


def test_a_fault_becomes_a_run_error():
    with pytest.raises(RunError, match="ZeroDivisionError: division by zero"), Writer(background=True) as writer:
        writer.start(lambda: 1 / 0)


@pytest.mark.parametrize("end", [RunError, KeyboardInterrupt])
def test_it_is_waited_for_when_the_run_fails_or_is_interrupted(end):
    written = []
    with pytest.raises(end), Writer(background=True) as writer:
        writer.start(lambda: time.sleep(0.2) or written.append(1))
        raise end("x")
    assert written == [1]


def test_the_runs_own_error_comes_first_and_the_writes_is_said(capsys):
    with pytest.raises(RunError, match="diverged"), Writer(background=True) as writer:
        writer.start(fail)
        raise RunError("diverged")
    assert "warning: disk is full" in capsys.readouterr().err


def test_a_second_signal_does_not_wait():
    release = threading.Event()
    began = time.monotonic()
    with pytest.raises(Stopped), Writer(background=True) as writer:
        writer.start(lambda: release.wait(10))
        raise Stopped(15)
    assert time.monotonic() - began < 5
    release.set()
