"""Causal attention within segments, and over a key-value cache: by plain operators, or Ascend's flash attention."""

from collections.abc import Callable
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Tensor, mint
from mindspore import ops as operators

from msft.backend import tiles
from msft.backend.contract import Precision
from msft.models.spec import ModelSpec

MASKED = -1e30


def dense(precision: Precision) -> Callable:
    """Return attention of all queries with all keys that `allowed` names; see `ops.Kernels.attention`."""
    kind = getattr(mindspore, precision.softmax)

    def attention(query, key, value, allowed):
        rows, heads, length, dim = query.shape
        groups, keys = key.shape[1], key.shape[2]
        # Grouped heads share one product: the queries of a group stand below one another.
        query = query.reshape(rows, groups, heads // groups * length, dim)
        scores = operators.BatchMatMul(transpose_b=True)(query, key).astype(kind) * (dim**-0.5)
        scores = scores.reshape(rows, groups, heads // groups, length, keys)
        bias = operators.where(allowed, Tensor(0.0, kind), Tensor(MASKED, kind))
        scores = scores + bias.expand_dims(1).expand_dims(1)
        weights = operators.softmax(scores, -1).astype(value.dtype)
        mixed = operators.BatchMatMul()(weights.reshape(rows, groups, heads // groups * length, keys), value)
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


class _Window(NamedTuple):
    """A `tiles.Windows` on the device: where the rows of heads are in [tokens x heads, dim], what is added to scores.

    `queries` int32 [n, kv_heads, heads / kv_heads x TILE], `keys` int32 [n, kv_heads, width], `bias` [n, kv_heads,
    heads / kv_heads x TILE, width]. `results` are the queries, or the number of rows where a query sees nothing: what
    it gets is thrown away, so that it must not give gradients.
    """

    queries: Tensor
    results: Tensor
    keys: Tensor
    bias: Tensor


class _Plan(NamedTuple):
    """The windows of a batch; where each token's heads are in the windows' results; where the windows' keys are from.

    `place` int32 [tokens x heads], `sources` int32 [all windows' keys, and filling], `filling` [rows, dim] of zeros.
    """

    windows: list[_Window]
    place: Tensor
    sources: Tensor
    filling: Tensor


class TiledAttention:
    """Causal attention within segments by plain operators, compiled once for each width of a window."""

    def __init__(self, spec: ModelSpec, precision: Precision):
        self.heads, self.kv_heads, self.dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.compute, self.kind = (getattr(mindspore, name) for name in (precision.compute, precision.softmax))
        window = _WindowFunctions(self.dim, self.kind)
        self.mix, self.differentiate = mindspore.jit(window.mix), mindspore.jit(window.differentiate)
        self.prepare, self.collect, self.add_up = (mindspore.jit(one) for one in (_prepare, _collect, _add_up))

    def plan(self, segment_ids: np.ndarray) -> _Plan:
        """Return what `forward` and `backward` need to know of a batch's segment ids, int32 [rows, length]."""
        groups, place = tiles.windows(segment_ids)
        windows = [self._window(group, segment_ids.size * self.heads) for group in groups]
        # A tile's results stand by head, then by query.
        tile, query = place[:, None] // tiles.TILE, place[:, None] % tiles.TILE
        rows = (tile * self.heads + np.arange(self.heads)) * tiles.TILE + query
        total = sum(group.queries.size for group in groups)
        rows = np.where(place[:, None] < total, rows, total * self.heads)
        sources = np.concatenate([self._key_rows(group).reshape(-1) for group in groups])
        # Filled up to a multiple of the batch's own keys, so that few lengths are compiled.
        fill = -len(sources) % (total * self.kv_heads)
        filling = Tensor(np.zeros((fill, self.dim), np.float32)).astype(self.compute)
        return _Plan(windows, _indices(rows.reshape(-1)), _indices(np.pad(sources, (0, fill))), filling)

    def _window(self, group: tiles.Windows, nothing: int) -> _Window:
        count, _, width = group.allowed.shape
        queries = group.queries[:, None, None, :] * self.heads + np.arange(self.heads).reshape(self.kv_heads, -1, 1)
        seeing = group.allowed.any(-1, keepdims=True)
        results = np.where(seeing.reshape(count, 1, 1, -1), queries, nothing)
        queries, results = (_indices(rows.reshape(count, self.kv_heads, -1)) for rows in (queries, results))
        bias = Tensor(np.where(group.allowed | ~seeing, 0, MASKED).astype(np.float32)).astype(self.kind)
        bias = operators.tile(bias[:, None], (1, self.kv_heads, self.heads // self.kv_heads, 1))
        return _Window(queries, results, _indices(self._key_rows(group)), bias)

    def _key_rows(self, group: tiles.Windows) -> np.ndarray:
        return group.keys[:, None, :] * self.kv_heads + np.arange(self.kv_heads)[:, None]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> Tensor:
        """Return the mixed values [tokens, heads, dim]; zero at padding. query as these; key, value by kv_heads."""
        mixed = [self.mix(query, key, value, one.queries, one.keys, one.bias) for one in plan.windows]
        return self.collect(query, plan.place, mint.cat(mixed))

    def backward(self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, plan: _Plan):
        """Return the gradients of query, key and value for that of `mixed`, what `forward` returned."""
        rows, inner = self.prepare(gradient, mixed)
        parts = [self.differentiate(query, key, value, rows, inner, *one) for one in plan.windows]
        by_query, by_key, by_value = zip(*parts, strict=True)
        by_key, by_value = (mint.cat([*part, plan.filling]) for part in (by_key, by_value))
        by_query = self.collect(query, plan.place, mint.cat(by_query))
        return by_query, *self.add_up(key, plan.sources, by_key, by_value)


class _WindowFunctions:
    """Attention of the queries of windows to their keys, and its gradients; results are rows [rows, dim]."""

    def __init__(self, dim: int, kind):
        self.dim, self.kind, self.scale = dim, kind, dim**-0.5

    def mix(self, query, key, value, queries, keys, bias):
        """Return the windows' mixed values."""
        weights, _, _, values = self.weights(query, key, value, queries, keys, bias)
        return operators.BatchMatMul()(weights, values).reshape(-1, self.dim)

    def differentiate(self, query, key, value, rows, inner, queries, results, keys, bias):
        """Return the gradients of the windows' queries, keys and values; `rows` and `inner` are `_prepare`'s."""
        weights, asked, known, values = self.weights(query, key, value, queries, keys, bias)
        upper = operators.gather(rows, results, 0)
        slope = operators.BatchMatMul(transpose_b=True)(upper, values).astype(self.kind)
        slope = (weights.astype(self.kind) * (slope - operators.gather(inner, results, 0))).astype(upper.dtype)
        by_query = operators.BatchMatMul()(slope, known) * self.scale
        by_key = operators.BatchMatMul(transpose_a=True)(slope, asked)
        by_value = operators.BatchMatMul(transpose_a=True)(weights, upper)
        return by_query.reshape(-1, self.dim), by_key.reshape(-1, self.dim), by_value.reshape(-1, self.dim)

    def weights(self, query, key, value, queries, keys, bias):
        """The softmax of the windows' scores, their scaled queries, their keys and their values."""
        asked = operators.gather(query.reshape(-1, self.dim), queries, 0) * self.scale
        known = operators.gather(key.reshape(-1, self.dim), keys, 0)
        values = operators.gather(value.reshape(-1, self.dim), keys, 0)
        scores = operators.BatchMatMul(transpose_b=True)(asked, known).astype(self.kind) + bias
        return operators.softmax(scores, -1).astype(value.dtype), asked, known, values


def _prepare(gradient, mixed):
    """The gradients of the rows of heads and a last one of zeros, and the inner products of gradients and rows.

    These are what the softmax subtracts: the sum over the keys of weight x its gradient is the same.
    """
    dim = gradient.shape[-1]
    rows, inner = gradient.reshape(-1, dim), (gradient * mixed).astype(mindspore.float32).reshape(-1, dim)
    inner = operators.MatMul()(inner, operators.ones((dim, 1), mindspore.float32))
    zeros = operators.zeros((1, dim), mindspore.float32)
    return operators.concat((rows, zeros.astype(rows.dtype))), operators.concat((inner, zeros[:, :1]))


def _collect(like, place, rows):
    """The tokens' rows out of the windows' results, shaped as `like`; zero for padding."""
    rows = operators.concat((rows, operators.zeros((1, rows.shape[1]), rows.dtype)))
    return operators.gather(rows, place, 0).reshape(like.shape)


def _add_up(like, sources, by_key, by_value):
    """The sums of what all windows say of each token's key and value, shaped as `like`."""
    count = like.size // like.shape[-1]
    by_key = operators.unsorted_segment_sum(by_key, sources, count).reshape(like.shape)
    return by_key, operators.unsorted_segment_sum(by_value, sources, count).reshape(like.shape)


def _indices(places: np.ndarray) -> Tensor:
    return Tensor(np.ascontiguousarray(places).astype(np.int32))


class FusedAttention:
    """`TiledAttention` by Ascend's flash attention over tokens whose segments lie one behind the other."""

    def __init__(self):
        self.triangle = np.triu(np.ones((2048, 2048), dtype=np.uint8), 1)
        self.gradient = operators.GradOperation(get_all=True, sens_param=True)(self._flash)

    def plan(self, segment_ids: np.ndarray):
        """Return the ends of all runs of equal segments, padding included, and which tokens are no padding."""
        changes = np.diff(segment_ids, axis=1, append=-1) != 0
        ends = tuple(int(place) + 1 for place in np.flatnonzero(changes))
        real = (segment_ids != 0).reshape(-1, 1, 1)
        return ends, Tensor(real), Tensor(self.triangle)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, plan) -> Tensor:
        """See `TiledAttention.forward`."""
        return self._flash(query, key, value, *plan)

    def backward(self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, plan):
        """See `TiledAttention.backward`."""
        return self.gradient(query, key, value, *plan, gradient)[:3]

    def _flash(self, query, key, value, ends, real, triangle):
        mixed = operators.flash_attention_score(
            query,
            key,
            value,
            query.shape[1],
            attn_mask=triangle,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            scalar_value=query.shape[-1] ** -0.5,
            input_layout="TND",
            sparse_mode=3,
        )
        return mixed * real.astype(mixed.dtype)
