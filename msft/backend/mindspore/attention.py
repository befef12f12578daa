"""Causal attention within segments, and over a key-value cache: by plain operators, or Ascend's flash attention."""

from collections.abc import Callable

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import line
from msft.backend.contract import Precision
from msft.backend.line import TILE
from msft.models.spec import ModelSpec

MASKED = -1e30

# Primitives, which can be compiled without looking at cases.
_PRODUCT = operators.BatchMatMul()
_PRODUCT_A = operators.BatchMatMul(transpose_a=True)
_PRODUCT_B = operators.BatchMatMul(transpose_b=True)


def dense(precision: Precision) -> Callable:
    """Return attention of all queries with all keys that `allowed` names; see `ops.Kernels.attention`."""
    kind = getattr(mindspore, precision.softmax)

    def attention(query, key, value, allowed):
        rows, heads, length, dim = query.shape
        groups, keys = key.shape[1], key.shape[2]
        # Grouped heads share one product: the queries of a group stand below one another.
        query = query.reshape(rows, groups, heads // groups * length, dim)
        scores = _PRODUCT_B(query, key).astype(kind) * (dim**-0.5)
        scores = scores.reshape(rows, groups, heads // groups, length, keys)
        bias = operators.where(allowed, Tensor(0.0, kind), Tensor(MASKED, kind))
        scores = scores + bias.expand_dims(1).expand_dims(1)
        weights = operators.softmax(scores, -1).astype(value.dtype)
        mixed = _PRODUCT(weights.reshape(rows, groups, heads // groups * length, keys), value)
        return mixed.reshape(rows, heads, length, dim)

    return attention


def fused_dense(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """`dense` by Ascend's flash attention."""
    return operators.flash_attention_score(
        query,
        key,
        value,
        query.shape[1],
        attn_mask=operators.logical_not(allowed).expand_dims(1),
        scalar_value=query.shape[-1] ** -0.5,
        input_layout="BNSD",
    )


class TiledAttention:
    """Attention of a line's queries, keys and values within its segments, by plain operators on pairs of tiles.

    `forward` takes heads [length, (heads + 2 kv_heads) x dim] (queries, keys, values side by side) and a plan, and
    returns what `backward` takes back: the mixed values [length, heads x dim] and the logarithms of the softmaxes'
    sums [length, heads], side by side.
    """

    def __init__(self, spec: ModelSpec, precision: Precision):
        self.kind = getattr(mindspore, precision.softmax)
        functions = _Tiles(spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, self.kind)
        self.forward, self.backward = mindspore.jit(functions.mix), mindspore.jit(functions.differentiate)

    def plan(self, segments: np.ndarray) -> tuple[Tensor, ...]:
        """Return what both functions need to know of a line's segments, int32 [length]."""
        found = line.pairs(segments)
        bias = np.where(found.allowed, 0, MASKED).astype(np.float32)[:, None, None]
        return Tensor(found.queries), Tensor(found.keys), Tensor(bias).astype(self.kind)


class _Tiles:
    """Attention on pairs of tiles and its gradients (FlashAttention's formulas, Dao et al. 2022)."""

    def __init__(self, heads: int, kv_heads: int, dim: int, kind):
        self.heads, self.kv_heads, self.dim, self.kind = heads, kv_heads, dim, kind
        self.group, self.scale = heads // kv_heads, dim**-0.5
        self.ends = (heads * dim, (heads + kv_heads) * dim)

    def mix(self, heads, queries, keys, bias):
        """See `TiledAttention`."""
        tiles = heads.shape[0] // TILE
        _, _, value, scores = self.scores(heads, queries, keys, bias)
        top = operators.unsorted_segment_max(operators.amax(scores, -1), queries, tiles)
        powers = operators.exp(scores - operators.gather(top, queries, 0).expand_dims(-1))
        total = operators.unsorted_segment_sum(self.row_sums(powers), queries, tiles)
        mixed = _PRODUCT(self.flat(powers).astype(value.dtype), value).astype(self.kind)
        mixed = operators.unsorted_segment_sum(mixed, queries, tiles)
        mixed = self.by_token(mixed / total.reshape(tiles, self.kv_heads, -1, 1)).astype(heads.dtype)
        sums = self.by_token((top + operators.log1p(total - 1)).reshape(tiles, self.kv_heads, -1, 1))
        return operators.concat((mixed, sums.astype(heads.dtype)), 1)

    def differentiate(self, gradient, heads, mixed, queries, keys, bias):
        """Return the gradient of `heads` for that of what `mix` returns."""
        tiles, gradient = heads.shape[0] // TILE, gradient[:, : self.ends[0]]
        query, key, value, scores = self.scores(heads, queries, keys, bias)
        sums = self.by_tile(mixed[:, self.ends[0] :].astype(self.kind), self.heads, 1)
        sums = operators.gather(sums, queries, 0).reshape(*scores.shape[:-1], 1)
        weights = operators.exp(scores - sums)
        products = gradient.astype(self.kind) * mixed[:, : self.ends[0]].astype(self.kind)
        inner = self.row_sums(products.reshape(-1, self.heads, self.dim))
        inner = operators.gather(self.by_tile(inner, self.heads, 1), queries, 0).reshape(*scores.shape[:-1], 1)
        upper = operators.gather(self.by_tile(gradient, self.heads, self.dim), queries, 0)
        slope = _PRODUCT_B(upper, value).astype(self.kind).reshape(scores.shape)
        slope = self.flat(weights * (slope - inner)).astype(heads.dtype)
        weights = self.flat(weights).astype(heads.dtype)
        by_query = operators.unsorted_segment_sum(_PRODUCT(slope, key) * self.scale, queries, tiles)
        by_key = operators.unsorted_segment_sum(_PRODUCT_A(slope, query), keys, tiles)
        by_value = operators.unsorted_segment_sum(_PRODUCT_A(weights, upper), keys, tiles)
        parts = (self.by_token(by_query), self.by_token(by_key), self.by_token(by_value))
        return operators.concat(parts, 1)

    def scores(self, heads, queries, keys, bias):
        """The pairs' scaled queries, keys and values [pairs, kv_heads, n, dim], and scores [..., group, TILE, TILE]."""
        first, second = self.ends
        query = operators.gather(self.by_tile(heads[:, :first] * self.scale, self.heads, self.dim), queries, 0)
        key = operators.gather(self.by_tile(heads[:, first:second], self.kv_heads, self.dim), keys, 0)
        value = operators.gather(self.by_tile(heads[:, second:], self.kv_heads, self.dim), keys, 0)
        scores = _PRODUCT_B(query, key).astype(self.kind)
        scores = scores.reshape(-1, self.kv_heads, self.group, TILE, TILE) + bias
        return query, key, value, scores

    def by_tile(self, tokens, heads, dim):
        """[length, heads x dim] -> [tiles, kv_heads, heads / kv_heads x TILE, dim]."""
        parts = tokens.reshape(-1, TILE, heads, dim).transpose(0, 2, 1, 3)
        return parts.reshape(-1, self.kv_heads, heads // self.kv_heads * TILE, dim)

    def by_token(self, parts):
        """The other way round."""
        dim = parts.shape[-1]
        heads = parts.shape[1] * parts.shape[2] // TILE
        return parts.reshape(-1, heads, TILE, dim).transpose(0, 2, 1, 3).reshape(-1, heads * dim)

    def flat(self, scores):
        """[..., group, TILE, TILE] -> [..., group x TILE, TILE]."""
        return scores.reshape(-1, self.kv_heads, self.group * TILE, TILE)

    def row_sums(self, values):
        """The sums over the last axis: a product with ones takes a third of MindSpore's time for a short axis."""
        ones = operators.ones((values.shape[-1], 1), values.dtype)
        return operators.matmul(values.reshape(-1, values.shape[-1]), ones).reshape(values.shape[:-1])


class FusedAttention:
    """`TiledAttention` by Ascend's flash attention; what `forward` returns is the mixed values alone."""

    def __init__(self, spec: ModelSpec):
        self.heads, self.kv_heads, self.dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.triangle = np.triu(np.ones((2048, 2048), dtype=np.uint8), 1)
        self.gradient = operators.GradOperation(get_all=True, sens_param=True)(self.forward)

    def plan(self, segments: np.ndarray) -> tuple:
        """Return the segments' ends, and the triangle that the kernel wants for causal attention."""
        ends = np.flatnonzero(np.diff(segments, append=0)) + 1
        return tuple(map(int, ends)), Tensor(self.triangle)

    def forward(self, heads: Tensor, ends, triangle) -> Tensor:
        """See `TiledAttention`."""
        parts = heads.reshape(-1, self.heads + 2 * self.kv_heads, self.dim)
        query, key, value = operators.split(parts, (self.heads, self.kv_heads, self.kv_heads), 1)
        mixed = operators.flash_attention_score(
            query,
            key,
            value,
            self.heads,
            attn_mask=triangle,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            scalar_value=self.dim**-0.5,
            input_layout="TND",
            sparse_mode=3,
        )
        return mixed.reshape(-1, self.heads * self.dim)

    def backward(self, gradient: Tensor, heads: Tensor, mixed: Tensor, ends, triangle) -> Tensor:
        """See `TiledAttention`."""
        return self.gradient(heads, ends, triangle, gradient)[0]
