"""The process group of torchrun: sums over ranks."""

import os
from collections.abc import Sequence
from datetime import timedelta

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
    """Return the numbers summed over all ranks, in float64."""
    if not group.is_initialized():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=_device())
    group.all_reduce(total)
    return total.tolist()


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
    """Leave the group."""
    if group.is_initialized():
        group.destroy_process_group()


def _device() -> str:
    return {"gloo": "cpu", "nccl": "cuda", "hccl": "npu"}[group.get_backend()]
