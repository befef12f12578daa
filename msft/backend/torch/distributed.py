"""The process group of torchrun: sums over ranks."""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as group

from msft.backend.buckets import buckets


def initialize(device: str) -> tuple[int, int]:
    """Join the group that torchrun's environment describes; return (rank, world size)."""
    if "RANK" not in os.environ:
        return 0, 1
    if device != "cpu":
        getattr(torch, device).set_device(int(os.environ["LOCAL_RANK"]))
    backend = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[device]
    group.init_process_group(backend, timeout=timedelta(minutes=30))
    return rank_and_world()


def rank_and_world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) outside a group."""
    return (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)


def sum_numbers(numbers: Sequence[float]) -> list[float]:
    """Return the numbers summed over all ranks, in float64 and in the order of the ranks."""
    if not group.is_initialized():
        return list(numbers)
    # Gathered as pairs of int32, because HCCL sums no float64.
    bits = torch.from_numpy(np.array(numbers, dtype=np.float64).view(np.int32)).to(_device())
    gathered = [torch.empty_like(bits) for _ in range(group.get_world_size())]
    group.all_gather(gathered, bits)
    return torch.stack(gathered).cpu().numpy().view(np.float64).sum(axis=0).tolist()


def sum_gradients(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients summed over all ranks."""
    if not group.is_initialized():
        return gradients
    summed = {}
    for names in buckets({name: gradient.numel() for name, gradient in gradients.items()}):
        flat = torch.cat([gradients[name].flatten() for name in names])
        group.all_reduce(flat)
        parts = flat.split([gradients[name].numel() for name in names])
        summed |= {name: part.view_as(gradients[name]) for name, part in zip(names, parts, strict=True)}
    return summed


def shutdown() -> None:
    """Leave the group; after an error without waiting for the others."""
    if group.is_initialized():
        if sys.exception() is None:
            # A rank that leaves while another still talks to it takes that one down.
            sum_numbers([0.0])
        group.destroy_process_group()


def _device() -> str:
    return {"gloo": "cpu", "nccl": "cuda", "hccl": "npu"}[group.get_backend()]
