"""Protects the binding of MindSpore's computing threads: one core each, ranks left alone, and said in the report."""

import os
import subprocess
import sys
from pathlib import Path

from msft.backend.contract import Runtime
from msft.backend.mindspore import device
from msft.backend.mindspore.device import bind_threads


def computing_threads():
    tasks = Path("/proc/self/task").glob("*")
    return [int(task.name) for task in tasks if (task / "comm").read_text().startswith(("ActorThread", "KernelThread"))]


def test_threads_get_a_core_each_or_stay_free(monkeypatch):
    monkeypatch.setattr(device, "_first_of_its_user", lambda: True)
    said = bind_threads(Runtime())
    threads, cores = computing_threads(), os.sched_getaffinity(0)
    bound = [os.sched_getaffinity(thread) for thread in threads]
    if len(threads) > len(cores):
        assert said == f"not bound to cores ({len(threads)} found, {len(cores)} cores)"
    else:
        assert said == f"{len(threads)}, bound to a core each"
        assert all(len(own) == 1 for own in bound) and len(set.union(*bound)) == len(threads)
    assert os.sched_getaffinity(0) == cores


def test_ranks_and_other_devices_are_left_as_they_are():
    assert bind_threads(Runtime(parallel=True)) == "not bound to cores"
    assert bind_threads(Runtime(device="npu")) == "not bound to cores"


def test_a_second_process_leaves_its_threads_free(monkeypatch, tmp_path):
    """Both would take the same cores; the first one's end frees them."""
    monkeypatch.setattr(device.tempfile, "gettempdir", lambda: str(tmp_path))
    code = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}; from msft.backend.mindspore import device; "
    command = [sys.executable, "-c", code + "print(device._first_of_its_user(), flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        monkeypatch.setattr(device, "_first_of_its_user", device._first_of_its_user.__wrapped__)
        assert bind_threads(Runtime()).startswith("not bound to cores")
        other.communicate("\n")
    assert device._first_of_its_user()
