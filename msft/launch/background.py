"""Going on behind the shell's back."""

import os
import sys
from pathlib import Path


def detach(log: Path) -> int | None:
    """Split off a process that outlives the shell: its id where this is still the old one, None in the new one.

    The new process leads a session of its own, and writes to `log` alone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    os.setsid()
    with open(os.devnull, "rb") as nothing, log.open("ab") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return None
