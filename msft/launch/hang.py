"""A job in which nothing moves any more: seeing it, and where each rank stands."""

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from msft.launch import heartbeat
from msft.launch.heartbeat import Beat
from msft.launch.job import POLL_SECONDS, Job

# How much longer than a step starting, a first step (compilation) and saving may take.
PATIENCE = 3
STACK_SECONDS = 3.0

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+ .*\(most recent call first\):$", re.MULTILINE)
_FRAME = re.compile(r'^ +File "(.*)", line (\d+) in (\S+)$', re.MULTILINE)
# In these a rank waits for the others; msft's are the same file on both engines.
_WAITING = re.compile(r"msft/backend/\w+/distributed\.py$")


class Place(NamedTuple):
    """Where a rank stands: its step, what it does there, the innermost line of its main thread's Python stack ("" when
    it showed none), and whether it only waits for the other ranks."""

    step: int
    doing: str
    line: str
    waiting: bool


class Watch:
    """Notices that no rank has given a sign for `limit` seconds (0: never) of this machine's own clock."""

    def __init__(self, limit: float):
        self.limit = limit
        self.beats: Mapping[int, Beat] = {}
        self.since = time.monotonic()

    def stalled(self, beats: Mapping[int, Beat]) -> bool:
        """Take the last sign of each rank; returns whether all have been silent for too long."""
        if beats != self.beats:
            self.beats, self.since = dict(beats), time.monotonic()
        if not self.limit or not beats:
            return False
        patience = PATIENCE if any(beat.patient for beat in beats.values()) else 1
        return time.monotonic() - self.since > self.limit * patience


def places(job: Job, log: Callable[[int], Path], meanwhile: Callable[[], None]) -> dict[int, Place]:
    """Have this machine's ranks write the stacks of all their threads to their logs; returns where they stand."""
    beats = job.beats()
    sizes = {rank: log(rank).stat().st_size for rank in beats}
    for beat in beats.values():
        _ask(beat.pid)
    deadline = time.monotonic() + STACK_SECONDS
    found = {}
    while len(found) < len(beats) and time.monotonic() < deadline:
        meanwhile()
        time.sleep(POLL_SECONDS)
        new = {rank: log(rank).read_bytes()[size:].decode(errors="replace") for rank, size in sizes.items()}
        found = {rank: frames for rank, text in new.items() if (frames := main_stack(text))}
    return {rank: _place(beat, found.get(rank, [])) for rank, beat in beats.items()}


def _ask(pid: int) -> None:
    try:
        os.kill(pid, heartbeat.SHOW_STACKS)
    except ProcessLookupError:
        pass


def main_stack(text: str) -> list[tuple[str, str, str]]:
    """Return the frames (file, line, function) of the main thread, innermost first, in what faulthandler wrote.

    It writes the newest thread first, so the main thread is the last.
    """
    heads = list(_THREAD.finditer(text))
    return _FRAME.findall(text[heads[-1].end() :]) if heads else []


def _place(beat: Beat, frames: list[tuple[str, str, str]]) -> Place:
    line = 'File "{}", line {} in {}'.format(*frames[0]) if frames else ""
    return Place(beat.step, beat.doing, line, any(_WAITING.search(file) for file, _, _ in frames))


def behind(found: Mapping[int, Place]) -> dict[int, Place]:
    """Return the ranks that hold the others up: of those that do not wait for others (of all, if all do) the ones in
    the earliest step."""
    active = {rank: place for rank, place in found.items() if not place.waiting} or found
    earliest = min((place.step for place in active.values()), default=0)
    return {rank: place for rank, place in sorted(active.items()) if place.step == earliest}
