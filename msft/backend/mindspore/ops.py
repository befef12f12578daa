"""The one place that chooses between fused Ascend kernels and plain operators, and the decoder's mathematics.

The fused kernels exist on Ascend only; each plain form has the same shapes and the same meaning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Tensor, nn
from mindspore import ops as operators

from msft.backend import random
from msft.backend.contract import Precision, Runtime
from msft.backend.mindspore import attention, fused_attention
from msft.models import rope
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

    normed(hidden, weight, and for LayerNorm bias), rotary(heads [tokens, features], cosine, sine, see `rotary_tables`),
    gated(gate, up) or where the feed-forward has no gate activated(wide).
    """

    name: str
    softmax: str
    norm: str
    normed: Callable
    rotary: Callable
    gated: Callable
    activated: Callable
    is_attention_fused: bool


def kernels(spec: ModelSpec, runtime: Runtime) -> Kernels:
    """Choose kernels for a model on a device: fused ones on Ascend, plain operators elsewhere.

    Ascend's flash attention takes 16-bit floats and head sizes that are multiples of 16, and has neither soft caps nor
    ALiBi, relative positions or contexts that are read in both directions here; others get plain attention, and so do
    lines with examples that are longer than a layer's window.
    """
    reasons = {
        "soft cap": spec.attention_cap,
        "ALiBi": spec.has_alibi,
        "context in both directions": spec.prefix,
        "relative positions": spec.encoder,
    }
    plain = next((reason for reason, is_there in reasons.items() if is_there), "")
    return _kernels(_Form.of(spec), plain, runtime.precision, runtime.device)


class _Form(NamedTuple):
    """What of a model its kernels depend on."""

    head_dim: int
    rotary_dim: int
    neighbours: bool
    norm: str
    norm_eps: float
    norm_offset: float
    activation: str

    @classmethod
    def of(cls, spec: ModelSpec) -> "_Form":
        return cls(*(getattr(spec, name) for name in cls._fields[:-1]), spec.block.activation)


@cache
def _kernels(form: _Form, plain: str, precision: Precision, device: str) -> Kernels:
    """The same object for equal arguments, so that what is compiled with it serves every model of a process.

    `plain` says why attention cannot be fused.
    """
    softmax, rotary, activate = precision.softmax, _rotary(form, precision), ACTIVATIONS[form.activation]
    if device != "npu":
        norm = _norm(form, precision)
        gated = _Swiglu() if form.activation == "silu" else _gated(activate)
        name = "plain operators, tiles of queries"
        return Kernels(name, softmax, precision.norm, norm, rotary, gated, activate, False)
    inside = "float32 inside the fused kernel"
    if form.norm == "rms" and not form.norm_offset:
        norm, in_norm, fused = _fused_rms_norm(form.norm_eps), inside, "norm"
    else:
        norm, in_norm, fused = _norm(form, precision), precision.norm, ""
    gated = _fused_swiglu if form.activation == "silu" else _gated(activate)
    fused = " and ".join(filter(None, (fused, "SwiGLU" if form.activation == "silu" else "")))
    plain = plain or ("float32" if precision.compute == "float32" else "")
    plain = plain or (f"head size {form.head_dim}" if form.head_dim % 16 else "")
    if plain:
        name = f"fused Ascend {fused}, plain attention ({plain})" if fused else f"plain operators ({plain})"
        return Kernels(name, softmax, in_norm, norm, rotary, gated, activate, False)
    name = f"fused Ascend {fused}, flash attention" if fused else "Ascend's flash attention"
    return Kernels(name, inside, in_norm, norm, rotary, gated, activate, True)


def line_attention(
    spec: ModelSpec, runtime: Runtime, is_shared: bool, window: int = 0
) -> attention.TiledAttention | fused_attention.FusedAttention:
    """Return causal attention within the segments of a line, which ranks may share, by the chosen kernels.

    A query sees no more than the last `window` tokens (0 = all).
    """
    if kernels(spec, runtime).is_attention_fused and not window:
        return (fused_attention.SharedFusedAttention if is_shared else fused_attention.FusedAttention)(spec)
    kind = attention.SharedTiledAttention if is_shared else attention.TiledAttention
    return kind(spec, runtime.precision, window)


