"""This machine's part of a job: msrun or torchrun, and what its processes have written down about themselves."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from msft.launch import RECORDS, heartbeat, worker
from msft.launch.command import Command
from msft.launch.failure import AGENT, Ended
from msft.launch.heartbeat import Beat

POLL_SECONDS = 0.2


class Job:
    """A running msrun or torchrun; `agent_code` is its exit code once it has ended."""

    def __init__(self, command: Command, log: Path, records: Path):
        self.records, self.log = records, log
        self.agent_code: int | None = None
        self.vanished: dict[str, Ended] = {}
        self.ending = False
        with log.open("ab") as file:
            self.agent = subprocess.Popen(
                command.words,
                env=command.environment() | {RECORDS: str(records)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Both msrun and torchrun end their workers on SIGINT: so they do when this process is killed.
                preexec_fn=worker.die_with_parent(signal.SIGINT),
            )

    def running(self) -> bool:
        """Whether msrun or torchrun is still there."""
        self.agent_code = self.agent.poll()
        return self.agent_code is None

    def beats(self) -> dict[int, Beat]:
        """The last sign of each of this machine's ranks."""
        return heartbeat.read(self.records)

    def failed(self) -> list[Ended]:
        """The processes that have failed so far; msrun or torchrun itself last."""
        if not self.ending:
            self._see_vanished()
        failed = [ended for ended in [*self._ended(), *self.vanished.values()] if ended.code]
        if self.agent_code:
            failed.append(Ended(AGENT, self.agent_code, time.monotonic(), self.log))
        return failed

    def _ended(self) -> list[Ended]:
        found = []
        for file in self.records.glob("*.ended"):
            code, moment = file.read_text().split()
            found.append(Ended(file.stem, int(code), float(moment), self._log(file.stem)))
        return found

    def _see_vanished(self) -> None:
        """Take down those that were killed before they could write down how they ended."""
        started = list(self.records.glob("*.started"))
        gone = [file for file in started if not _exists(int(file.read_text()))]
        gone = [file.stem for file in gone if not file.with_suffix(".ended").exists()]
        # When msrun or torchrun was killed, its workers went with it.
        if not self.running() and self.agent_code < 0:
            return
        for name in gone:
            self.vanished.setdefault(name, Ended(name, -signal.SIGKILL, time.monotonic(), self._log(name)))

    def _log(self, name: str) -> Path:
        return self.log.parent / f"{name}.log"

    def end(self, number: signal.Signals, seconds: float, meanwhile: Callable[[], None]) -> None:
        """End everything: the workers get a signal and some seconds, then all that is left is killed.

        `meanwhile` is called again and again while they end.
        """
        self.ending = True
        try:
            if self.agent.poll() is None and self.agent.pid not in self._open_groups():
                # Stopped, it can neither start another worker nor kill those that are about to end by themselves.
                self.agent.send_signal(signal.SIGSTOP)
            self._send(number)
            deadline = time.monotonic() + seconds
            while self._open_groups() and time.monotonic() < deadline:
                meanwhile()
                time.sleep(POLL_SECONDS)
        finally:
            self._send(signal.SIGKILL)
            if self.agent.poll() is None:
                _signal(self.agent.pid, signal.SIGKILL)
                self.agent.wait()
            meanwhile()

    def _open_groups(self) -> list[int]:
        """The process groups of the workers that have not ended (MindSpore's scheduler is in the agent's group)."""
        started = self.records.glob("*.started")
        groups = [int(file.read_text()) for file in started if not file.with_suffix(".ended").exists()]
        return [group for group in groups if _signal(group, 0)]

    def _send(self, number: signal.Signals) -> None:
        for group in self._open_groups():
            _signal(group, number)


def _signal(group: int, number: int) -> bool:
    """Send a signal (0: none) to a process group; returns whether there is one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _exists(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not, where /proc tells."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        return not Path("/proc/self/stat").exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
