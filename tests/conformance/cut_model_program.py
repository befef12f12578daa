"""Trains tiny models that are shared out over the processes of a launcher, on either engine.

Run by test_cut_models.py: TENSOR ranks hold one of PIPELINE stages of a model, CONTEXT share the tokens of its rows;
and by test_sharded.py: SETTINGS (JSON) are the runtime's. What came out is written by the first rank to result.npz; the
state by all of them to parts/, and to taken/ once more when they have taken over that of one process (start.npz). KIND:
a key of TUNINGS.
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
from msft.launch.leave import leave
from msft.train import sliced
from tests.conformance import cut_models
from tests.conformance.tiny_engines import batch


def held(engine):
    """How many numbers this rank holds of each parameter, moment or weight that is tuned."""
    parts = {f"parameter {name}": part.to_local() for name, part in engine.model.decoder.network.named_parameters()}
    for kind in ("first", "second"):
        parts |= {f"{kind} {name}": tensor for name, tensor in getattr(engine.optimizer, kind).items()}
    return {name: part.numel() for name, part in parts.items()}


def check_own_logits(engine, part, whole):
    """Of rows that ranks share, each gives the logits of its tokens, and nothing for the others."""
    found = engine.logits(part)
    np.testing.assert_allclose(found[part.own], whole[part.own], atol=2e-4, rtol=1e-4)
    assert not found[~part.own].any()


def main(backend, tensor, shared, pipeline, kind, settings):
    distributed = import_module(f"msft.backend.{backend}.distributed")
    cut = {key: settings.pop(key) for key in ("sequence", "vocabulary") if key in settings}
    distributed.initialize("cpu", tensor, shared, pipeline, **cut)
    mesh, staged = distributed.mesh(), pipeline > 1
    assert (mesh.tensor, mesh.context, mesh.pipeline) == (tensor, shared, pipeline)
    try:

        def rows_of(whole: Batch) -> Batch:
            rows = Batch(*(np.array_split(array, mesh.data)[mesh.data_rank] for array in vars(whole).values()))
            return context.share(rows, mesh.context, mesh.context_rank)

        engine = cut_models.engine(backend, kind, **settings)
        # DeepSpeed does not show the gradients of a step.
        shown = settings.get("strategy") != "deepspeed"
        results = cut_models.measure(engine, rows_of, gradients=shown, staged=staged)
        if mesh.context > 1 and not staged:
            whole = np.array_split(results["logits"], mesh.data)[mesh.data_rank]
            check_own_logits(engine, rows_of(batch(7, rows=2)), whole)
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
        again = engine.train_step([rows_of(one) for one in cut_models.micro_batches(9, staged)], cut_models.RATE)
        if mesh.rank == 0:
            np.save("again.npy", [again.loss, again.grad_norm])
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    sizes = (int(os.environ[name]) for name in ("TENSOR", "CONTEXT", "PIPELINE"))
    words = os.environ["BACKEND"], *sizes, os.environ["KIND"], json.loads(os.environ["SETTINGS"])
    leave(guard.run(lambda _: main(*words), sys.argv[1:]))
