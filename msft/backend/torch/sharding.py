"""FSDP2: every rank holds its rows of each tensor, of its gradient and of its moments (ZeRO stage 3)."""

import functools

import numpy as np
import torch
import torch.distributed as group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from msft.backend.contract import Place
from msft.backend.torch import ops


def shard(network: nn.Module, device: str) -> nn.Module:
    """Share a network on the meta device out over all ranks; return what to call in place of its `model`.

    Blocks, an untied head, and the rest (embedding, last norm) are gathered one at a time. Values are still to be
    given (`keep`). Gradients are sums over the ranks.
    """
    mesh = init_device_mesh(device, (group.get_world_size(),))
    head, embedding = network.lm_head, network.model.embed_tokens
    units = [*network.model.layers, *([] if head.weight is embedding.weight else [head]), network]
    for unit in units:
        fully_shard(unit, mesh=mesh)
        # Gloo knows no sum of what is divided before; the losses are divided already.
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    # The call of a root is what gathers the rest, and a head has no part in it.
    network.forward = functools.partial(network.model)
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
    return network.lm_head if isinstance(network.lm_head, FSDPModule) else network


@torch.no_grad()
def keep(part: DTensor, whole: torch.Tensor) -> None:
    """Put this rank's rows of a whole tensor into its part."""
    part.to_local().copy_(place(part).of(whole))


def place(part: DTensor) -> Place:
    """Return which rows this rank holds of a part: as torch.chunk deals them; there may be none."""
    size = -(-len(part) // part.device_mesh.size())
    start = min(size * part.device_mesh.get_local_rank(), len(part))
    shape = tuple(part.to_local().shape)
    return Place(tuple(part.shape), (start, *(0 for _ in shape[1:])), shape)


def whole_arrays(tensors: dict[str, torch.Tensor], parts: dict[str, DTensor]) -> dict[str, np.ndarray]:
    """Return whole float32 arrays on the first rank, one after another, and none on the others; all ranks call it.

    `tensors` are this rank's rows, cut as `parts` of the same names.
    """
    found = {}
    for name, tensor in tensors.items():
        part = parts[name]
        layout = {"shape": part.shape, "stride": part.stride(), "run_check": False}
        whole = DTensor.from_local(tensor, part.device_mesh, part.placements, **layout).full_tensor()
        if group.get_rank() == 0:
            found[name] = ops.to_numpy(whole)
    return found
