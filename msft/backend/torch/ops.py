"""The one place that chooses between fused kernels and plain operators, and the operators torch lacks."""

from dataclasses import dataclass

import numpy as np
import torch

from msft.backend import random
from msft.backend.contract import Runtime
from msft.models.spec import ModelSpec

# Supervised positions whose logits are made at a time: 256 x 49152 float32 are 50 MB. In training one such array of
# each chunk stays until the backward pass.
LOSS_CHUNK = 256
SUM_BLOCK = 256


@dataclass(frozen=True)
class Kernels:
    """What was chosen: transformers' attention implementation, and whether AdamW runs as one fused kernel."""

    attention: str
    fused_adamw: bool


def kernels(spec: ModelSpec, runtime: Runtime) -> Kernels:
    """Choose kernels for a model on a device; scaled_dot_product_attention picks flash attention where there is one."""
    return Kernels(attention="sdpa", fused_adamw=runtime.device in ("cpu", "cuda"))


def dtype(name: str) -> torch.dtype:
    """Return torch's dtype of that name (float32, bfloat16, float16)."""
    return getattr(torch, name)


def dtypes(tensors: dict[str, torch.Tensor]) -> str:
    """Return the names of the tensors' dtypes, as in 'float32'."""
    return ", ".join(sorted({str(tensor.dtype).lower().removeprefix("torch.") for tensor in tensors.values()}))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a float32 copy."""
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).numpy()


def from_numpy(array: np.ndarray, device: str, kind: str) -> torch.Tensor:
    """Return a tensor of dtype `kind` that shares nothing with `array`; bfloat16 arrays are ml_dtypes'."""
    if array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.array(array, order="C"))
    return tensor.to(device=device, dtype=dtype(kind))


def keep_mask(tokens: torch.Tensor, features: torch.Tensor, probability: float) -> torch.Tensor:
    """`random.keep_mask` on tensors: bool [rows, length, features] from int32 keys."""
    bits = tokens.unsqueeze(-1) ^ features
    bits = bits * random.MULTIPLIER
    bits = bits ^ ((bits >> random.SHIFT) & random.SHIFT_MASK)
    bits = bits * random.MULTIPLIER_2
    return bits >= random.keep_threshold(probability)


def dropout(hidden: torch.Tensor, tokens: torch.Tensor, features: torch.Tensor, probability: float) -> torch.Tensor:
    """Return hidden [rows, length, features] with dropped elements 0 and kept ones scaled up."""
    keep = keep_mask(tokens, features, probability)
    return torch.where(keep, hidden / (1 - probability), 0)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each position, float32 [n]; logits float32 [n, vocabulary], labels int32 [n].

    Written out, because torch's own operator gives losses that are 7e-6 too small on CPU (`_sum_in_blocks`).
    """
    top = logits.detach().amax(-1, keepdim=True)
    normalizer = torch.log1p(_sum_in_blocks((logits - top).exp()) - 1) + top.squeeze(-1)
    return normalizer - logits.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)


def _sum_in_blocks(values: torch.Tensor) -> torch.Tensor:
    """Sum [n, vocabulary] over the vocabulary, `SUM_BLOCK` at a time and then the sums.

    One long float32 sum loses the many small values.
    """
    rest = values.shape[-1] % SUM_BLOCK
    blocks, left = values.split([values.shape[-1] - rest, rest], dim=-1)
    return blocks.unflatten(-1, (-1, SUM_BLOCK)).sum(-1).sum(-1) + left.sum(-1)
