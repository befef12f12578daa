"""Runs one process of a job: its output goes to its log, and how it ended is written down for the launcher.

msrun and torchrun start `python -m msft.launch.worker LOG_DIR PROGRAM ...` once for each rank.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from msft.files import write_text
from msft.launch import RECORDS, rank_name

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals) -> Callable[[], None]:
    """Return a function for a new process to call, so that it gets a signal when its parent ends (Linux)."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    return lambda: prctl and prctl(_PR_SET_PDEATHSIG, int(number))


def main() -> int:
    """Run the program until it ends; returns its exit code, 128 + the signal's number when it was killed."""
    log_dir, *command = sys.argv[1:]
    die_with_parent(signal.SIGKILL)()
    # The program is in the same process group and gets these itself; this process stays to tell how it ended.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    environment = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **os.environ}
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(log_dir, f"{rank_name()}.log"), "ab") as log:
        child = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
    _record("started", str(os.getpid()))
    code = child.wait()
    _record("ended", f"{code} {time.monotonic()}")
    return code if code >= 0 else 128 - code


def _record(what: str, text: str) -> None:
    folder = os.environ.get(RECORDS)
    if folder and os.path.isdir(folder):
        write_text(Path(folder, f"{rank_name()}.{what}"), text)


if __name__ == "__main__":
    sys.exit(main())
