"""The whole tensors of a model that is shared out, for the first process to write: one of them exists at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from msft.train.lazy import Lazy
from msft.train.setup import Session


@contextmanager
def whole_tensors(session: Session) -> Iterator[Lazy]:
    """Give the first process the tuned tensors of a sharded engine, each gathered when it is asked for.

    All processes enter together. The others help until the first one leaves, and get nothing.
    """
    engine, sums = session.engine, session.distributed.sum_numbers
    shapes = engine.tuned_shapes()
    names = list(shapes)
    if session.rank:
        # The first process says which tensor it wants by its number from 1 on, and 0 at the end.
        while wanted := int(sums([0.0])[0]):
            engine.export_weights([names[wanted - 1]])
        yield Lazy({}, {}.__getitem__)
        return

    def gather(name: str):
        sums([names.index(name) + 1.0])
        return engine.export_weights([name])[name]

    try:
        yield Lazy(shapes, gather)
    finally:
        sums([0.0])
