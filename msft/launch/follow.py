"""Showing a log while it grows."""

import sys
from pathlib import Path

# MindSpore says this of its own connections when a process ends, at any log level.
_NOISE = b"[INFO] DISTRIBUTED("


class Follower:
    """Copies the lines that are added to a file to standard output, as the bytes they are."""

    def __init__(self, path: Path):
        self.path, self.position = path, 0

    def show(self) -> None:
        """Show the whole lines that are new."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self.position += len(new)
        for line in new.splitlines(keepends=True):
            if not line.startswith(_NOISE):
                sys.stdout.buffer.write(line)
        sys.stdout.flush()
