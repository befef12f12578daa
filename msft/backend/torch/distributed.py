"""The process group of torchrun: sums over ranks, all of them or those of a mesh's groups."""

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from msft.backend import slices
from msft.backend.buckets import buckets
from msft.backend.mesh import Mesh

# How long a rank waits for the others, for instance while the first one writes a model (NCCL's groups: 10 minutes).
WAIT = timedelta(minutes=30)

# Their names since torch 2.13, which warns of the old ones.
_GATHER = getattr(group, "all_gather_single", group.all_gather_into_tensor)
_SCATTER = getattr(group, "reduce_scatter_single", group.reduce_scatter_tensor)

# The mesh of this process, and its groups of ranks: None = all of them.
_joined = SimpleNamespace(mesh=Mesh(), replicas=None, tensor=None, context=None, pipeline=None, ends=None)


def initialize(
    device: str,
    tensor: int = 1,
    context: int = 1,
    pipeline: int = 1,
    sequence: bool = False,
    vocabulary: bool = False,
) -> tuple[int, int]:
    """Join the group that torchrun's environment describes; return (rank, world size).

    Of `pipeline` stages of a model, each is held by `tensor` ranks, and `context` ranks share the tokens of its rows;
    together they divide the world size. `sequence` and `vocabulary` are the mesh's.
    """
    if "RANK" not in os.environ:
        return 0, 1
    if device != "cpu":
        getattr(torch, device).set_device(int(os.environ["LOCAL_RANK"]))
    backend = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[device]
    group.init_process_group(backend, timeout=WAIT)
    rank, world = rank_and_world()
    _joined.mesh = mesh = Mesh(
        world // (tensor * context * pipeline), tensor, rank, context, pipeline, sequence, vocabulary
    )
    if mesh.replicas < world:
        _joined.replicas = _own(mesh.replica_groups, rank)
    for kind, size in (("tensor", tensor), ("context", context), ("pipeline", pipeline)):
        if size > 1:
            setattr(_joined, kind, _own(getattr(mesh, f"{kind}_groups"), rank))
    if pipeline > 1:
        _joined.ends = _own(mesh.end_groups, rank)
    return rank, world


def _own(groups: list[list[int]], rank: int):
    """The group that has this rank (None: no group has); every rank makes all of them."""
    made = [(ranks, group.new_group(ranks, timeout=WAIT)) for ranks in groups]
    return next((handle for ranks, handle in made if rank in ranks), None)


def mesh() -> Mesh:
    """Return which ranks work together."""
    return _joined.mesh


def device_mesh() -> DeviceMesh:
    """Return torch's own mesh: `replicas` x `tensor`; where no model is cut, of `replicas` alone."""
    if _joined.mesh.tensor == 1:
        return init_device_mesh(_device(), (_joined.mesh.replicas,), mesh_dim_names=("replicas",))
    names, ranks = ("replicas", "tensor"), np.transpose(_joined.mesh.replica_groups)
    return DeviceMesh.from_group([_joined.replicas, _joined.tensor], _device(), ranks, mesh_dim_names=names)


def rank_and_world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) outside a group."""
    return (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)


def sum_numbers(numbers: Sequence[float]) -> list[float]:
    """Return the numbers summed over replicas, in float64 and in the order of the ranks."""
    return _joined.mesh.sum_over_replicas(_gathered(numbers)).tolist()


def sum_over_parts(numbers: Sequence[float]) -> list[float]:
    """Return the numbers summed over the ranks that hold parts of one model, in float64."""
    return _joined.mesh.sum_over_parts(_gathered(numbers)).tolist()


def _gathered(numbers: Sequence[float]) -> np.ndarray:
    """The numbers of all ranks, float64 [ranks, n]."""
    if not group.is_initialized():
        return np.array([numbers], dtype=np.float64)
    # Gathered as pairs of int32, because HCCL sums no float64.
    bits = torch.from_numpy(np.array(numbers, dtype=np.float64).view(np.int32)).to(_device())
    gathered = [torch.empty_like(bits) for _ in range(group.get_world_size())]
    group.all_gather(gathered, bits)
    return torch.stack(gathered).cpu().numpy().view(np.float64)


def sum_gradients(gradients: dict[str, torch.Tensor], partial: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Return the gradients summed over replicas; `partial` ones over the ranks of a model's stage as well."""
    if not group.is_initialized():
        return gradients
    if _joined.mesh.tensor > 1:
        shares = {name: gradient for name, gradient in gradients.items() if name in partial}
        gradients = gradients | _summed(shares, _joined.tensor)
    return _summed(gradients, _joined.replicas)


