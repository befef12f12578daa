"""SIGINT and SIGTERM as requests: the step is finished and saved, then the run ends."""

import os
import signal
import threading
from types import FrameType

from msft import console
from msft.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """Inside its `with` block the first signal is only noted, in `asked` (0 = none); a second one raises `Stopped`.

    Signals that are ignored (a shell's background job) stay so. Outside the main thread nothing is changed. MindSpore
    itself sends on a SIGINT that comes while a compiled function runs as SIGTERM, so there it may be noted as that.
    """

    def __init__(self):
        self.asked = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._take)
        return self

    def __exit__(self, *_) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Stopped(number)
        self.asked = number
        if console.is_first_rank():
            # Not by print, which may just be interrupted in the middle of a line.
            name = signal.Signals(number).name
            os.write(2, f"{name}: this step is finished and saved, then the run stops (again: at once)\n".encode())
