"""What two processes have in common: run by test_two_workers.py through the launcher, on either engine.

Checks sums over ranks, then rank 1 fails while rank 0 waits for it. WAIT_SECONDS: rank 0 is late by so much.
"""

import os
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np

from msft import console
from msft.backend.buckets import BUCKET
from msft.cli import guard
from msft.errors import RunError
from msft.launch.leave import leave


def check_numbers(distributed, rank):
    """Sums are those of float64: counts beyond float32, small parts beside large ones, infinities."""

    def numbers(of):
        return [1 / 3 + of, 2.0**53 - 1 - of, 16777217 - 16777216 * of, 1e-300 * (1 + of), 1e300, [1.0, np.inf][of]]

    expected = [left + right for left, right in zip(numbers(0), numbers(1), strict=True)]
    assert distributed.sum_numbers(numbers(rank)) == expected
    assert np.isnan(distributed.sum_numbers([np.nan if rank else 0.0])[0])


def check_gradients(distributed, ops, rank):
    """Many small tensors and one that is larger than a message come back summed, each in its place."""
    shapes = {f"small.{number}": (3, 5) for number in range(300)} | {"large": (2, BUCKET // 2 + 7), "last": (4,)}

    def gradient(index, of):
        return ((np.arange(np.prod(shapes[names[index]])) % 1000) * (of + 1) + index).astype(np.float32)

    names = list(shapes)
    own = {
        name: ops.from_numpy(gradient(index, rank).reshape(shapes[name]), "cpu", "float32")
        for index, name in enumerate(names)
    }
    summed = distributed.sum_gradients(own)
    assert list(summed) == names
    for index, name in enumerate(names):
        expected = gradient(index, 0) + gradient(index, 1)
        np.testing.assert_array_equal(ops.to_numpy(summed[name]), expected.reshape(shapes[name]))


def main(backend):
    distributed, ops = (import_module(f"msft.backend.{backend}.{name}") for name in ("distributed", "ops"))
    rank, world = distributed.initialize("cpu")
    Path(f"pid_{rank}").write_text(str(os.getpid()))
    try:
        assert world == 2 and distributed.rank_and_world() == (rank, world)
        assert console.is_first_rank() == (rank == 0)
        check_numbers(distributed, rank)
        check_gradients(distributed, ops, rank)
        if rank == 0:
            time.sleep(float(os.environ.get("WAIT_SECONDS", 0)))
        distributed.sum_numbers([1.0])
        print("sums are right", flush=True)
        if rank == 1:
            Path("failed_at").write_text(str(time.time()))
            raise RunError("boom")
        distributed.sum_numbers([1.0])
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    if "--debug" in sys.argv:
        main(os.environ["BACKEND"])
    leave(guard.run(lambda _: main(os.environ["BACKEND"]), sys.argv[1:]))
