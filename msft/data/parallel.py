"""A function over many tasks in several processes, results in order, with bounded memory."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from msft.errors import RunError

TASKS_AHEAD = 4


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(make: Callable, arguments: tuple, tasks: Iterable, workers: int) -> Iterator:
    """Yield `make(*arguments)(task)` for every task, in order; `make` runs once in each process.

    With one worker all happens in this process. Tasks are drawn only a few ahead of the results. Raises what the
    function raises, and RunError when a process dies.
    """
    if workers == 1:
        yield from map(make(*arguments), tasks)
        return
    # Spawned, not forked: the parent has threads (the progress bar), and a fork would copy their locks.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (make, arguments))
    waiting = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_call, task))
            if len(waiting) >= workers * TASKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RunError("a worker process died (out of memory?); try fewer with --num_workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(make: Callable, arguments: tuple) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function = make(*arguments)


def _call(task):
    return _function(task)
