"""The process group of msrun: sums over ranks, by the one collective that every target has (AllReduce SUM)."""

import os
from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, communication, ops


def initialize(device: str) -> tuple[int, int]:
    """Join the group that msrun's environment describes; return (rank, world size)."""
    if os.environ.get("MS_ROLE") == "MS_WORKER":
        communication.init()
    return rank_and_world()


def rank_and_world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) outside a group."""
    return (communication.get_rank(), communication.get_group_size()) if _grouped() else (0, 1)


def sum_numbers(numbers: Sequence[float]) -> list[float]:
    """Return the numbers summed over all ranks; each rank's number goes as three float32 parts, exact to 2**-60."""
    if not _grouped():
        return list(numbers)
    parts, rest = [], np.array(numbers, dtype=np.float64)
    for _ in range(3):
        parts.append(rest.astype(np.float32))
        rest = rest - parts[-1]
    total = _all_reduce(Tensor(np.concatenate(parts))).asnumpy().astype(np.float64)
    return total.reshape(3, -1).sum(axis=0).tolist()


def sum_gradients(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients summed over all ranks."""
    if not _grouped():
        return gradients
    flat = _all_reduce(ops.concat([gradient.reshape(-1) for gradient in gradients.values()]))
    summed, start = {}, 0
    for name, gradient in gradients.items():
        summed[name] = flat[start : start + gradient.size].reshape(gradient.shape)
        start += gradient.size
    return summed


def shutdown() -> None:
    """Leave the group."""
    if _grouped():
        communication.release()


def _grouped() -> bool:
    return os.environ.get("MS_ROLE") == "MS_WORKER" and communication.GlobalComm.INITED


def _all_reduce(tensor: Tensor) -> Tensor:
    return ops.AllReduce()(tensor)
