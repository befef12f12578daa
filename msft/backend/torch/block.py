"""What a decoder's block is made of, as operators that keep little for their gradients and compute no frozen ones."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional

from msft.backend.torch import placed

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
MKL = torch.backends.mkl.is_available()
# Rows up to which MKL's vector products are the fastest, and up to which oneDNN's product the other way round is.
VECTORS = 5
NARROW = 64
# A batch of products is shared out among threads, a single product with a vector is not.
PARTS = 2


def products(device: str, compute: str) -> str:
    """Say what computes the products of a dtype on a device."""
    return "oneDNN" if ONEDNN and device == "cpu" and compute == "float32" else "torch's own"


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return rows x weight transposed + bias; rows [n, in], weight [out, in], both of one dtype.

    On CPU in float32 by oneDNN, which takes a tenth less time than MKL, and half for a single row.
    """
    if ONEDNN and rows.dtype == torch.float32 and rows.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return functional.linear(rows, weight, bias)


def few_rows(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return what `product` does, for the few rows of newly generated tokens, where reading the weight is the cost.

    On CPU in float32 the weight is the left factor: up to `VECTORS` rows as a batch of its parts by MKL, which reads
    as fast as memory gives, and up to `NARROW` by oneDNN, which rearranges its right factor for each call.
    """
    count = len(rows)
    if not ONEDNN or count > NARROW or rows.dtype != torch.float32 or rows.device.type != "cpu":
        return product(rows, weight, bias)
    if MKL and count <= VECTORS and weight.shape[0] % PARTS == 0:
        parts = weight.unflatten(0, (PARTS, -1))
        result = torch.bmm(parts, rows.t().expand(PARTS, -1, -1)).flatten(0, 1).t()
    else:
        result = torch.ops.mkldnn._linear_pointwise(weight, rows, None, "none", [], "").t()
    return result if bias is None else result + bias


def bias(part: torch.nn.Module) -> torch.Tensor | None:
    """Return what this rank adds of a linear module's bias: one rank adds a bias that all ranks of a model have."""
    found = placed.local(part, "bias")
    if found is None or part.adds_bias:
        return found
    # Zeros: what has a gradient must have one on every rank of a model, or some would wait for sums of the others.
    return found * 0 if found.requires_grad else None


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
        kind = weight.dtype
        flat = hidden.flatten(0, -2).to(kind)
        low = product(_dropped(flat, keep, probability), lora_a.to(kind))
        result = product(flat, weight, bias)
        result.addmm_(low, lora_b.to(kind).t(), alpha=scaling)
        ctx.save_for_backward(hidden, weight, lora_a, lora_b, keep, low)
        ctx.scaling, ctx.probability = scaling, probability
        return result.unflatten(0, hidden.shape[:-1])

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, lora_a, lora_b, keep, low = ctx.saved_tensors
        kind, probability = weight.dtype, ctx.probability
        a, b = lora_a.to(kind), lora_b.to(kind)
        gradient = gradient.flatten(0, -2).to(kind)
        kept = _dropped(hidden.flatten(0, -2).to(kind), keep, probability)
        d_low = (gradient @ b).mul_(ctx.scaling)
        d_a = (d_low.t() @ kept).to(lora_a.dtype)
        d_b = (gradient.t() @ low).mul_(ctx.scaling).to(lora_b.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, None, d_a, d_b, None, None, None
        d_hidden = product(gradient, weight.t())
        if keep is None:
            d_hidden.addmm_(d_low, a)
        else:
            d_hidden += _dropped(d_low @ a, keep, probability)
        return d_hidden.to(hidden.dtype).view_as(hidden), None, None, d_a, d_b, None, None, None


def rotate(query, key, cosine, sine, parts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return query and key turned to their positions (RoFormer, halves as in transformers' Llama).

    query [rows, heads, length, dim], key [rows, kv_heads, length, dim]; cosine, sine [rows, length, dim], whose second
    half repeats the first. Where a head has several `parts`, each is turned by itself.
    """
    return tuple(_Rotate.apply(heads, cosine.unsqueeze(1), sine.unsqueeze(1), parts) for heads in (query, key))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads, cosine, sine, parts):
        ctx.save_for_backward(cosine, sine)
        ctx.kind, ctx.parts = heads.dtype, parts
        return _turned(heads, cosine, sine, 1, parts)

    @staticmethod
    def backward(ctx, gradient):
        return _turned(gradient, *ctx.saved_tensors, -1, ctx.parts).to(ctx.kind), None, None, None


def _turned(heads, cosine, sine, direction: int, parts: int) -> torch.Tensor:
    result = heads * cosine
    (left, right), (new_left, new_right), (sine, _) = (_pairs(of, parts) for of in (heads, result, sine))
    new_left.addcmul_(right, sine, value=-direction)
    new_right.addcmul_(left, sine, value=direction)
    return result


def _pairs(values, parts: int) -> tuple[torch.Tensor, ...]:
    """The first and the second half of each part of the last axis, as views."""
    return values.unflatten(-1, (parts, 2, -1)).unbind(-2)


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
        d_gate = gradient * up
        torch.ops.aten.silu_backward(d_gate, gate, grad_input=d_gate)
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


def enter(hidden: torch.Tensor, reduce: Callable) -> torch.Tensor:
    """Return hidden states for modules that are cut by their outputs: each rank's gradient is a share of the whole."""
    return _Enter.apply(hidden, reduce)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, reduce):
        ctx.reduce = reduce
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.reduce(gradient), None


def leave(output: torch.Tensor, reduce: Callable) -> torch.Tensor:
    """Return the sum of what modules give that are cut by their inputs."""
    return _Leave.apply(output, reduce)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, reduce):
        return reduce(output)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _as_it_is(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _as_they_are(*_):
    return nullcontext()


class Parts(NamedTuple):
    """What lies between a block's products: operators that take the arguments of this module's of the same names.

    `enter` and `leave` stand around what is cut over ranks; inside `keep`(hidden, entered) modules read what entered.
    """

    name: str = "each its own operator"
    rms_norm: Callable = rms_norm
    rotate: Callable = rotate
    swiglu: Callable = swiglu
    enter: Callable = _as_it_is
    leave: Callable = _as_it_is
    keep: Callable = _as_they_are

    def read(self, hidden: torch.Tensor, *modules: Callable) -> tuple[torch.Tensor, ...]:
        """Return what each of the modules gives that are cut by their outputs and read the same hidden states."""
        entered = self.enter(hidden)
        with self.keep(hidden, entered):
            return tuple(module(entered) for module in modules)


def cut_parts(parts: Parts, reduce: Callable) -> Parts:
    """Return the parts of a model that is cut over ranks, whose values `reduce` sums."""
    return parts._replace(enter=partial(enter, reduce=reduce), leave=partial(leave, reduce=reduce))


def liger_parts() -> Parts:
    """Return Liger's fused kernels, https://github.com/linkedin/Liger-Kernel, for CUDA."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rms_norm(hidden, weight, eps):
        # The offset of the weight, what is in float32, and whether the gradient may take the place of its argument.
        return LigerRMSNormFunction.apply(hidden, weight, eps, 0.0, "llama", False)

    return Parts("Liger", rms_norm, LigerRopeFunction.apply, LigerSiLUMulFunction.apply)


def compiled_parts() -> Parts:
    """Return formulas that torch compiles, with their gradients, when they first meet one."""
    return Parts(
        "torch.compile",
        _compiled(plain_rms_norm, rms_norm),
        _compiled(plain_rotate, rotate),
        _compiled(plain_swiglu, swiglu),
    )


def _compiled(formula: Callable, operator: Callable) -> Callable:
    """A formula compiled for any number of tokens, with its gradient; without a gradient the operator itself."""
    compiled = torch.compile(formula, dynamic=True)

    def chosen(*arguments):
        learns = torch.is_grad_enabled() and arguments[0].requires_grad
        return (compiled if learns else operator)(*arguments)

    return chosen


def plain_rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return what `rms_norm` does, as a formula that can be compiled."""
    wide = hidden.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def plain_rotate(query, key, cosine, sine) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `rotate` does, as a formula that can be compiled."""
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    query, key = (
        heads * cosine + torch.cat((-right, left), -1) * sine
        for heads in (query, key)
        for left, right in [heads.chunk(2, -1)]
    )
    return query, key


def plain_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return what `swiglu` does, as a formula that can be compiled."""
    return functional.silu(gate) * up
