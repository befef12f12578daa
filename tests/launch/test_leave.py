"""Protects the end of a launched process: its exit code and its last words, whatever its teardown would do."""

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = (
    "import atexit, os; atexit.register(os.abort); print('written'); from msft.launch.leave import leave; leave({})"
)


def end(code, **variables):
    alone = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = [sys.executable, "-c", PROGRAM.format(code)]
    return subprocess.run(command, env={**alone, **variables}, capture_output=True, text=True)


@pytest.mark.parametrize("code", [0, 2])
def test_a_rank_of_torchrun_ends_before_its_teardown(code):
    done = end(code, RANK="1")
    assert (done.returncode, done.stdout) == (code, "written\n")


def test_any_other_process_is_taken_down_as_ever():
    assert end(0).returncode == -signal.SIGABRT
