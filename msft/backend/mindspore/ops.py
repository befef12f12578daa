"""The one place that chooses between fused Ascend kernels and plain operators, and the decoder's mathematics.

The fused kernels exist on Ascend only; each plain form has the same shapes and the same meaning.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import random
from msft.backend.contract import Precision, Runtime
from msft.backend.mindspore import attention
from msft.models.spec import ModelSpec

# Supervised positions whose logits are made at a time: 256 x 49152 float32 are 50 MB. In training one such array of
# each chunk stays until the backward pass.
LOSS_CHUNK = 256
SUM_BLOCK = 256


@dataclass(frozen=True)
class Kernels:
    """The operators that were chosen for a device; `softmax` and `norm` say what these run in.

    rms_norm(hidden, weight, eps), rotary(hidden, cosine, sine), swiglu(gate, up),
    attention(query [rows, heads, length, dim], key, value [rows, kv_heads, keys, dim], allowed [rows, length, keys]).
    """

    name: str
    softmax: str
    norm: str
    rms_norm: Callable
    rotary: Callable
    swiglu: Callable
    attention: Callable


def kernels(spec: ModelSpec, runtime: Runtime) -> Kernels:
    """Choose kernels for a model on a device: fused ones on Ascend, plain operators elsewhere.

    Ascend's flash attention takes 16-bit floats and head sizes that are multiples of 16; others get plain attention.
    """
    precision = runtime.precision
    rotary, softmax, attend = _rotary(precision), precision.softmax, attention.dense(precision)
    if runtime.device != "npu":
        norm = _rms_norm(precision)
        return Kernels("plain operators", softmax, precision.norm, norm, rotary, _swiglu, attend)
    inside = "float32 inside the fused kernel"
    if precision.compute == "float32":
        name = "fused Ascend norm and SwiGLU, plain attention (float32)"
    elif spec.head_dim % 16:
        name = f"fused Ascend norm and SwiGLU, plain attention (head size {spec.head_dim})"
    else:
        name, softmax, attend = "fused Ascend norm, SwiGLU and flash attention", inside, attention.fused
    return Kernels(name, softmax, inside, _fused_rms_norm, rotary, _fused_swiglu, attend)


def dtype(name: str):
    """Return MindSpore's dtype of that name (float32, bfloat16, float16)."""
    return getattr(mindspore, name)


def dtypes(tensors: dict[str, Tensor]) -> str:
    """Return the names of the tensors' dtypes, as in 'float32'."""
    return ", ".join(sorted({str(tensor.dtype).lower().removeprefix("torch.") for tensor in tensors.values()}))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a float32 copy."""
    return tensor.astype(mindspore.float32).asnumpy().copy()


def from_numpy(array: np.ndarray, device: str, kind: str) -> Tensor:
    """Return a tensor of dtype `kind` that shares nothing with `array`; bfloat16 arrays are ml_dtypes'."""
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    return Tensor(np.array(array, order="C"), dtype=dtype(kind))


def keep_mask(tokens: Tensor, features: Tensor, probability: float) -> Tensor:
    """`random.keep_mask` on tensors: bool [rows, length, features] from int32 keys."""
    bits = operators.bitwise_xor(operators.expand_dims(tokens, -1), features)
    bits = bits * random.MULTIPLIER
    bits = operators.bitwise_xor(
        bits, operators.bitwise_and(operators.bitwise_right_shift(bits, random.SHIFT), random.SHIFT_MASK)
    )
    bits = bits * random.MULTIPLIER_2
    return bits >= random.keep_threshold(probability)


def dropout(hidden: Tensor, tokens: Tensor, features: Tensor, probability: float) -> Tensor:
    """Return hidden [rows, length, features] with dropped elements 0 and kept ones scaled up."""
    keep = keep_mask(tokens, features, probability)
    return operators.where(keep, hidden / (1 - probability), operators.zeros_like(hidden))


def recomputed(function: Callable, differentiated: tuple[int, ...]) -> Callable:
    """Return `function` compiled so that only its arguments are kept, and its forward pass is run again backwards.

    `differentiated` are the positions of the arguments that get gradients.
    """
    forward_pass = mindspore.jit(function)

    def projected(gradient, *arguments):
        return (function(*arguments) * gradient).sum()

    backward_pass = mindspore.jit(mindspore.grad(projected, tuple(position + 1 for position in differentiated)))

    class Recomputed(mindspore.common._Function):
        @staticmethod
        def forward(context, *arguments):
            context.save_for_backward(*arguments)
            return forward_pass(*arguments)

        @staticmethod
        def backward(context, gradient):
            arguments = context.saved_tensors
            gradients = backward_pass(gradient, *arguments)
            # For a single argument MindSpore returns its gradient bare.
            gradients = (gradients,) if len(differentiated) == 1 else gradients
            found = dict(zip(differentiated, gradients, strict=True))
            return tuple(found.get(position) for position in range(len(arguments)))

    return Recomputed.apply


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each position, float32 [n]; logits float32 [n, vocabulary], labels int32 [n].

    Written out, because MindSpore's own operator costs three times as much on CPU and gives NaN in float16.
    """
    top = operators.stop_gradient(operators.amax(logits, -1, True))
    # log1p, because log is 2e-7 too small on CPU; the sum is 1 at least.
    normalizer = operators.log1p(_sum_in_blocks(operators.exp(logits - top)) - 1) + top.squeeze(-1)
    return normalizer - operators.gather_elements(logits, 1, labels.expand_dims(-1)).squeeze(-1)


def _sum_in_blocks(values: Tensor) -> Tensor:
    """Sum [n, vocabulary] over the vocabulary, `SUM_BLOCK` at a time and then the sums.

    One long float32 sum loses the many small values: losses come out 1.6e-5 too small, gradients 9e-6 (relative).
    """
    rows, length = values.shape
    rest = length % SUM_BLOCK
    blocks = values if not rest else values[:, : length - rest]
    total = blocks.reshape(rows, -1, SUM_BLOCK).sum(-1).sum(-1) if length >= SUM_BLOCK else 0.0
    return total + values[:, length - rest :].sum(-1) if rest else total


def linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden x weight transposed, in hidden's dtype; weight [out, in]."""
    return operators.dense(hidden, weight.astype(hidden.dtype))


def _rms_norm(precision: Precision) -> Callable:
    kind = dtype(precision.norm)

    def rms_norm(hidden, weight, eps):
        wide = hidden.astype(kind)
        scale = operators.rsqrt(operators.mean(operators.square(wide), -1, True) + eps)
        return (wide * scale).astype(hidden.dtype) * weight.astype(hidden.dtype)

    return rms_norm


def _rotary(precision: Precision) -> Callable:
    kind = dtype(precision.rotary)

    def rotary(hidden, cosine, sine):
        wide = hidden.astype(kind)
        half = hidden.shape[-1] // 2
        turned = operators.concat((-wide[..., half:], wide[..., :half]), -1)
        return (wide * cosine.astype(kind) + turned * sine.astype(kind)).astype(hidden.dtype)

    return rotary


def _swiglu(gate, up):
    return operators.silu(gate) * up


def _fused_rms_norm(hidden, weight, eps):
    # The primitive, because the function's arguments change after MindSpore 2.9.
    return operators.RmsNorm(eps)(hidden, weight.astype(hidden.dtype))[0]


def _fused_swiglu(gate, up):
    return operators.swiglu(operators.concat((gate, up), -1), -1)
