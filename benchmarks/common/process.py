"""One command as a process of its own: how long it took and how much memory it and its children held."""

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

THREADS = 2
KILO = 1024


@dataclass(frozen=True)
class Ran:
    """A finished process: wall seconds, peak resident bytes of its whole tree, exit code, what it printed."""

    seconds: float
    peak: int
    code: int
    out: str
    err: str


class Failed(Exception):
    """A measured command ended with another exit code than expected; the message ends with what it printed."""


def run(
    command: Sequence[str | os.PathLike],
    *,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    interval: float = 0.05,
    expect: int | None = 0,
) -> Ran:
    """Run a command to its end, reading its memory every `interval` seconds.

    Every measured program gets the same number of threads. Raises Failed for an exit code other than `expect`
    (None: any).
    """
    variables = {**os.environ, **threads(), **(environment or {})}
    # Files, not pipes: nothing has to be read while the clock runs.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err, env=variables, cwd=folder)
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, tree_bytes(process.pid))
                time.sleep(interval)
        finally:
            process.kill()
        seconds = time.perf_counter() - began
        out.seek(0)
        err.seek(0)
        ran = Ran(seconds, peak, process.returncode, out.read(), err.read())
    if expect is not None and ran.code != expect:
        raise Failed(f"{' '.join(map(str, command))}\nended with {ran.code}\n{ran.out[-2000:]}\n{ran.err[-4000:]}")
    return ran


def threads() -> dict[str, str]:
    """Return the environment variables that give every library the same number of threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return dict.fromkeys(names, str(THREADS))


def tree_bytes(pid: int) -> int:
    """Return the resident bytes of a process and its descendants; 0 when it is gone.

    The process itself counts with its own high-water mark, which misses nothing between two looks; descendants count
    with what they hold now. Pages that processes share are counted in each.
    """
    own = _status_bytes(pid, "VmHWM:")
    return own + sum(_status_bytes(child, "VmRSS:") for child in descendants(pid))


def descendants(pid: int) -> list[int]:
    """Return the process ids of all children, their children and so on."""
    found, waiting = [], [pid]
    while waiting:
        children = _children(waiting.pop())
        found += children
        waiting += children
    return found


def _children(pid: int) -> list[int]:
    children = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            children += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        return children
    return children


def _status_bytes(pid: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * KILO for line in lines if line.startswith(field)), 0)