def rotary_tables(spec: ModelSpec, cosine: np.ndarray, sine: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return tables for queries, keys and values side by side, [tokens, (heads + 2 kv_heads) x dim].

    `cosine` and `sine` float32 [tokens, dim] are those of `rope.tables`. The sine is negative where a feature is the
    first of a pair; values are not turned. Whole tables, because broadcast ones take twice the time on CPU.
    """
    turned, still = spec.num_attention_heads + spec.num_key_value_heads, spec.num_key_value_heads * spec.head_dim
    signed = sine * rope.signs(spec)
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


def _norm(form: _Form, precision: Precision) -> Callable:
    if form.norm == "layer":
        return _LayerNorm(precision, form.norm_eps)
    return _RmsNorm(precision, form.norm_eps, form.norm_offset)


class _RmsNorm(nn.Cell):
    """RMSNorm over the last axis, in the precision's norm dtype.

    A weight that `offset` is added to is meant in that dtype, as Gemma means it; others in that of the hidden states.
    """

    def __init__(self, precision: Precision, eps: float, offset: float = 0.0):
        super().__init__()
        self.kind = dtype(precision.norm)
        self.eps, self.offset = eps, offset

    def construct(self, hidden, weight):
        wide = hidden.astype(self.kind)
        normed = wide * self.scale(wide)
        if self.offset:
            return (normed * (weight.astype(self.kind) + self.offset)).astype(hidden.dtype)
        return normed.astype(hidden.dtype) * weight.astype(hidden.dtype)

    def bprop(self, hidden, weight, output, gradient):
        wide = hidden.astype(self.kind)
        scale = self.scale(wide)
        if self.offset:
            upper = gradient.astype(self.kind) * (weight.astype(self.kind) + self.offset)
        else:
            upper = (gradient * weight.astype(gradient.dtype)).astype(self.kind)
        inner = _MEAN(upper * wide, -1) * scale * scale * scale
        by_weight = _SUM((gradient.astype(self.kind) * (wide * scale)).reshape(-1, weight.shape[0]), 0)
        return (upper * scale - wide * inner).astype(hidden.dtype), by_weight.astype(weight.dtype)

    def scale(self, wide):
        return operators.rsqrt(_MEAN(operators.square(wide), -1) + self.eps)


class _LayerNorm(nn.Cell):
    """LayerNorm over the last axis, in the precision's norm dtype."""

    def __init__(self, precision: Precision, eps: float):
        super().__init__()
        self.kind = dtype(precision.norm)
        self.eps = eps

    def construct(self, hidden, weight, bias):
        normed, _ = self.normed(hidden)
        return normed.astype(hidden.dtype) * weight.astype(hidden.dtype) + bias.astype(hidden.dtype)

    def bprop(self, hidden, weight, bias, output, gradient):
        normed, scale = self.normed(hidden)
        wide = gradient.astype(self.kind)
        upper = wide * weight.astype(self.kind)
        by_hidden = (upper - _MEAN(upper, -1) - normed * _MEAN(upper * normed, -1)) * scale
        by_weight = _SUM((wide * normed).reshape(-1, weight.shape[0]), 0)
        by_bias = _SUM(wide.reshape(-1, weight.shape[0]), 0)
        return by_hidden.astype(hidden.dtype), by_weight.astype(weight.dtype), by_bias.astype(bias.dtype)

    def normed(self, hidden):
        wide = hidden.astype(self.kind)
        wide = wide - _MEAN(wide, -1)
        scale = operators.rsqrt(_MEAN(operators.square(wide), -1) + self.eps)
        return wide * scale, scale


def _rotary(form: _Form, precision: Precision) -> Callable:
    """What turns heads side by side; tables do not turn what is not to be turned."""
    if form.rotary_dim == 0:
        return _as_it_is
    return _Rotary(precision, form.head_dim, form.rotary_dim, form.neighbours)


def _as_it_is(heads, cosine, sine):
    return heads


class _Rotary(nn.Cell):
    """The rotary embedding of heads side by side, in the precision's rotary dtype."""

    def __init__(self, precision: Precision, dim: int, turned: int, neighbours: bool = False):
        super().__init__()
        self.kind = dtype(precision.rotary)
        self.half = 1 if neighbours else turned // 2
        # Where a head is no multiple of what is turned, the rest of it is swapped with nothing.
        self.width = 2 * self.half if dim % (2 * self.half) == 0 else dim

    def construct(self, heads, cosine, sine):
        wide = heads.astype(self.kind)
        rows = wide.reshape(-1, self.width)
        if self.width == 2 * self.half:
            first, second = operators.split(rows, self.half, 1)
            swapped = operators.concat((second, first), 1)
        else:
            first, second, rest = operators.split(rows, (self.half, self.half, self.width - 2 * self.half), 1)
            swapped = operators.concat((second, first, rest), 1)
        swapped = swapped.reshape(heads.shape)
        return (wide * cosine.astype(self.kind) + swapped * sine.astype(self.kind)).astype(heads.dtype)


def _silu(values):
    return values * operators.sigmoid(values)


def _gelu(values):
    return values * (0.5 * (1 + operators.erf(values * 0.7071067811865476)))


def _gelu_tanh(values):
    # The same by a sigmoid; MindSpore's hyperbolic tangent is 1e-4 off on CPU.
    return values * operators.sigmoid(1.5957691216057308 * (values + 0.044715 * values * values * values))


def _relu(values):
    return operators.relu(values)


ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu": _relu}


def _gated(activate: Callable) -> Callable:
    def gated(gate, up):
        return activate(gate) * up

    return gated


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
