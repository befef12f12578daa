"""Work done ahead of its use, in a background thread."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """Yield `items` while a thread keeps up to `depth` of the next ones ready (0 = no thread).

    What `items` raises is raised here, in its turn. The thread starts with the first item asked for and
    has ended when this iterator is exhausted, closed or thrown away.
    """
    if depth == 0:
        yield from items
        return
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def work() -> None:
        try:
            while room.acquire() and not stopped.is_set():
                ready.put((next(items), None))
        except StopIteration:
            ready.put((None, None))
        except BaseException as error:
            ready.put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        if thread is not threading.current_thread():
            thread.join()
