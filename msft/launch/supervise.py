"""Runs msrun or torchrun, and sees to it that a job ends as a whole."""

import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path

from msft import console
from msft.errors import Stopped
from msft.launch import hang, report
from msft.launch.command import Command
from msft.launch.failure import AGENT, Ended, is_consequence
from msft.launch.follow import Follower
from msft.launch.hang import Place, Watch
from msft.launch.heartbeat import Beat
from msft.launch.job import POLL_SECONDS, Job
from msft.launch.layout import Layout
from msft.launch.machines import Machines

# A rank that loses its connection may end before the one that failed has written down why.
SETTLE_SECONDS = 2.0
GRACE_SECONDS = 5.0
# After an interruption the processes finish their step and write a checkpoint.
SAVE_SECONDS = 300.0
# How processes end that were interrupted and have saved.
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM}


def supervise(command: Command, layout: Layout, hang_timeout: float = 0, machines: Machines | None = None) -> None:
    """Run a job to its end, showing this machine's first rank; nothing of it is left running, whatever happens.

    Raises JobFailed when a process failed on any machine, when no rank moved for `hang_timeout` seconds (0: that is
    not watched), or when a machine was lost, after telling which was first, its error and where the logs are. An
    interruption (SIGINT, SIGTERM, SIGHUP) is passed to the processes as SIGINT, on which they finish their step and
    save; they have SAVE_SECONDS for it, or until a second interruption. msrun and torchrun are halted meanwhile:
    torchrun would kill the processes after 30 seconds, msrun at once. Raises KeyboardInterrupt then, Stopped for
    SIGTERM and when the processes have stopped on a signal that they got themselves.
    """
    for old in layout.logs:
        if old != layout.launcher_log:
            old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="msft-launch-") as folder, _interruptible():
        job = Job(command, layout.launcher_log, Path(folder))
        _Supervisor(job, layout, hang_timeout, machines or Machines(layout, 0)).run()


class _Supervisor:
    """One attempt of a job, seen from this machine."""

    def __init__(self, job: Job, layout: Layout, hang_timeout: float, machines: Machines):
        self.job, self.layout, self.machines = job, layout, machines
        self.hang_timeout = hang_timeout
        self.follower = Follower(layout.logs[0])

    def run(self) -> None:
        """See `supervise`."""
        try:
            places = self._until_trouble()
            lost = self.machines.lost()
            troubled = bool(self._failed())
            if troubled:
                self._wait(SETTLE_SECONDS, lambda: False)
        except KeyboardInterrupt:
            console.note(f"interrupted: the processes have {SAVE_SECONDS:.0f} s to save (again: they end at once)")
            self.job.end(signal.SIGINT, SAVE_SECONDS, self._tick)
            raise
        except BaseException:
            self.job.end(signal.SIGINT, GRACE_SECONDS, self._tick)
            raise
        self.job.end(signal.SIGTERM, GRACE_SECONDS, self._tick)
        self.machines.tell(ended=True)
        if places or lost or troubled:
            # Those that were ended count as well, on all machines: their logs may tell the cause.
            self._wait(SETTLE_SECONDS + GRACE_SECONDS, lambda: bool(self.machines.lost()) or self._all("ended"))
            self._judge(places, lost)

    def _judge(self, places: Mapping[int, Place], lost: str) -> None:
        """Raise what the job has come to."""
        error = self._error(places, lost)
        error.began = any(beat.step > 0 for beat in self._beats().values())
        raise error

    def _error(self, places: Mapping[int, Place], lost: str) -> report.JobFailed:
        failed, logs = self._failed(), self._logs()
        ranks = {ended.code for ended in failed if ended.name != AGENT}
        if places:
            return report.stuck(self.hang_timeout, places, logs)
        if ranks and ranks <= STOPPED:
            raise Stopped(max(ranks) - 128)
        if lost and all(is_consequence(ended) or ended.name == AGENT for ended in failed):
            return report.lost(lost, failed, logs)
        return report.failed(failed, logs)

    def _until_trouble(self) -> dict[int, Place]:
        """Wait until the job is done everywhere, a process has failed, a machine is lost or nothing moves.

        Returns where the ranks of all machines stand when nothing moves.
        """
        watch = Watch(self.hang_timeout)
        while True:
            running = self.job.running()
            self._tick()
            if self._failed() or self.machines.lost():
                return {}
            self.machines.tell(done=not running)
            if not running and self._all("done"):
                return {}
            if watch.stalled(self._beats()) or any("places" in state for state in self.machines.others().values()):
                return self._places()
            time.sleep(POLL_SECONDS)

    def _tick(self) -> None:
        """Show what is new and tell the other machines."""
        self.follower.show()
        if self.layout.nodes > 1:
            beats = {rank: astuple(beat) for rank, beat in self.job.beats().items()}
            logs = [str(path.absolute()) for path in self.layout.logs if path.exists()]
            self.machines.tell(beats=beats, failed=report.to_wire(self.job.failed()), logs=logs)

    def _wait(self, seconds: float, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not condition():
            self._tick()
            time.sleep(POLL_SECONDS)
        self._tick()

    def _all(self, key: str) -> bool:
        """Whether all other machines say so."""
        others = self.machines.others()
        return len(others) == self.layout.nodes - 1 and all(state.get(key) for state in others.values())

    def _beats(self) -> dict[int, Beat]:
        """The last sign of every rank of the job."""
        others = [state.get("beats", {}) for state in self.machines.others().values()]
        told = {int(rank): Beat(*values) for beats in others for rank, values in beats.items()}
        return told | self.job.beats()

    def _failed(self) -> list[Ended]:
        """The processes of all machines that have failed so far."""
        found = self.job.failed()
        for node, state in self.machines.others().items():
            found += report.from_wire(f"machine {node} ({state['host']})", state.get("failed", []))
        return found

    def _logs(self) -> dict[str, list[str]]:
        """The logs that there are, by machine ("" = this one)."""
        own = [str(path) for path in self.layout.logs if path.exists()]
        others = sorted(self.machines.others().items())
        return {"": own} | {f"machine {node} ({state['host']})": state.get("logs", []) for node, state in others}

    def _places(self) -> dict[int, Place]:
        """Have all ranks of all machines write down their stacks; returns where they stand."""
        own = hang.places(self.job, lambda rank: self.layout.log_dir / f"worker_{rank}.log", self._tick)
        self.machines.tell(places=own)
        seconds = SETTLE_SECONDS + hang.STACK_SECONDS
        told = lambda: all("places" in state for state in self.machines.others().values())  # noqa: E731
        self._wait(seconds, told)
        others = [state.get("places", {}) for state in self.machines.others().values()]
        return {int(rank): Place(*values) for places in others for rank, values in places.items()} | own


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