def reduce(values: torch.Tensor) -> torch.Tensor:
    """Return the values summed over the ranks that hold slices of one model's stage."""
    values = values.contiguous().clone()
    group.all_reduce(values, group=_joined.tensor)
    return values


def gather_parts(part: torch.Tensor) -> torch.Tensor:
    """Return the parts [length, n] of the ranks that share rows, one after another, [ranks x length, n]."""
    whole = part.new_empty(_joined.mesh.context * len(part), part.shape[1])
    _GATHER(whole, part.contiguous(), group=_joined.context)
    return whole


def sum_parts(whole: torch.Tensor) -> torch.Tensor:
    """Return the sum over the ranks that share rows, of [ranks x length, n] this one's part [length, n]."""
    part = whole.new_empty(len(whole) // _joined.mesh.context, whole.shape[1])
    _SCATTER(part, whole.contiguous(), group=_joined.context)
    return part


def largest(values: torch.Tensor) -> torch.Tensor:
    """Return the largest values over the ranks that hold slices of one model's stage."""
    values = values.clone()
    group.all_reduce(values, group.ReduceOp.MAX, group=_joined.tensor)
    return values


def gather(part: torch.Tensor) -> torch.Tensor:
    """Return the tokens of all ranks that hold slices of one model's stage, in their order; part [1, own, features]."""
    part = part.squeeze(0).contiguous()
    whole = part.new_empty(len(part) * _joined.mesh.tensor, *part.shape[1:])
    _GATHER(whole, part, group=_joined.tensor)
    return whole.unsqueeze(0)


def scatter(values: torch.Tensor) -> torch.Tensor:
    """Return this rank's tokens of the sum over the ranks of one model's stage; values [1, tokens, features]."""
    values = values.squeeze(0).contiguous()
    part = values.new_empty(len(values) // _joined.mesh.tensor, *values.shape[1:])
    _SCATTER(part, values, group=_joined.tensor)
    return part.unsqueeze(0)


def sum_ends(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients summed over the first and the last stage, which alone call this."""
    return _summed(gradients, _joined.ends)


def exchange(
    given: torch.Tensor | None, shape: tuple[int, ...] | None, dtype: torch.dtype, ahead: bool
) -> torch.Tensor | None:
    """Give values to the next stage (`ahead`) or the one before, and return what it gives, of a shape and dtype.

    None: nothing is given, or taken. Both stages call it at once.
    """
    neighbour, messages, taken = _joined.mesh.neighbour(ahead), [], None
    if given is not None:
        messages.append(group.P2POp(group.isend, given.contiguous(), neighbour))
    if shape is not None:
        taken = torch.empty(shape, dtype=dtype, device=_device())
        messages.append(group.P2POp(group.irecv, taken, neighbour))
    for work in group.batch_isend_irecv(messages):
        work.wait()
    return taken


def join_stages(arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return arrays of all stages, float32 of these shapes, of which each rank has some; each is summed over stages."""
    found = {}
    for name, shape in shapes.items():
        own = torch.from_numpy(arrays[name].copy() if name in arrays else np.zeros(shape, np.float32)).to(_device())
        group.all_reduce(own, group=_joined.pipeline)
        found[name] = own.cpu().numpy()
    return found


def join(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return whole arrays for this rank's slices of tensors, by canonical name; every rank of a model calls it."""
    found = dict(arrays)
    for name, along in ((name, slices.axis(name, _joined.mesh)) for name in arrays):
        if _joined.mesh.tensor > 1 and along is not None:
            found[name] = join_along(arrays[name], along)
    return found


def join_along(array: np.ndarray, along: int) -> np.ndarray:
    """Return the whole array of which each rank of a model's stage has its slice along an axis."""
    whole = torch.from_numpy(slices.placed(array, along, _joined.mesh)).to(_device())
    return reduce(whole).cpu().numpy()


def gather_rows(parts: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and float32 tensor of the shapes of `like`; each rank with different rows has `parts` of its rows.

    A bucket at a time, so that what is yielded need not all be in memory.
    """
    for names in buckets({name: tensor.numel() for name, tensor in like.items()}):
        padded = {name: torch.zeros_like(like[name], requires_grad=False) for name in names}
        for name in names:
            if name in parts:
                padded[name][_joined.mesh.rows(len(padded[name]))] = parts[name]
        yield from _summed(padded, _joined.replicas).items()


def _summed(gradients: dict[str, torch.Tensor], ranks) -> dict[str, torch.Tensor]:
    summed = {}
    for names in buckets({name: gradient.numel() for name, gradient in gradients.items()}):
        flat = torch.cat([gradients[name].flatten() for name in names])
        group.all_reduce(flat, group=ranks)
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
