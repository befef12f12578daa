"""The one place that chooses between fused Ascend kernels and plain operators, and the decoder's mathematics.

The fused kernels exist on Ascend only; each plain form has the same shapes and the same meaning.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mindspore
import numpy as np
from mindspore import Tensor, nn
from mindspore import ops as operators

from msft.backend import random
from msft.backend.contract import Precision, Runtime
from msft.backend.mindspore import attention
from msft.models.spec import ModelSpec

# Supervised positions whose logits are made at a time: 256 x 49152 float32 are 50 MB.
LOSS_CHUNK = 256

# Primitives, which can stand in a cell's own gradient (functions with cases cannot).
_PRODUCT = operators.MatMul()
_PRODUCT_A = operators.MatMul(transpose_a=True)
_PRODUCT_B = operators.MatMul(transpose_b=True)
_MEAN = operators.ReduceMean(keep_dims=True)
_SUM = operators.ReduceSum()


@dataclass(frozen=True)
class Kernels:
    """The operators that were chosen for a device; `softmax` and `norm` say what these run in.

    rms_norm(hidden, weight), rotary(hidden, cosine, sine), swiglu(gate, up),
    cached_attention(query [rows, heads, length, dim], key, value [rows, kv_heads, keys, dim], allowed [rows, length,
    keys]); `attention` is causal attention within the segments of a line.
    """

    name: str
    softmax: str
    norm: str
    rms_norm: Callable
    rotary: Callable
    swiglu: Callable
    cached_attention: Callable
    attention: attention.TiledAttention | attention.FusedAttention


def kernels(spec: ModelSpec, runtime: Runtime) -> Kernels:
    """Choose kernels for a model on a device: fused ones on Ascend, plain operators elsewhere.

    Ascend's flash attention takes 16-bit floats and head sizes that are multiples of 16; others get plain attention.
    """
    precision, eps = runtime.precision, spec.rms_norm_eps
    softmax, tiled = precision.softmax, attention.TiledAttention(spec, precision)
    plain = (attention.dense(precision), tiled)
    rotary, norm = _rotary(precision), _RmsNorm(precision, eps)
    if runtime.device != "npu":
        return Kernels("plain operators, pairs of tiles", softmax, precision.norm, norm, rotary, _Swiglu(), *plain)
    inside = "float32 inside the fused kernel"
    if precision.compute == "float32":
        name = "fused Ascend norm and SwiGLU, plain attention (float32)"
    elif spec.head_dim % 16:
        name = f"fused Ascend norm and SwiGLU, plain attention (head size {spec.head_dim})"
    else:
        name, softmax = "fused Ascend norm, SwiGLU and flash attention", inside
        plain = (attention.fused_dense, attention.FusedAttention(spec))
    return Kernels(name, softmax, inside, _fused_rms_norm(eps), rotary, _fused_swiglu, *plain)


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


def gradient(function: Callable) -> Callable:
    """Return (arguments of `function`, gradient of its result) -> the gradients of all arguments.

    Compiled, it computes only those that are used, and runs again only the part of `function` that these need.
    """
    return operators.GradOperation(get_all=True, sens_param=True)(function)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each position, float32 [n]; logits float32 [n, vocabulary], labels int32 [n]."""
    # The primitive is five times as fast as a maximum, a difference, a power and a sum.
    logarithms = operators.LogSoftmax(-1)(logits)
    return -operators.gather_elements(logarithms, 1, labels.expand_dims(-1)).squeeze(-1)


def token_losses_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return `token_losses` and the gradient of their sum, float32 [n, vocabulary]."""
    shares = operators.Softmax(-1)(logits)
    places = labels.expand_dims(-1)
    # Here, not behind the products with it, where most of a large share would be rounded away.
    ones = operators.ones_like(places).astype(mindspore.float32)
    return token_losses(logits, labels), operators.tensor_scatter_elements(shares, places, -ones, 1, "add")


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left [n, k] x right [k, m]."""
    return _PRODUCT(left, right)


def product_a(left: Tensor, right: Tensor) -> Tensor:
    """Return left [k, n] transposed x right [k, m]."""
    return _PRODUCT_A(left, right)


def linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden x weight transposed, in hidden's dtype; hidden [n, in], weight [out, in]."""
    return _LINEAR(hidden, weight.astype(hidden.dtype))


class _Linear(nn.Cell):
    """With gradients that are one product each; MindSpore's own come with copies."""

    def construct(self, hidden, weight):
        return _PRODUCT_B(hidden, weight)

    def bprop(self, hidden, weight, output, gradient):
        return _PRODUCT(gradient, weight), _PRODUCT_A(gradient, hidden)


_LINEAR = _Linear()


class _RmsNorm(nn.Cell):
    """RMSNorm over the last axis, in the precision's norm dtype."""

    def __init__(self, precision: Precision, eps: float):
        super().__init__()
        self.kind = dtype(precision.norm)
        self.eps = eps

    def construct(self, hidden, weight):
        return self.normed(hidden)[0].astype(hidden.dtype) * weight.astype(hidden.dtype)

    def bprop(self, hidden, weight, output, gradient):
        normed, scale = self.normed(hidden)
        wide = (gradient * weight.astype(gradient.dtype)).astype(self.kind)
        inner = (wide - normed * _MEAN(wide * normed, -1)) * scale
        by_weight = _SUM((gradient * normed.astype(gradient.dtype)).reshape(-1, weight.shape[0]), 0)
        return inner.astype(hidden.dtype), by_weight.astype(weight.dtype)

    def normed(self, hidden):
        wide = hidden.astype(self.kind)
        scale = operators.rsqrt(_MEAN(operators.square(wide), -1) + self.eps)
        return wide * scale, scale


def _rotary(precision: Precision) -> Callable:
    return _Rotary(precision)


class _Rotary(nn.Cell):
    """The rotary embedding in the precision's rotary dtype; MindSpore's own gradient of slices is slow on CPU."""

    def __init__(self, precision: Precision):
        super().__init__()
        self.kind = dtype(precision.rotary)

    def construct(self, hidden, cosine, sine):
        wide = hidden.astype(self.kind)
        half = hidden.shape[-1] // 2
        turned = operators.concat((-wide[..., half:], wide[..., :half]), -1)
        return (wide * cosine.astype(self.kind) + turned * sine.astype(self.kind)).astype(hidden.dtype)

    def bprop(self, hidden, cosine, sine, output, gradient):
        wide = gradient.astype(self.kind)
        half = hidden.shape[-1] // 2
        upper = wide * sine.astype(self.kind)
        turned = operators.concat((upper[..., half:], -upper[..., :half]), -1)
        by_hidden = (wide * cosine.astype(self.kind) + turned).astype(hidden.dtype)
        return by_hidden, operators.zeros_like(cosine), operators.zeros_like(sine)


class _Swiglu(nn.Cell):
    """silu(gate) x up, silu as two operators: its own takes twice their time on CPU, its gradient too."""

    def construct(self, gate, up):
        return gate * operators.sigmoid(gate) * up

    def bprop(self, gate, up, output, gradient):
        share = operators.sigmoid(gate)
        silu = gate * share
        return gradient * up * (share + share * (gate - silu)), gradient * silu


def _fused_rms_norm(eps: float) -> Callable:
    def rms_norm(hidden, weight):
        # The primitive, because the function's arguments change after MindSpore 2.9.
        return operators.RmsNorm(eps)(hidden, weight.astype(hidden.dtype))[0]

    return rms_norm


def _fused_swiglu(gate, up):
    return operators.swiglu(operators.concat((gate, up), -1), -1)
