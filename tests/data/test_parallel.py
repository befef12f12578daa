"""Results come in the tasks' order whatever the number of processes; a dead process is an error, not a hang."""

import os
import time

import pytest

from msft.data.parallel import TASKS_AHEAD, in_order
from msft.errors import InputError, RunError


def make(offset):
    def work(task):
        if task == "die":
            os._exit(9)
        if task == "bad":
            raise InputError("bad task")
        time.sleep(0.05 * (task % 3 == 0))
        return task + offset, os.getpid()

    return work


@pytest.mark.parametrize("workers", [1, 2])
def test_order_is_kept(workers):
    results = list(in_order(make, (100,), range(12), workers))
    assert [value for value, _ in results] == list(range(100, 112))
    processes = {process for _, process in results}
    assert (processes == {os.getpid()}) == (workers == 1)


def test_tasks_are_drawn_only_a_few_ahead():
    drawn = []

    def tasks():
        for number in range(100):
            drawn.append(number)
            yield number

    results = in_order(make, (0,), tasks(), 2)
    next(results)
    assert len(drawn) <= 2 * TASKS_AHEAD
    results.close()


def test_a_dead_process_is_an_error():
    with pytest.raises(RunError, match="worker process died"):
        list(in_order(make, (0,), [1, "die", 2], 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_through(workers):
    with pytest.raises(InputError, match="bad task"):
        list(in_order(make, (0,), [1, "bad"], workers))
