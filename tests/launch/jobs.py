"""Small jobs of real processes: an agent that starts workers as torchrun and msrun do, and programs for them."""

import fcntl
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from msft.launch.command import Command
from msft.launch.layout import Layout

ROOT = Path(__file__).parents[2]

# As torchrun and msrun do: every worker in a session of its own; on a failure, no hurry to end the others.
AGENT = """
import os, subprocess, sys
log_dir, count, program, first = sys.argv[1:]
def start(rank):
    words = [sys.executable, "-m", "msft.launch.worker", log_dir, program]
    return subprocess.Popen(words, env={**os.environ, "RANK": str(rank)}, start_new_session=True)
workers = [start(int(first) + rank) for rank in range(int(count))]
sys.exit(max(worker.wait() for worker in workers))
"""

PREFACE = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
open(f"{os.path.dirname(sys.argv[0])}/pid_{rank}", "w").write(str(os.getpid()))
"""


def job(folder: Path, body: str, workers: int = 2, **layout) -> tuple[Command, Layout]:
    """A job whose workers run `body`, which knows `rank`; their process ids are left in `folder`.

    `layout` are more settings of a Layout.
    """
    (folder / "agent.py").write_text(AGENT)
    (folder / "program.py").write_text(PREFACE + body)
    layout = Layout(**{"workers": workers, "local_workers": workers, "log_dir": folder / "logs"} | layout)
    layout.log_dir.mkdir(exist_ok=True)
    variables = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    words = (str(folder / "agent.py"), str(layout.log_dir), str(layout.local_workers), str(folder / "program.py"))
    return Command((sys.executable, *words, str(layout.ranks[0])), variables), layout


def pids(folder: Path, workers: int = 2) -> list[int]:
    """The process ids of all workers, once they are there."""
    files = [folder / f"pid_{rank}" for rank in range(workers)]
    assert within(30, lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def alive(pid: int) -> bool:
    """Whether a process runs; one that is only waiting to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def running_below(pid: int) -> list[int]:
    """The processes that descend from one."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [found for child in children for found in (int(child), *running_below(int(child)))]


def ended(pids: list[int]) -> bool:
    """Whether processes are gone, or go at once: a SIGKILL that was sent takes a moment."""
    return within(2, lambda: not any(map(alive, pids)))


@contextmanager
def alone():
    """Inside, no other test runs a job of several processes: two that start at once would take the same port."""
    with open(__file__) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def within(seconds: float, condition) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def environment(**variables: str) -> dict[str, str]:
    """The environment of a launcher in a test: this one, as a user's shell has it."""
    return {**os.environ, **variables}
