"""The one place that chooses between fused Ascend kernels and plain operators, and the decoder's mathematics.

The fused kernels exist on Ascend only; each plain form has the same shapes and the same meaning.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
SUM_BLOCK = 256

# Primitives, which can stand in a cell's own gradient (functions with cases cannot).
_PRODUCT = operators.MatMul()
_PRODUCT_A = operators.MatMul(transpose_a=True)
_PRODUCT_B = operators.MatMul(transpose_b=True)
_MEAN = operators.ReduceMean(keep_dims=True)
_SUM = operators.ReduceSum()


# MindSpore waits by spinning, which takes a core from what it waits for: a step on two cores takes twice as long. So
# what waits long runs in a thread that the computing threads go before.
NICE = 19


def _go_behind() -> None:
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    # MindSpore starts its threads with the first operators, and they would inherit the priority.
    mindspore.jit(_double)(Tensor(np.ones(1, np.float32))).asnumpy()
    _double(Tensor(np.ones(1, np.float32))).asnumpy()
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def _double(value):
    return value + value


_PATIENT = ThreadPoolExecutor(1, "patient", _go_behind)


def patiently(function: Callable, *arguments):
    """Call a function that waits for results of MindSpore, without taking a core from their computation."""
    if threading.current_thread().name.startswith("patient"):
        return function(*arguments)
    return _PATIENT.submit(function, *arguments).result()


@dataclass(frozen=True)
class Kernels:
    """The operators that were chosen for a device; `softmax` and `norm` say what these run in.

    rms_norm(hidden, weight), rotary(hidden, cosine, sine), swiglu(gate, up),
    attention(query [rows, heads, length, dim], key, value [rows, kv_heads, keys, dim], allowed [rows, length, keys]);
    `segments` is causal attention within segments, over tokens [rows x length, heads, dim].
    """

    name: str
    softmax: str
    norm: str
    rms_norm: Callable
    rotary: Callable
    swiglu: Callable
    attention: Callable
    segments: attention.TiledAttention | attention.FusedAttention


def kernels(spec: ModelSpec, runtime: Runtime) -> Kernels:
    """Choose kernels for a model on a device: fused ones on Ascend, plain operators elsewhere.

    Ascend's flash attention takes 16-bit floats and head sizes that are multiples of 16; others get plain attention.
    """
    precision, eps = runtime.precision, spec.rms_norm_eps
    softmax, tiled = precision.softmax, attention.TiledAttention(spec, precision)
    rest = (_rotary(precision), _Swiglu(), attention.dense(precision), tiled)
    if runtime.device != "npu":
        return Kernels("plain operators", softmax, precision.norm, _RmsNorm(precision, eps), *rest)
    inside = "float32 inside the fused kernel"
    rest = (_rotary(precision), _fused_swiglu, attention.dense(precision), tiled)
    if precision.compute == "float32":
        name = "fused Ascend norm and SwiGLU, plain attention (float32)"
    elif spec.head_dim % 16:
        name = f"fused Ascend norm and SwiGLU, plain attention (head size {spec.head_dim})"
    else:
        name, softmax = "fused Ascend norm, SwiGLU and flash attention", inside
        rest = (_rotary(precision), _fused_swiglu, attention.fused_dense, attention.FusedAttention())
    return Kernels(name, softmax, inside, _fused_rms_norm(eps), *rest)


def dtype(name: str):
    """Return MindSpore's dtype of that name (float32, bfloat16, float16)."""
    return getattr(mindspore, name)


def dtypes(tensors: dict[str, Tensor]) -> str:
    """Return the names of the tensors' dtypes, as in 'float32'."""
    return ", ".join(sorted({str(tensor.dtype).lower().removeprefix("torch.") for tensor in tensors.values()}))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a float32 copy."""
    return patiently(lambda: tensor.astype(mindspore.float32).asnumpy().copy())


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
    """Return (arguments of `function`, gradients of its results) -> the gradients of all arguments.

    Compiled, it computes only those that are used, and runs again only the part of `function` that these need.
    """
    return operators.GradOperation(get_all=True, sens_param=True)(function)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each position, float32 [n]; logits float32 [n, vocabulary], labels int32 [n].

    Written out, because MindSpore's own operator costs three times as much on CPU and gives NaN in float16.
    """
    return _losses_and_sums(logits, labels)[0]


def head_gradients(hidden: Tensor, weight: Tensor, labels: Tensor, real: Tensor, with_weight: bool):
    """Return `real` x the losses of positions, and the gradients of their sum by `hidden` and, if asked, by `weight`.

    hidden [n, hidden], weight [vocabulary, hidden], labels int32 [n], real float32 [n] (0 or 1).
    The logits [n, vocabulary] live in here alone.
    """
    narrow = hidden.astype(weight.dtype)
    logits = linear(narrow, weight).astype(mindspore.float32)
    losses, powers, total = _losses_and_sums(logits, labels)
    shares = (powers * (real / total).expand_dims(-1)).astype(weight.dtype)
    masked = real.astype(weight.dtype).expand_dims(-1)
    by_hidden = _PRODUCT(shares, weight) - operators.gather(weight, labels, 0) * masked
    results = (losses * real, by_hidden.astype(hidden.dtype))
    if with_weight:
        chosen = operators.unsorted_segment_sum(narrow * masked, labels, weight.shape[0])
        results = results + (_PRODUCT_A(shares, narrow) - chosen,)
    return results


def _losses_and_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The losses, the powers exp(logits - the largest) and their sums."""
    top = operators.stop_gradient(operators.amax(logits, -1, True))
    powers = operators.exp(logits - top)
    total = _sum_in_blocks(powers)
    # log1p, because log is 2e-7 too small on CPU; the sum is 1 at least.
    normalizer = operators.log1p(total - 1) + top.squeeze(-1)
    return normalizer - operators.gather_elements(logits, 1, labels.expand_dims(-1)).squeeze(-1), powers, total


def _sum_in_blocks(values: Tensor) -> Tensor:
    """Sum [n, vocabulary] over the vocabulary, `SUM_BLOCK` at a time and then the sums.

    One long float32 sum loses the many small values: losses come out 1.6e-5 too small, gradients 9e-6 (relative).
    """
    rows, length = values.shape
    rest = length % SUM_BLOCK
    total = 0.0
    if length >= SUM_BLOCK:
        blocks = values if not rest else values[:, : length - rest]
        # A product with ones, which takes a third of the time of a sum over a short axis.
        sums = _PRODUCT(blocks.reshape(-1, SUM_BLOCK), operators.ones((SUM_BLOCK, 1), values.dtype))
        total = sums.reshape(rows, -1).sum(-1)
    return total + values[:, length - rest :].sum(-1) if rest else total


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
    kind = dtype(precision.rotary)

    def rotary(hidden, cosine, sine):
        wide = hidden.astype(kind)
        half = hidden.shape[-1] // 2
        turned = operators.concat((-wide[..., half:], wide[..., :half]), -1)
        return (wide * cosine.astype(kind) + turned * sine.astype(kind)).astype(hidden.dtype)

    return rotary


class _Swiglu(nn.Cell):
    """silu(gate) x up; MindSpore's own gradient of silu takes twice as long."""

    def construct(self, gate, up):
        return operators.silu(gate) * up

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
