"""Trains tiny models that are cut over the processes of a launcher: run by test_cut_models.py, on either engine.

TENSOR ranks hold a model; what came out is written by the first rank to result.npz. KIND: a key of TUNINGS. SHARD: 1
deals the optimizer's state to the ranks with different rows.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

from msft.backend.contract import Batch
from msft.cli import guard
from tests.conformance import cut_models


def main(backend, tensor, kind, shard):
    distributed = import_module(f"msft.backend.{backend}.distributed")
    distributed.initialize("cpu", tensor)
    mesh = distributed.mesh()
    try:

        def rows_of(whole: Batch) -> Batch:
            return Batch(*(np.split(array, mesh.data)[mesh.data_rank] for array in vars(whole).values()))

        engine = cut_models.engine(backend, kind, shard)
        held = sum(moment.size for moment in engine.optimizer.to_numpy(engine.optimizer.first).values())
        results = cut_models.measure(engine, rows_of)
        if mesh.rank == 0:
            np.savez("result.npz", **results)
            Path("held").write_text(str(held))
        # A state that one process wrote is taken over, each rank its slices.
        engine.import_state(cut_models.state(np.load("start.npz")))
        again = engine.train_step([rows_of(batch) for batch in cut_models.micro_batches(9)], cut_models.RATE)
        if mesh.rank == 0:
            np.save("again.npy", [again.loss, again.grad_norm])
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    words = os.environ["BACKEND"], int(os.environ["TENSOR"]), os.environ["KIND"], os.environ["SHARD"] == "1"
    sys.exit(guard.run(lambda _: main(*words), sys.argv[1:]))
