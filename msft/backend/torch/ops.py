"""The one place that chooses between fused kernels and plain operators, and the operators torch lacks."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from msft.backend import random
from msft.backend.contract import Runtime
from msft.backend.torch import attention, block
from msft.models.spec import ModelSpec

# Supervised positions whose logits are made at a time: 160 x 49152 float32 are 31 MB. The C library keeps memory of up
# to 32 MB for the next chunk; more than that the system hands out anew, page by page.
LOSS_CHUNK = 160
SUM_BLOCK = 256


@dataclass(frozen=True)
class Kernels:
    """The operators that were chosen for a device; `softmax` says what attention's runs in.

    `attention`(query [1, heads, tokens, dim], key, value [1, kv_heads, tokens, dim], segments, scale) is causal within
    each of the `attention.Segments`; `fused_adamw` tells whether AdamW runs as one fused kernel.
    """

    name: str
    softmax: str
    attention: Callable
    fused_adamw: bool
    parts: block.Parts = field(default_factory=block.Parts)


def kernels(spec: ModelSpec, runtime: Runtime) -> Kernels:
    """Choose kernels for a model on a device: flash attention of variable length, torch's own, or products on CPU.

    Norm, rotation and SwiGLU are compiled where `runtime` asks for it, else Liger's on CUDA where it is installed.
    """
    return Kernels(*_attention(runtime), runtime.device in ("cpu", "cuda"), _parts(runtime))


def _attention(runtime: Runtime) -> tuple[str, str, Callable]:
    compute = runtime.precision.compute
    if runtime.device == "cuda" and compute != "float32" and attention.has_variable_length():
        name, softmax = "flash attention of variable length", "float32 inside flash attention"
        return name, softmax, attention.across_segments
    if runtime.device == "cpu":
        longer = f" (torch's kernel where one is over {attention.KEPT} tokens)" if compute == "float32" else ""
        return f"batched products, segment by segment{longer}", f"float32, of scores in {compute}", attention.on_cpu
    softmax = "float32 accumulation inside scaled_dot_product_attention"
    return "scaled_dot_product_attention, segment by segment", softmax, attention.by_segment


def _parts(runtime: Runtime) -> block.Parts:
    if runtime.compile:
        return block.compiled_parts()
    if runtime.device == "cuda" and importlib.util.find_spec("liger_kernel"):
        return block.liger_parts()
    return block.Parts()


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


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each position, float32 [n]; logits float32 [n, vocabulary] are used up, labels [n].

    Written out, because torch's own operator gives losses that are 7e-6 too small on CPU (`sum_in_blocks`).
    """
    return _losses_and_exponentials(logits, labels)[0]


def token_losses_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `token_losses` and the gradient of `scale` x their sum for the logits, in the place of the logits."""
    losses, exponentials, totals = _losses_and_exponentials(logits, labels)
    gradient = exponentials.mul_(scale / totals)
    gradient.scatter_add_(-1, labels.long().unsqueeze(-1), gradient.new_full((1, 1), -scale).expand(len(labels), 1))
    return losses, gradient


def _losses_and_exponentials(logits, labels):
    """The losses [n], exp(logits - the largest) in the place of the logits, and its sums [n, 1]."""
    chosen = logits.gather(-1, labels.long().unsqueeze(-1))
    top = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(top).exp_()
    # log1p loses nothing where the sum is little more than 1, which it is at least.
    over = sum_in_blocks(exponentials).unsqueeze(-1) - 1
    return (torch.log1p(over) + (top - chosen)).squeeze(-1), exponentials, over + 1


def sum_in_blocks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of [n, vocabulary] over the vocabulary, `SUM_BLOCK` at a time and then the sums.

    One long float32 sum loses the many small values.
    """
    rest = values.shape[-1] % SUM_BLOCK
    blocks, left = values.split([values.shape[-1] - rest, rest], dim=-1)
    return blocks.unflatten(-1, (-1, SUM_BLOCK)).sum(-1).sum(-1) + left.sum(-1)
