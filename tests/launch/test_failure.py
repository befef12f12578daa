"""From logs to the one error that matters."""

import signal

import pytest

from msft.launch.failure import Ended, error_lines, first, last_lines

GLOO = (
    "error: RuntimeError: [.../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:8933: Connection reset by peer."
)
MINDSPORE = """\
[ERROR] DISTRIBUTED(941,7f7f,python3):2026-11-23 [collective_ops_impl.cc:162] Ring wait receiving failed.
Traceback (most recent call last):
  File "program.py", line 8, in <module>
    y=ops.AllReduce()(x).asnumpy()
RuntimeError: Launch kernel failed, name:Default/AllReduce-op5

- C++ Call Stack: (For framework developers)
"""


@pytest.fixture
def ended(tmp_path):
    def make(name, code, time, text=""):
        log = tmp_path / f"{name}.log"
        log.write_text(text)
        return Ended(name, code, time, log)

    return make


def test_the_first_traceback_not_what_follows(ended):
    text = (
        "step 1\n[rank1]: Traceback (most recent call last):\n[rank1]:   File 'a.py', line 1, in f\n[rank1]:     f()\n"
        "[rank1]: ValueError: boom\n\nDuring handling of the above exception, another exception occurred:\n"
        "Traceback (most recent call last):\nKeyError: 1\n"
    )
    assert error_lines(ended("worker_1", 1, 0, text).log) == [
        "Traceback (most recent call last):",
        "  File 'a.py', line 1, in f",
        "    f()",
        "ValueError: boom",
    ]


def test_msfts_own_errors(ended):
    one = ended(
        "worker_0", 2, 0, "loading\nerror: X.yaml:7: seed must be a number\nTraceback (most recent call last):\n"
    )
    assert error_lines(one.log) == ["error: X.yaml:7: seed must be a number"]
    many = ended("worker_0", 2, 0, "errors:\nX.yaml:7: one\nX.yaml:8: two\n\nlater\n")
    assert error_lines(many.log) == ["errors:", "X.yaml:7: one", "X.yaml:8: two"]


def test_a_crash_in_compiled_code(ended):
    text = "Fatal Python error: Segmentation fault\n\nThread 1:\n  File 'a.py'\nExtension modules:"
    assert error_lines(ended("worker_0", -11, 0, text).log)[-1] == "  File 'a.py'"


def test_frameworks_lines_when_there_is_no_traceback_and_last_lines_when_there_is_nothing(ended):
    text = "ok\n[CRITICAL] ME(1): device is broken\nbye\n"
    assert error_lines(ended("worker_0", 1, 0, text).log) == ["[CRITICAL] ME(1): device is broken"]
    text = "".join(f"step {number}\n" for number in range(9)) + "[INFO] DISTRIBUTED(1): dispatch success!\n"
    silent = ended("worker_0", 1, 0, text)
    assert error_lines(silent.log) == []
    assert last_lines(silent.log) == [f"step {number}" for number in range(4, 9)]


def test_long_tracebacks_keep_their_head_and_end(ended):
    text = "Traceback (most recent call last):\n" + "  frame\n" * 100 + "ValueError: boom\n"
    lines = error_lines(ended("worker_0", 1, 0, text).log)
    assert len(lines) == 26 and lines[-1] == "ValueError: boom" and lines[5] == "  ... 77 lines ..."


def test_a_log_that_was_never_written(tmp_path):
    assert error_lines(tmp_path / "none.log") == last_lines(tmp_path / "none.log") == []


@pytest.mark.parametrize("consequence", [GLOO, MINDSPORE])
def test_lost_connections_are_consequences_even_when_they_end_first(ended, consequence):
    cause = ended("worker_3", 1, 12.0, "error: boom")
    assert first([ended("worker_0", 1, 11.0, consequence), cause, ended("worker_1", 1, 11.5, consequence)]) is cause


def test_a_silent_death_is_the_cause_of_lost_connections(ended):
    cause = ended("worker_1", -9, 12.0, "step 3")
    assert first([ended("worker_0", 1, 11.0, GLOO), cause]) is cause


def test_a_rank_that_was_told_to_end_is_a_consequence_unless_it_had_an_error_of_its_own(ended):
    told = ended("worker_0", -15, 11.0, "step 3")
    cause = ended("worker_1", -15, 12.0, "step 3\nerror: boom")
    assert first([told, cause, ended("worker_2", 1, 10.0, GLOO)]) is cause
    assert str(cause) == "rank 1 failed" and str(told) == "rank 0 was killed by SIGTERM"


def test_the_earliest_of_several_real_errors(ended):
    early = ended("worker_1", 1, 11.0, "error: one")
    assert first([ended("worker_0", 1, 12.0, "error: two"), early]) is early


def test_the_scheduler_is_named_only_when_it_is_alone(ended):
    scheduler = ended("scheduler", 1, 10.0, "RuntimeError: bind: Address already in use")
    worker = ended("worker_0", 1, 12.0, "error: boom")
    assert first([scheduler, worker]) is worker
    assert str(first([scheduler])) == "the scheduler failed (exit code 1)"


def test_how_a_process_ended(ended):
    assert str(ended("worker_2", 3, 0)) == "rank 2 failed (exit code 3)"
    assert str(ended("worker_2", -signal.SIGSEGV, 0)) == "rank 2 was killed by SIGSEGV"
    assert "memory runs out" in str(ended("worker_2", -signal.SIGKILL, 0))
    assert str(ended("worker_2", -64 - 1, 0)) == "rank 2 was killed by signal 65"
