"""Writing while the run goes on: one write at a time, none of them lost."""

import threading
from collections.abc import Callable

from msft import console
from msft.errors import MsftError, RunError, Stopped


class Writer:
    """Runs writes, each in a thread of its own when `background`, else at once.

    At the end of its `with` block it waits for the last one, whatever ended the block, except that a `Stopped` (a
    second signal) does not wait: what it cuts off has a temporary name.
    """

    def __init__(self, background: bool):
        self.background = background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Stopped):
            return
        try:
            self.wait()
        except MsftError as lost:
            if error is None:
                raise
            console.warn(str(lost))

    def start(self, write: Callable[[], None]) -> None:
        """Begin a write once the one before is done; raises that one's error as RunError."""
        self.wait()
        if self.background:
            # A daemon: only a second signal leaves it behind, and then it must not hold up the end.
            self._thread = threading.Thread(target=self._run, args=(write,), name="writer", daemon=True)
            self._thread.start()
        else:
            write()

    def wait(self) -> None:
        """Return when nothing is being written; raises the error of the last write as RunError."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, MsftError):
            raise error
        if error:
            raise RunError(f"writing a checkpoint failed: {type(error).__name__}: {error}") from error

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._error = error
