"""Which process failed first, and what it said."""

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# msrun or torchrun, in place of a rank's name.
AGENT = "agent"
MAX_LINES = 25
LAST_LINES = 5

_RANK = re.compile(r"^\[rank\d+\]: ?")
_BEGINNING = re.compile(r"Traceback \(most recent call last\)|errors?: |errors:$|Fatal Python error")
_FRAMEWORK = re.compile(r"\[(ERROR|CRITICAL)\]|\b\w*Error: ")
# What a process says when another one is gone.
_CONSEQUENCE = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|timed out node|Launch kernel failed, name:\S*(AllReduce|AllGather)"
    r"|wait (sending|receiving)|DistBackendError|DistNetworkError|DistStoreError|gloo::|HcclError|heartbeat",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Ended:
    """How a process ended: worker_K, scheduler or agent, its exit code (negative: a signal), when, its log.

    `time` is this machine's monotonic clock, which all its processes share. A process of another machine has that
    machine's name, and the lines of its log that were told: its error's, and the last ones.
    """

    name: str
    code: int
    time: float
    log: Path
    machine: str = ""
    told: tuple[list[str], list[str]] | None = None

    def error(self) -> list[str]:
        """See `error_lines`."""
        return error_lines(self.log) if self.told is None else self.told[0]

    def last(self) -> list[str]:
        """See `last_lines`."""
        return last_lines(self.log) if self.told is None else self.told[1]

    def __str__(self) -> str:
        where = f" on {self.machine}" if self.machine else ""
        if self.name == AGENT:
            return f"msrun or torchrun{where} ended with exit code {self.code}"
        who = "the scheduler" if self.name == "scheduler" else f"rank {self.name.removeprefix('worker_')}"
        who += where
        if self.code >= 0:
            return f"{who} failed (exit code {self.code})"
        if self.code == -signal.SIGTERM and self.error():
            # torchrun ended it because of another one's failure, while it was going down with its own.
            return f"{who} failed"
        known = self.code in {-number for number in signal.Signals}
        how = signal.Signals(-self.code).name if known else f"signal {-self.code}"
        hint = ", as the kernel does when memory runs out" if self.code == -signal.SIGKILL else ""
        return f"{who} was killed by {how}{hint}"


def first(failed: Iterable[Ended]) -> Ended:
    """Return the failure that caused the others; scheduler and agent only fail after the workers, or all alone."""
    later = {"scheduler": 1, AGENT: 2}
    return min(failed, key=lambda ended: (later.get(ended.name, 0), is_consequence(ended), ended.time))


def is_consequence(ended: Ended) -> bool:
    """Whether a process only failed because another one was gone: it lost a connection, or was told to end."""
    lines = ended.error()
    return any(_CONSEQUENCE.search(line) for line in lines) if lines else ended.code == -signal.SIGTERM


def error_lines(log: Path) -> list[str]:
    """Return the first error in a log: a traceback, or msft's own `error:`, else the first line that looks like one.

    Long tracebacks keep their head and their end. A log without an error gives an empty list.
    """
    lines = _lines(log)
    for pattern in (_BEGINNING, _FRAMEWORK):
        start = next((number for number, line in enumerate(lines) if pattern.match(line)), None)
        if start is not None:
            return _shortened(_block(lines[start:]))
    return []


def last_lines(log: Path) -> list[str]:
    """Return the end of a log."""
    return _lines(log)[-LAST_LINES:]


def _lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return [_RANK.sub("", line) for line in text.splitlines() if not line.startswith("[INFO]")]


def _block(lines: list[str]) -> list[str]:
    """An error from its first line: a traceback goes on to the line that names the exception."""
    if lines[0].startswith("Traceback"):
        return lines[: 1 + _first(lines, lambda line: line and not line[0].isspace())]
    if lines[0].startswith("Fatal Python error"):
        return lines[: _first(lines, lambda line: line.startswith("Extension modules"))]
    return lines[: _first(lines, lambda line: not line)] if lines[0] == "errors:" else lines[:1]


def _first(lines: list[str], wanted) -> int:
    """The number of the first line after the zeroth that is wanted, or how many lines there are."""
    return next((number for number, line in enumerate(lines[1:], 1) if wanted(line)), len(lines))


def _shortened(lines: list[str]) -> list[str]:
    if len(lines) <= MAX_LINES:
        return lines
    left_out = len(lines) - MAX_LINES
    return [*lines[:5], f"  ... {left_out} lines ...", *lines[5 + left_out :]]
