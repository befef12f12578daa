"""The one place that chooses between fused kernels and plain operators, and the operators torch lacks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from msft.backend import random
from msft.backend.contract import Runtime
from msft.models.spec import ModelSpec

# Supervised positions whose logits are made at a time: 256 x 49152 float32 are 50 MB.
LOSS_CHUNK = 256
SUM_BLOCK = 256
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True)
class Kernels:
    """The operators that were chosen for a device.

    `attention`(query [1, heads, tokens, dim], key, value [1, kv_heads, tokens, dim], segments, scale) is causal within
    each of the `Segments`; `fused_adamw` tells whether AdamW runs as one fused kernel.
    """

    name: str
    attention: Callable
    fused_adamw: bool


class Segments:
    """Where the examples lie in a line of tokens: `lengths` of each, one after the other, on a device."""

    def __init__(self, lengths: list[int], device: str):
        self.lengths = lengths
        self.longest = max(lengths)
        ends = np.cumsum([0, *lengths], dtype=np.int32)
        self.borders = torch.from_numpy(ends).to(device)


def kernels(spec: ModelSpec, runtime: Runtime) -> Kernels:
    """Choose kernels for a model on a device: flash attention over all segments at once where there is one."""
    fused_adamw = runtime.device in ("cpu", "cuda")
    if runtime.device == "cuda" and runtime.precision.compute != "float32":
        return Kernels("flash attention of variable length", varlen_attention, fused_adamw)
    return Kernels("scaled_dot_product_attention, segment by segment", segment_attention, fused_adamw)


def segment_attention(query, key, value, segments: Segments, scale: float) -> torch.Tensor:
    """Causal attention within each segment: [1, heads, tokens, dim] -> the same; pays for each segment's own square."""
    parts = zip(*(tensor.split(segments.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attend = functional.scaled_dot_product_attention
    grouped = query.shape[1] != key.shape[1]
    mixed = [attend(*part, is_causal=True, scale=scale, enable_gqa=grouped) for part in parts]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)


def varlen_attention(query, key, value, segments: Segments, scale: float) -> torch.Tensor:
    """`segment_attention` as one kernel, on CUDA in 16 bits."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    borders, longest = segments.borders, segments.longest
    grouped = query.shape[1] != key.shape[1]
    mixed = varlen_attn(
        query, key, value, borders, borders, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=grouped
    )
    return mixed.transpose(0, 1).unsqueeze(0)


def cached_attention(query, key, value, allowed, causal: bool, scale: float) -> torch.Tensor:
    """Attention over a key-value cache, [rows, heads, length, dim]; `allowed` bool [rows, 1, length, keys] or None."""
    grouped = query.shape[1] != key.shape[1]
    if query.shape[2] == 1 and query.device.type == "cpu":
        return _attend_one(query, key, value, allowed, scale)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _attend_one(query, key, value, allowed, scale: float) -> torch.Tensor:
    """Attention of one new token a row, written out: the kernel for whole texts takes several times as long on CPU."""
    rows, heads, _, dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, dim)
    scores = (grouped @ key.transpose(-1, -2)).float() * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return (torch.softmax(scores, -1).to(value.dtype) @ value).view(rows, heads, 1, dim)


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


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return rows x weight transposed + bias; rows [n, in], weight [out, in], both of one dtype.

    On CPU in float32 by oneDNN, which takes a tenth less time than MKL, and half for a single row.
    """
    if ONEDNN and rows.dtype == torch.float32 and rows.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return functional.linear(rows, weight, bias)


def linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, compute: torch.dtype) -> torch.Tensor:
    """Return W hidden + bias, [..., out], computed in the dtype `compute`; keeps hidden only where W is tuned."""
    if not torch.is_grad_enabled():
        return _linear(hidden, weight, bias, compute)
    return _Linear.apply(hidden, weight, bias, compute)


def _linear(hidden, weight, bias, compute):
    bias = None if bias is None else bias.to(compute)
    return product(hidden.flatten(0, -2).to(compute), weight.to(compute), bias).unflatten(0, hidden.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, compute):
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight)
        ctx.kind = hidden.dtype
        return _linear(hidden, weight, bias, compute)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        d_hidden = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = product(flat, weight.to(flat.dtype).t()).unflatten(0, gradient.shape[:-1]).to(ctx.kind)
        if ctx.needs_input_grad[1]:
            d_weight = product(flat.t(), hidden.flatten(0, -2).to(flat.dtype).t()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = flat.sum(0, dtype=torch.float32)
        return d_hidden, d_weight, d_bias, None


def adapted_linear(hidden, weight, bias, lora_a, lora_b, scaling: float, keep, probability: float) -> torch.Tensor:
    """Return W hidden + bias + scaling x B A dropout(hidden) for frozen W and bias, in W's dtype.

    hidden [..., in], weight [out, in], lora_a [rank, in], lora_b [out, rank]; `keep` bool [..., in] is what dropout of
    `probability` keeps, None without dropout. Keeps hidden, the mask and rank numbers a token for the backward pass.
    """
    return _AdaptedLinear.apply(hidden, weight, bias, lora_a, lora_b, scaling, keep, probability)


def low_rank(hidden, lora_a, lora_b, scaling: float, keep, probability: float) -> torch.Tensor:
    """Return the adapter's part of `adapted_linear` alone."""
    return functional.linear(functional.linear(_dropped(hidden, keep, probability), lora_a), lora_b) * scaling


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_a, lora_b, scaling, keep, probability):
        ctx.save_for_backward(hidden, weight, lora_a, lora_b, keep)
        ctx.scaling, ctx.probability = scaling, probability
        kind = weight.dtype
        flat = hidden.flatten(0, -2).to(kind)
        low = product(_dropped(flat, keep, probability), lora_a.to(kind))
        result = product(flat, weight, bias)
        result.addmm_(low, lora_b.to(kind).t(), alpha=scaling)
        return result.unflatten(0, hidden.shape[:-1])

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, lora_a, lora_b, keep = ctx.saved_tensors
        kind, probability = weight.dtype, ctx.probability
        a, b = lora_a.to(kind), lora_b.to(kind)
        gradient = gradient.flatten(0, -2).to(kind)
        kept = _dropped(hidden.flatten(0, -2).to(kind), keep, probability)
        d_low = (gradient @ b).mul_(ctx.scaling)
        d_a = (d_low.t() @ kept).to(lora_a.dtype)
        d_b = (gradient.t() @ product(kept, a).mul_(ctx.scaling)).to(lora_b.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, None, d_a, d_b, None, None, None
        d_hidden = product(gradient, weight.t())
        if keep is None:
            d_hidden.addmm_(d_low, a)
        else:
            d_hidden += _dropped(d_low @ a, keep, probability)
        return d_hidden.to(hidden.dtype).view_as(hidden), None, None, d_a, d_b, None, None, None


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) x up; keeps its arguments alone for the backward pass."""
    return _SwiGlu.apply(gate, up) if torch.is_grad_enabled() else functional.silu(gate).mul_(up)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        d_up = functional.silu(gate).mul_(gradient)
        d_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return d_gate, d_up


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return weight x (hidden / its root mean square), normed in float32; keeps hidden and a number a token."""
    if not torch.is_grad_enabled() and hidden.dtype == torch.float32:
        return functional.rms_norm(hidden, weight.shape, weight, eps)
    return _RmsNorm.apply(hidden, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, eps):
        wide = hidden.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (wide * scale).to(hidden.dtype)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden.float() * scale
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (gradient * normed.to(hidden.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        inner = (gradient * weight).to(hidden.dtype).float()
        mean = (inner * normed).mean(-1, keepdim=True)
        d_hidden = inner.sub_(normed.mul_(mean)).mul_(scale)
        return d_hidden.to(hidden.dtype), d_weight, None


def _dropped(hidden, keep, probability: float):
    return hidden if keep is None else torch.where(keep.view_as(hidden), hidden / (1 - probability), 0)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each position, float32 [n]; logits float32 [n, vocabulary] are used up, labels [n].

    Written out, because torch's own operator gives losses that are 7e-6 too small on CPU (`_sum_in_blocks`).
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
    over = _sum_in_blocks(exponentials).unsqueeze(-1) - 1
    return (torch.log1p(over) + (top - chosen)).squeeze(-1), exponentials, over + 1


def _sum_in_blocks(values: torch.Tensor) -> torch.Tensor:
    """Sum [n, vocabulary] over the vocabulary, `SUM_BLOCK` at a time and then the sums.

    One long float32 sum loses the many small values.
    """
    rest = values.shape[-1] % SUM_BLOCK
    blocks, left = values.split([values.shape[-1] - rest, rest], dim=-1)
    return blocks.unflatten(-1, (-1, SUM_BLOCK)).sum(-1).sum(-1) + left.sum(-1)
