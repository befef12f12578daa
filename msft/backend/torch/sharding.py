"""FSDP2: every rank holds its rows of each tensor, of its gradient and of its moments (ZeRO stage 3).

Of a model that is cut, those are rows of the rank's slices: parts are DTensors in two dimensions then.
"""

import functools

import numpy as np
import torch
import torch.distributed as group
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from msft.backend.contract import Place
from msft.backend.torch import distributed, ops, placed


def shard(network: nn.Module, layers: nn.ModuleList, device: str) -> nn.Module:
    """Share a network on the meta device out over all replicas; return what to call in place of its body.

    Blocks, an untied head, and the rest (embedding, last norm) are gathered one at a time. Values are still to be
    given (`keep`). Gradients are sums over the ranks.
    """
    mesh = distributed.device_mesh()
    if mesh.ndim > 1:
        placed.place(network, distributed.mesh(), mesh["tensor"])
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    units = [*layers, *([] if head.weight is embedding.weight else [head]), network]
    for unit in units:
        fully_shard(unit, mesh=mesh["replicas"])
        # Gloo knows no sum of what is divided before; the losses are divided already.
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    # The call of a root is what gathers the rest, and a head has no part in it.
    network.forward = functools.partial(network.base_model)
    network.to_empty(device=device)
    return network


def gather_head(network: nn.Module) -> None:
    """Make the head whole, until `free` or the end of a backward pass."""
    _head_unit(network).unshard()


def free(network: nn.Module) -> None:
    """Give back what is still whole after a pass without gradients: values that a step changes must not stay."""
    for unit in (_head_unit(network), network):
        unit.reshard()


def _head_unit(network: nn.Module) -> nn.Module:
    head = network.get_output_embeddings()
    return head if isinstance(head, FSDPModule) else network


@torch.no_grad()
def keep(part: DTensor, whole: torch.Tensor) -> None:
    """Put what this rank holds of a whole tensor into its part."""
    part.to_local().copy_(place(part).of(whole))


def place(part: DTensor) -> Place:
    """Return where what this rank holds lies in the whole: of its slice the rows as torch.chunk deals them, or none."""
    mesh, start, shape = part.device_mesh, [0] * part.ndim, list(part.shape)
    # The last placement is the slice's; the first one's rows are those of the slice, whatever name torch has for that.
    cuts = [(cut.dim, 1) for cut in part.placements[1:] if cut.is_shard()]
    for axis, dimension in [*cuts, (0, 0)]:
        size = -(-shape[axis] // mesh.size(dimension))
        before = min(size * mesh.get_local_rank(dimension), shape[axis])
        start[axis] += before
        shape[axis] = min(size, shape[axis] - before)
    return Place(tuple(part.shape), tuple(start), tuple(shape))


def whole(part: DTensor) -> torch.Tensor:
    """Return the whole tensor of a part on every rank; all ranks call it."""
    # The rows of the slices first: together with these torch gathers them in the same two ways, and warns of it.
    return part.redistribute(placements=(Replicate(), *part.placements[1:])).full_tensor()


def whole_arrays(tensors: dict[str, torch.Tensor], parts: dict[str, DTensor]) -> dict[str, np.ndarray]:
    """Return whole float32 arrays on the first rank, one after another, and none on the others; all ranks call it.

    `tensors` are what this rank holds, cut as `parts` of the same names.
    """
    found = {}
    for name, tensor in tensors.items():
        part = parts[name]
        layout = {"shape": part.shape, "stride": part.stride(), "run_check": False}
        gathered = whole(DTensor.from_local(tensor, part.device_mesh, part.placements, **layout))
        if group.get_rank() == 0:
            found[name] = ops.to_numpy(gathered)
    return found
