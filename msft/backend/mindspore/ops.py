"""The one place that chooses between fused Ascend kernels and plain operators, and the decoder's mathematics.

The fused kernels exist on Ascend only; each plain form has the same shapes and the same meaning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

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

    rms_norm(hidden, weight), swiglu(gate, up), rotary(heads [tokens, features], cosine, sine, see `rotary_tables`),
    cached_attention(query [rows, heads, length, dim], key, value [rows, kv_heads, keys, dim], allowed [rows, length,
    keys]).
    """

    name: str
    softmax: str
    norm: str
    rms_norm: Callable
    rotary: Callable
    swiglu: Callable
    cached_attention: Callable
    is_attention_fused: bool


def kernels(spec: ModelSpec, runtime: Runtime) -> Kernels:
    """Choose kernels for a model on a device: fused ones on Ascend, plain operators elsewhere.

    Ascend's flash attention takes 16-bit floats and head sizes that are multiples of 16; others get plain attention.
    """
    return _kernels(spec.head_dim, spec.rms_norm_eps, runtime.precision, runtime.device)


@cache
def _kernels(dim: int, eps: float, precision: Precision, device: str) -> Kernels:
    """The same object for equal arguments, so that what is compiled with it serves every model of a process."""
    softmax, rotary, dense = precision.softmax, _Rotary(precision, dim), attention.dense(precision)
    if device != "npu":
        norm = _RmsNorm(precision, eps)
        name = "plain operators, tiles of queries"
        return Kernels(name, softmax, precision.norm, norm, rotary, _Swiglu(), dense, False)
    inside = "float32 inside the fused kernel"
    rms_norm, swiglu = _fused_rms_norm(eps), _fused_swiglu
    if precision.compute == "float32":
        name = "fused Ascend norm and SwiGLU, plain attention (float32)"
    elif dim % 16:
        name = f"fused Ascend norm and SwiGLU, plain attention (head size {dim})"
    else:
        name = "fused Ascend norm, SwiGLU and flash attention"
        return Kernels(name, inside, inside, rms_norm, rotary, swiglu, attention.fused_dense, True)
    return Kernels(name, softmax, inside, rms_norm, rotary, swiglu, dense, False)


def line_attention(
    spec: ModelSpec, runtime: Runtime, is_shared: bool
) -> attention.TiledAttention | attention.FusedAttention:
    """Return causal attention within the segments of a line, which ranks may share, by the chosen kernels."""
    if kernels(spec, runtime).is_attention_fused:
        return (attention.SharedFusedAttention if is_shared else attention.FusedAttention)(spec)
    return (attention.SharedTiledAttention if is_shared else attention.TiledAttention)(spec, runtime.precision)


def rotary_tables(spec: ModelSpec, cosine: np.ndarray, sine: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return tables for queries, keys and values side by side, [tokens, (heads + 2 kv_heads) x dim].

    `cosine` and `sine` float32 [tokens, dim] hold the same angles in both halves. The sine's first half is negative;
    values are not turned. Whole tables, because broadcast ones take twice the time on CPU.
    """
    turned, still = spec.num_attention_heads + spec.num_key_value_heads, spec.num_key_value_heads * spec.head_dim
    half = spec.head_dim // 2
    signed = np.concatenate((-sine[:, :half], sine[:, half:]), 1)
    cosine = np.pad(np.tile(cosine, (1, turned)), ((0, 0), (0, still)), constant_values=1)
    return Tensor(cosine), Tensor(np.pad(np.tile(signed, (1, turned)), ((0, 0), (0, still))))


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
    return _losses_and_shares(logits, labels)[0]


def token_losses_and_gradient(logits: Tensor, labels: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return `token_losses` and the gradient of their sum, each times its scale [n], float32 [n, vocabulary]."""
    losses, shares, total = _losses_and_shares(logits, labels)
    # Here, not behind the products with it, where most of a large share would be rounded away.
    gradient = operators.tensor_scatter_elements(shares, labels.expand_dims(-1), -total, 1, "add")
    return losses, gradient * (scales.expand_dims(-1) / total)


def _losses_and_shares(logits, labels):
    """Losses [n], and each token's share [n, vocabulary] of a total [n, 1] that is nearly 1.

    `LogSoftmax` is five times as fast as a maximum, a difference, a power and a sum, but its long sum is up to 1e-5
    off; the shares' total, by a product with ones, tells by how much.
    """
    logarithms = operators.LogSoftmax(-1)(logits)
    shares = operators.exp(logarithms)
    total = operators.matmul(shares, operators.ones((logits.shape[1], 1), shares.dtype))
    chosen = operators.gather_elements(logarithms, 1, labels.expand_dims(-1))
    return (operators.log1p(total - 1) - chosen).squeeze(-1), shares, total


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
        wide = hidden.astype(self.kind)
        return (wide * self.scale(wide)).astype(hidden.dtype) * weight.astype(hidden.dtype)

    def bprop(self, hidden, weight, output, gradient):
        wide = hidden.astype(self.kind)
        scale = self.scale(wide)
        upper = (gradient * weight.astype(gradient.dtype)).astype(self.kind)
        inner = _MEAN(upper * wide, -1) * scale * scale * scale
        by_weight = _SUM((gradient.astype(self.kind) * (wide * scale)).reshape(-1, weight.shape[0]), 0)
        return (upper * scale - wide * inner).astype(hidden.dtype), by_weight.astype(weight.dtype)

    def scale(self, wide):
        return operators.rsqrt(_MEAN(operators.square(wide), -1) + self.eps)


class _Rotary(nn.Cell):
    """The rotary embedding of heads side by side, in the precision's rotary dtype."""

    def __init__(self, precision: Precision, dim: int):
        super().__init__()
        self.kind = dtype(precision.rotary)
        self.half = dim // 2

    def construct(self, heads, cosine, sine):
        wide = heads.astype(self.kind)
        first, second = operators.split(wide.reshape(-1, 2 * self.half), self.half, 1)
        swapped = operators.concat((second, first), 1).reshape(heads.shape)
        return (wide * cosine.astype(self.kind) + swapped * sine.astype(self.kind)).astype(heads.dtype)


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
