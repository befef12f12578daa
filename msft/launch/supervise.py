"""Runs msrun or torchrun, and sees to it that a job ends as a whole."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from msft import console
from msft.errors import RunError, Stopped
from msft.launch import failure, worker
from msft.launch.command import Command
from msft.launch.failure import Ended
from msft.launch.follow import Follower
from msft.launch.layout import Layout

POLL_SECONDS = 0.2
# A rank that loses its connection may end before the one that failed has written down why.
SETTLE_SECONDS = 2.0
GRACE_SECONDS = 5.0
# After an interruption the processes finish their step and write a checkpoint.
SAVE_SECONDS = 300.0
# How processes end that were interrupted and have saved.
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM}


def supervise(command: Command, layout: Layout) -> None:
    """Run a job to its end, showing this machine's first rank; nothing of it is left running, whatever happens.

    Raises RunError when a process failed, after telling which was first, its error and where the logs are. An
    interruption (SIGINT, SIGTERM, SIGHUP) is passed to the processes as SIGINT, on which they finish their step and
    save; they have SAVE_SECONDS for it, or until a second interruption. msrun and torchrun are halted meanwhile:
    torchrun would kill the processes after 30 seconds, msrun at once. Raises KeyboardInterrupt then, Stopped for
    SIGTERM and when the processes have stopped on a signal that they got themselves.
    """
    for old in layout.logs:
        if old != layout.launcher_log:
            old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="msft-launch-") as folder, _interruptible():
        job = _Job(command, layout.launcher_log, Path(folder))
        follower = Follower(layout.logs[0])
        try:
            while job.running() and not job.failed():
                follower.show()
                time.sleep(POLL_SECONDS)
            failed = job.failed()
            if failed:
                time.sleep(SETTLE_SECONDS)
            follower.show()
        except KeyboardInterrupt:
            console.note(f"interrupted: the processes have {SAVE_SECONDS:.0f} s to save (again: they end at once)")
            job.end(signal.SIGINT, SAVE_SECONDS, follower.show)
            raise
        except BaseException:
            job.end(signal.SIGINT, GRACE_SECONDS, follower.show)
            raise
        job.end(signal.SIGTERM, GRACE_SECONDS, follower.show)
        # Those that were ended count as well: their logs may tell the cause.
        failed = failed and job.failed()
    if failed and {ended.code for ended in failed} <= STOPPED:
        raise Stopped(max(ended.code for ended in failed) - 128)
    if failed or job.agent_code:
        raise RunError(_report(failed, job.agent_code, layout))


class _Job:
    """The launcher process (msrun, torchrun), and what its workers have written down about themselves."""

    def __init__(self, command: Command, log: Path, records: Path):
        self.records = records
        self.log_dir = log.parent
        self.agent_code: int | None = None
        with log.open("ab") as file:
            self.agent = subprocess.Popen(
                command.words,
                env=command.environment() | {worker.RECORDS: str(records)},
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

    def failed(self) -> list[Ended]:
        """The processes that have failed so far."""
        return [ended for ended in self._ended() if ended.code]

    def _ended(self) -> list[Ended]:
        found = []
        for file in self.records.glob("*.ended"):
            code, moment = file.read_text().split()
            found.append(Ended(file.stem, int(code), float(moment), self.log_dir / f"{file.stem}.log"))
        return found

    def end(self, number: signal.Signals, seconds: float, meanwhile: Callable[[], None]) -> None:
        """End everything: the workers get a signal and some seconds, then all that is left is killed.

        `meanwhile` is called again and again while they end.
        """
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


class _interruptible:
    """Inside, SIGTERM (as `Stopped`) and SIGHUP interrupt like Ctrl-C does, unless they are ignored (nohup)."""

    def __enter__(self) -> None:
        handlers = {signal.SIGTERM: _stop, signal.SIGHUP: signal.default_int_handler}
        before = {number: signal.getsignal(number) for number in handlers}
        self.before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
        for number in self.before:
            signal.signal(number, handlers[number])

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _stop(number: int, frame) -> None:
    raise Stopped(number)


def _report(failed: list[Ended], agent_code: int | None, layout: Layout) -> str:
    """Tell the first error and all logs; returns the message of the whole."""
    if failed:
        ended = failure.first(failed)
        what, log = str(ended), ended.log
    else:
        what, log = f"msrun or torchrun ended with exit code {agent_code}", layout.launcher_log
    console.note(f"{what}; {log} says:")
    for line in failure.error_lines(log) or failure.last_lines(log):
        console.note(f"  {line}")
    console.note(f"logs: {' '.join(str(path) for path in layout.logs if path.exists())}")
    return f"{what}; all other processes on this machine were ended"
