"""The process group of msrun: sums over ranks, by collectives that every target has (AllReduce SUM, AllGather)."""

import os
import sys
import time
from collections.abc import Sequence

import mindspore
import numpy as np
from mindspore import Tensor, communication, ops

from msft.backend.buckets import BUCKET, buckets
from msft.backend.mindspore.device import TARGETS

# How long a rank waits for the others, for instance while the first one writes a checkpoint (MindSpore: 30 s on CPU).
WAIT_SECONDS = 1800
LAST_WORDS_SECONDS = 1.0


def initialize(device: str) -> tuple[int, int]:
    """Join the group that msrun's environment describes; return (rank, world size).

    Sets MindSpore's device, which cannot be done any more afterwards. In msrun's scheduler process this does not
    return: it serves the group and ends the process.
    """
    if "MS_ROLE" in os.environ:
        os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", str(WAIT_SECONDS))
        mindspore.set_device(TARGETS[device])
        communication.init()
    return rank_and_world()


def rank_and_world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) outside a group."""
    return (communication.get_rank(), communication.get_group_size()) if _grouped() else (0, 1)


def sum_numbers(numbers: Sequence[float]) -> list[float]:
    """Return the numbers summed over all ranks, in float64 and in the order of the ranks."""
    if not _grouped():
        return list(numbers)
    # As pairs of int32, because no target sums float64 and not every one carries it.
    bits = np.array(numbers, dtype=np.float64).view(np.int32)
    gathered = ops.AllGather()(Tensor(bits)).asnumpy()
    return gathered.view(np.float64).reshape(-1, len(numbers)).sum(axis=0).tolist()


def sum_gradients(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients summed over all ranks."""
    if not _grouped():
        return gradients
    summed = {}
    for names in buckets({name: gradient.size for name, gradient in gradients.items()}):
        flat = _all_reduce(ops.concat([gradients[name].reshape(-1) for name in names]))
        start = 0
        for name in names:
            end = start + gradients[name].size
            summed[name] = flat[start:end].reshape(gradients[name].shape)
            start = end
    return summed


def shutdown() -> None:
    """Leave the group; after an error without waiting for the others."""
    if not _grouped():
        return
    if sys.exception() is None:
        # A rank that ends before the others have heard its last message makes them wait for it until they time out.
        sum_numbers([0.0])
        time.sleep(LAST_WORDS_SECONDS)
    communication.release()


def _grouped() -> bool:
    return os.environ.get("MS_ROLE") == "MS_WORKER" and communication.GlobalComm.INITED


def _all_reduce(flat: Tensor) -> Tensor:
    parts = [ops.AllReduce()(flat[start : start + BUCKET]) for start in range(0, flat.size, BUCKET)]
    return parts[0] if len(parts) == 1 else ops.concat(parts)
