"""What a launcher says when its job has failed."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from msft import console
from msft.errors import RunError
from msft.launch import failure, hang
from msft.launch.failure import Ended
from msft.launch.hang import Place


class JobFailed(RunError):
    """A job of which a process failed or hung, or a machine was lost.

    `again` says whether a new start may help, `began` whether the job came to train (set by the supervisor).
    """

    def __init__(self, message: str, again: bool):
        self.again = again
        self.began = False
        super().__init__(message)


def to_wire(failed: Sequence[Ended]) -> list[dict]:
    """Return failed processes as another machine is told of them: with ages in place of this machine's times."""
    now = time.monotonic()
    return [
        {"name": e.name, "code": e.code, "age": now - e.time, "log": str(e.log), "told": [e.error(), e.last()]}
        for e in failed
    ]


def from_wire(machine: str, failed: Sequence[dict]) -> list[Ended]:
    """Return the failed processes that another machine tells of, their times as this machine's clock would have it."""
    now = time.monotonic()
    return [
        Ended(f["name"], f["code"], now - f["age"], Path(f["log"]), machine, (f["told"][0], f["told"][1]))
        for f in failed
    ]


def failed(processes: Sequence[Ended], logs: Mapping[str, Sequence[str]]) -> JobFailed:
    """Tell the first failure's error and the paths of all logs (by machine, "" = this one); returns the exception."""
    ended = failure.first(processes)
    _tell(str(ended), ended, logs)
    # What is wrong with the recipe or its files does not heal.
    return JobFailed(f"{ended}; {_ended(logs)}", again=ended.code != 2)


def lost(machine: str, processes: Sequence[Ended], logs: Mapping[str, Sequence[str]]) -> JobFailed:
    """Tell that a machine is gone, and the paths of the logs; `processes` failed as a consequence."""
    console.note(f"{machine}; " + (f"then {failure.first(processes)}" if processes else "no process had failed"))
    _tell_logs(logs)
    return JobFailed(f"{machine}; {_ended(logs)}", again=True)


def stuck(seconds: float, places: Mapping[int, Place], logs: Mapping[str, Sequence[str]]) -> JobFailed:
    """Tell where each rank stood when nothing moved any more, and the paths of the logs."""
    behind = hang.behind(places)
    for rank, place in sorted(places.items()):
        waits = " (waits for the others)" if place.waiting and rank not in behind else ""
        console.note(f"rank {rank}: step {place.step}, {place.doing}{waits}: {place.line or 'showed no Python stack'}")
    _tell_logs(logs, "logs, with the stacks of all threads")
    who = "; ".join(
        f"rank {rank} is behind in step {place.step}, {place.doing}: {place.line or 'it showed no Python stack'}"
        for rank, place in behind.items()
    )
    message = f"no progress of any rank for {seconds:g} s (hang_timeout): {who}"
    return JobFailed(f"{message}; {_ended(logs)}", again=True)


def _tell(what: str, ended: Ended, logs: Mapping[str, Sequence[str]]) -> None:
    console.note(f"{what}; {ended.log} says:")
    for line in ended.error() or ended.last():
        console.note(f"  {line}")
    _tell_logs(logs)


def _tell_logs(logs: Mapping[str, Sequence[str]], what: str = "logs") -> None:
    for machine, paths in logs.items():
        console.note(f"{what}{f' on {machine}' if machine else ''}: {' '.join(paths)}")


def _ended(logs: Mapping[str, Sequence[str]]) -> str:
    return "all other processes " + ("on this machine were ended" if len(logs) == 1 else "on all machines were ended")
