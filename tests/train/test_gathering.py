"""Protects the results of a sharded run: the first process gets one whole tensor at a time, the others help it."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from msft.train.gathering import whole_tensors

WHOLE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32), "c": np.zeros(2, np.float32)}
RANKS = 3


@pytest.fixture
def job():
    """A function: runs the first rank's work in its context, and gives what each rank was asked to gather."""
    barrier, said = threading.Barrier(RANKS, timeout=10), [0.0] * RANKS
    asked = [[] for _ in range(RANKS)]

    def session(rank):
        def sums(numbers):
            said[rank] = numbers[0]
            barrier.wait()
            total = sum(said)
            barrier.wait()
            return [total]

        def export_weights(names):
            asked[rank] += names
            return {name: WHOLE[name] for name in names} if rank == 0 else {}

        shapes = {name: array.shape for name, array in WHOLE.items()}
        engine = SimpleNamespace(tuned_shapes=lambda: shapes, export_weights=export_weights)
        return SimpleNamespace(rank=rank, engine=engine, distributed=SimpleNamespace(sum_numbers=sums))

    def help_out(rank):
        with whole_tensors(session(rank)) as nothing:
            assert len(nothing) == 0

    def run(work):
        others = [threading.Thread(target=help_out, args=(rank,)) for rank in range(1, RANKS)]
        for thread in others:
            thread.start()
        try:
            with whole_tensors(session(0)) as tensors:
                work(tensors)
        finally:
            for thread in others:
                thread.join(10)
        assert not any(thread.is_alive() for thread in others)

    return run, asked


def test_tensors_are_gathered_in_the_order_they_are_asked_for(job):
    run, asked = job

    def work(tensors):
        assert tensors.shapes == {name: array.shape for name, array in WHOLE.items()}
        for name in ("c", "a", "c"):
            np.testing.assert_array_equal(tensors[name], WHOLE[name])

    run(work)
    assert asked == [["c", "a", "c"]] * RANKS


def test_the_others_go_on_when_the_first_rank_cannot_write(job):
    run, asked = job

    def work(tensors):
        assert tensors["b"].sum() == 4
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run(work)
    assert asked == [["b"]] * RANKS
