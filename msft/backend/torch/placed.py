"""Tensor parallelism as a DTensor plan: how each tensor lies over the ranks of a model, and what its gradient there is.

The cuts are Megatron's (`slices`). Modules compute with plain tensors, which they take by `local` where they use them.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from msft.backend import slices
from msft.backend.mesh import Mesh


def placement(name: str, mesh: Mesh) -> Placement:
    """Return how a tensor lies over the ranks of a model, by its canonical name."""
    along = slices.axis(name, mesh)
    return Replicate() if along is None else Shard(along)


def gradient_placement(name: str, mesh: Mesh) -> Placement:
    """Return how a tensor's gradient lies there: what is whole may have shares of it, which are still to be summed."""
    return Partial() if slices.is_partial(name, mesh) else placement(name, mesh)


def place(network: nn.Module, mesh: Mesh, ranks: DeviceMesh) -> None:
    """Make the parameters of a network, this rank's slices, DTensors over the `ranks` of its model; tied ones stay so.

    They have no values yet (the meta device).
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        names = {leaf: _canonical(f"{path}.{leaf}") for leaf in own}
        module.gradient_placements = {leaf: (gradient_placement(name, mesh),) for leaf, name in names.items()}
        for leaf, part in own.items():
            if part not in made:
                whole = DTensor.from_local(part.detach(), ranks, (placement(names[leaf], mesh),), run_check=False)
                made[part] = nn.Parameter(whole, requires_grad=part.requires_grad)
            setattr(module, leaf, made[part])


def _canonical(name: str) -> str:
    """A name in peft's model without the levels that peft puts in."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def local(module: nn.Module, leaf: str = "weight") -> torch.Tensor:
    """Return this rank's slice of a module's tensor; of a model that no plan places, the tensor itself."""
    tensor = getattr(module, leaf)
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to_local(grad_placements=module.gradient_placements[leaf])
