"""How far a process is, told to the launcher that watches it; and its Python stacks, when the launcher asks.

A process overwrites one short record in the launcher's folder; without a launcher it does nothing.
"""

import faulthandler
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from msft.launch import RECORDS, rank_name

# On it a process writes the stacks of all its threads to its log.
SHOW_STACKS = signal.SIGUSR1
_LENGTH = 80

_descriptor: int | None = None
_count = 0


@dataclass(frozen=True)
class Beat:
    """A process's last sign: its id, how many signs it has given, the step it is in, and what it does there.

    `patient` says that this may take longer than a step: starting, a first step (compilation), saving.
    """

    pid: int
    count: int
    step: int
    patient: bool
    doing: str


def start() -> None:
    """Begin to give signs, if a launcher watches, and to show the stacks when it asks for them."""
    global _descriptor
    folder = os.environ.get(RECORDS)
    if not folder or not os.path.isdir(folder):
        return
    faulthandler.register(SHOW_STACKS, all_threads=True)
    _descriptor = os.open(Path(folder, f"{rank_name()}.beat"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    beat(0, "starting", patient=True)


def beat(step: int, doing: str, patient: bool = False) -> None:
    """Give a sign: this process is in optimizer step `step` (from 1) and does `doing`."""
    global _count
    if _descriptor is None:
        return
    _count += 1
    text = f"{os.getpid()} {_count} {step} {int(patient)} {doing}"
    # One system call that overwrites the same bytes: no file is opened, and a reader needs no clock to see a change.
    os.pwrite(_descriptor, text.encode()[: _LENGTH - 1].ljust(_LENGTH - 1) + b"\n", 0)


def read(records: Path) -> dict[int, Beat]:
    """Return the last sign of each rank that has given one."""
    found = {}
    for file in records.glob("worker_*.beat"):
        words = file.read_text().split(maxsplit=4)
        if len(words) == 5:
            pid, count, step, patient = map(int, words[:4])
            found[int(file.stem.removeprefix("worker_"))] = Beat(pid, count, step, bool(patient), words[4].strip())
    return found
