"""Starting a job again after a failure, until it comes to its end or gets no further."""

import shutil
from collections.abc import Callable
from pathlib import Path

from msft import console
from msft.errors import RunError
from msft.launch.layout import Layout
from msft.launch.report import JobFailed


def run(attempt: Callable[[bool], None], newest: Callable[[], int], max_restarts: int, layout: Layout) -> None:
    """Call `attempt(resume)` until it succeeds; after `max_restarts` restarts in a row without progress it fails.

    Progress is a newer whole checkpoint (`newest()`, in steps) than at the failure before. The first machine decides;
    the others come along, until it has ended the job. What a JobFailed says no new start can help is not tried again.
    """
    count = _Count(max_restarts)
    while True:
        try:
            return attempt(count.began)
        except JobFailed as error:
            failed = error
        if not failed.again or not max_restarts:
            raise failed
        count.began = count.began or failed.began
        if layout.node_rank == 0:
            _decide(failed, newest() if count.began else 0, count)
        else:
            console.note(f"restart {count.restarts + 1}, when machine 0 is ready for it: {failed}")
        count.restarts += 1
        _keep_logs(layout, count.restarts)


class _Count:
    """How often a job was restarted, how often in a row without progress, and whether it ever came to train."""

    def __init__(self, max_restarts: int):
        self.max_restarts = max_restarts
        self.restarts, self.without, self.step = 0, 0, -1
        self.began = False


def _decide(failed: JobFailed, step: int, count: _Count) -> None:
    count.without = 1 if step > count.step else count.without + 1
    count.step = max(step, count.step)
    if count.without > count.max_restarts:
        end = f"restarted {count.restarts} times, {count.max_restarts} in a row without a newer checkpoint"
        raise RunError(f"{failed}; {end}")
    where = f"goes on after step {step}" if step else "begins at the beginning, there is no checkpoint yet"
    without = f"{count.without} of {count.max_restarts} without progress"
    console.note(f"restart {count.restarts + 1} ({without}) {where}; the cause: {failed}")


def _keep_logs(layout: Layout, number: int) -> None:
    """Move this machine's ranks' logs out of the new attempt's way, to LOG_DIR/attempt-N."""
    folder = layout.log_dir / f"attempt-{number}"
    for log in layout.logs:
        if log.exists() and log != layout.launcher_log:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.move(log, Path(folder, log.name))
