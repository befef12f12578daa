"""Large new files written past the page cache, in a second thread, while the next block is filled.

Finding memory for every written page in the cache, for data that is only passing through, costs more than the disk.
"""

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

# Large enough for the disk, and a multiple of every sector size.
BLOCK_BYTES = 8 * 2**20
BLOCKS = 3
# Linux has it; elsewhere files take the usual way.
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A new file that is written from its start to its end, as a context manager.

    A file that is smaller than a block, and the end of a larger one, take the usual way through the page cache.
    What the system says about a block (OSError: a full disk) is raised by a later `write` or on leaving.
    """

    def __init__(self, path: str | os.PathLike):
        self.descriptor = os.open(Path(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        _set_direct(self.descriptor, True)
        # Maps, because they begin at a page: what goes past the cache has to.
        self.blocks = deque(memoryview(mmap.mmap(-1, BLOCK_BYTES)) for _ in range(BLOCKS))
        self.position, self.filled = 0, 0
        self.thread = ThreadPoolExecutor(1)
        self.pending: deque[Future] = deque()

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self.thread.shutdown(cancel_futures=True)
            os.close(self.descriptor)

    def write(self, data) -> int:
        """Append bytes or a uint8 array, which may change afterwards; returns how many they are."""
        view = memoryview(data)
        size = len(view)
        while view:
            part = view[: BLOCK_BYTES - self.filled]
            self.blocks[0][self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            view = view[len(part) :]
            if self.filled == BLOCK_BYTES:
                self._hand_over()
        return size

    def tell(self) -> int:
        """Return how many bytes were written so far."""
        return self.position + self.filled

    def _hand_over(self) -> None:
        self.pending.append(self.thread.submit(_write_all, self.descriptor, self.blocks[0]))
        self.position += self.filled
        self.filled = 0
        self.blocks.rotate(-1)
        # The block that comes next is the one that was handed over longest ago.
        if len(self.pending) == BLOCKS:
            self.pending.popleft().result()

    def _finish(self) -> None:
        for written in self.pending:
            written.result()
        _set_direct(self.descriptor, False)
        _write_all(self.descriptor, self.blocks[0][: self.filled])


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except OSError as error:
            # A file system may say only now that it cannot pass the cache.
            if error.errno != errno.EINVAL or not _is_direct(descriptor):
                raise
            _set_direct(descriptor, False)


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT)


def _set_direct(descriptor: int, wanted: bool) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _DIRECT if wanted else flags & ~_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
