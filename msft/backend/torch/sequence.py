"""Hidden states of which each rank of a model has its part of the tokens (Megatron, arXiv 2205.05198).

Gathering and scattering together send what one AllReduce sends.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.autograd.graph import saved_tensors_hooks

from msft.backend.mesh import Mesh
from msft.backend.torch import block, distributed
from msft.backend.torch.block import Parts


def cut_parts(parts: Parts, mesh: Mesh, recompute: bool) -> Parts:
    """Return the parts of a block as the mesh cuts it; where each rank has its tokens, these stand between its modules.

    Where such a block is not computed anew, its modules keep a rank's part of what they read, and gather it once more.
    """
    if mesh.is_sequence_cut:
        return parts._replace(enter=gather, leave=scatter, keep=_whole if recompute else _part)
    return block.cut_parts(parts, distributed.reduce) if mesh.tensor > 1 else parts


def gather(part: torch.Tensor) -> torch.Tensor:
    """Return the hidden states [1, tokens, hidden] of all ranks for modules whose gradients there are shares."""
    return _Gather.apply(part)


def scatter(output: torch.Tensor) -> torch.Tensor:
    """Return this rank's tokens of the sum over ranks of what modules give [1, tokens, hidden]."""
    return _Scatter.apply(output)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part):
        return distributed.gather(part)

    @staticmethod
    def backward(ctx, gradient):
        return distributed.scatter(gradient)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output):
        return distributed.scatter(output)

    @staticmethod
    def backward(ctx, gradient):
        return distributed.gather(gradient)


def _whole(part: torch.Tensor, whole: torch.Tensor):
    return nullcontext()


def _part(part: torch.Tensor, whole: torch.Tensor):
    kept = _Kept(part.detach(), whole, distributed.gather)
    return saved_tensors_hooks(kept.pack, kept.unpack)


class _Kept:
    """What modules keep of the gathered states that they read: this rank's part, gathered when the first asks for it.

    The whole is held until as many have asked as keep it.
    """

    def __init__(self, part: torch.Tensor, whole: torch.Tensor, gather: Callable):
        self.part, self.gather = part, gather
        self.address, self.size = whole.data_ptr(), whole.numel()
        self.users, self.whole = 0, None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | torch.Size:
        """Return the shape of a tensor that is the gathered states, any other tensor itself."""
        if (tensor.data_ptr(), tensor.numel()) != (self.address, self.size):
            return tensor
        self.users += 1
        return tensor.shape

    def unpack(self, packed: torch.Tensor | torch.Size) -> torch.Tensor:
        """Return the tensor that was packed."""
        if isinstance(packed, torch.Tensor):
            return packed
        whole = self.gather(self.part) if self.whole is None else self.whole
        self.users -= 1
        self.whole = whole if self.users else None
        return whole.view(packed)
