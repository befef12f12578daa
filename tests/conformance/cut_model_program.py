"""Trains tiny models that are shared out over the processes of a launcher, on either engine.

Run by test_cut_models.py: TENSOR ranks hold a model, CONTEXT share the tokens of its rows; and by test_sharded.py:
SETTINGS (JSON) are the runtime's. What came out is written by the first rank to result.npz; the state by all of them to
parts/, and to taken/ once more when they have taken over that of one process (start.npz). KIND: a key of TUNINGS.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

from msft.backend import context
from msft.backend.contract import Batch
from msft.cli import guard
from msft.train import sliced
from tests.conformance import cut_models


def held(engine):
    """How many numbers this rank holds of each parameter, moment or weight that is tuned."""
    parts = {f"parameter {name}": part.to_local() for name, part in engine.model.decoder.network.named_parameters()}
    for kind in ("first", "second"):
        parts |= {f"{kind} {name}": tensor for name, tensor in getattr(engine.optimizer, kind).items()}
    return {name: part.numel() for name, part in parts.items()}


def main(backend, tensor, shared, kind, settings):
    distributed = import_module(f"msft.backend.{backend}.distributed")
    cut = {key: settings.pop(key) for key in ("sequence", "vocabulary") if key in settings}
    distributed.initialize("cpu", tensor, shared, **cut)
    mesh = distributed.mesh()
    try:

        def rows_of(whole: Batch) -> Batch:
            rows = Batch(*(np.array_split(array, mesh.data)[mesh.data_rank] for array in vars(whole).values()))
            return context.share(rows, mesh.context, mesh.context_rank)

        engine = cut_models.engine(backend, kind, **settings)
        # DeepSpeed does not show the gradients of a step.
        results = cut_models.measure(engine, rows_of, gradients=settings.get("strategy") != "deepspeed")
        if mesh.rank == 0:
            np.savez("result.npz", **results)
            if settings.get("strategy") == "fsdp":
                np.savez("held.npz", **held(engine))
            elif settings.get("shard_optimizer"):
                moments = engine.optimizer.to_numpy(engine.optimizer.first)
                np.savez("held.npz", **{name: moment.size for name, moment in moments.items()})
        sliced.write(Path("parts"), mesh.rank, engine.export_parts())
        # A state that one process wrote is taken over, each rank its slices.
        engine.import_state(cut_models.state(np.load("start.npz")))
        sliced.write(Path("taken"), mesh.rank, engine.export_parts())
        again = engine.train_step([rows_of(batch) for batch in cut_models.micro_batches(9)], cut_models.RATE)
        if mesh.rank == 0:
            np.save("again.npy", [again.loss, again.grad_norm])
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    sizes = int(os.environ["TENSOR"]), int(os.environ["CONTEXT"])
    words = os.environ["BACKEND"], *sizes, os.environ["KIND"], json.loads(os.environ["SETTINGS"])
    sys.exit(guard.run(lambda _: main(*words), sys.argv[1:]))
