"""Causal attention within segments, and over a key-value cache: by plain operators, or Ascend's flash attention."""

from collections.abc import Callable
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Tensor
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

    `place` int32 [tokens x heads], `sources` int32 [all windows' keys].
    """

    windows: list[_Window]
    place: Tensor
    sources: Tensor


class TiledAttention:
    """Causal attention within segments by plain operators, each run as it is called: batches differ in their shapes."""

    def __init__(self, spec: ModelSpec, precision: Precision):
        self.heads, self.kv_heads, self.dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.kind = getattr(mindspore, precision.softmax)
        self.scale = spec.head_dim**-0.5

    def plan(self, segment_ids: np.ndarray) -> _Plan:
        """Return what `forward` and `backward` need to know of a batch's segment ids, int32 [rows, length]."""
        found, place = tiles.windows(segment_ids)
        windows = [self._window(one, segment_ids.size * self.heads) for one in found]
        total = sum(one.queries.size for one in found)
        # A tile's results stand by head, then by query.
        tile, query = place[:, None] // tiles.TILE, place[:, None] % tiles.TILE
        rows = (tile * self.heads + np.arange(self.heads)) * tiles.TILE + query
        rows = np.where(place[:, None] < total, rows, total * self.heads)
        sources = [window.keys.reshape(-1) for window in windows]
        return _Plan(windows, _indices(rows), operators.concat(sources) if sources else _indices(np.zeros(0)))

    def _window(self, one: tiles.Windows, nothing: int) -> _Window:
        count, _, width = one.allowed.shape
        head = np.arange(self.heads).reshape(self.kv_heads, -1, 1)
        queries = one.queries[:, None, None, :] * self.heads + head
        seeing = one.allowed.any(-1, keepdims=True)
        keys = one.keys[:, None, :] * self.kv_heads + np.arange(self.kv_heads)[:, None]
        bias = Tensor(np.where(one.allowed | ~seeing, 0, MASKED).astype(np.float32)).astype(self.kind)[:, None, None]
        shape = (count, self.kv_heads, self.heads // self.kv_heads, tiles.TILE, width)
        bias = operators.tile(bias, (1, *shape[1:3], 1, 1)).reshape(count, self.kv_heads, -1, width)
        results = np.where(seeing.reshape(count, 1, 1, -1), queries, nothing)
        queries, results = (_indices(rows.reshape(count, self.kv_heads, -1)) for rows in (queries, results))
        return _Window(queries, results, _indices(keys), bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> Tensor:
        """Return the mixed values [tokens, heads, dim]; zero at padding. query as these; key, value by kv_heads."""
        mixed = []
        for window in plan.windows:
            weights, _, _, values = self._weights(query, key, value, window)
            mixed.append(_bmm(weights, values).reshape(-1, self.dim))
        return self._collect(mixed, query, plan)

    def backward(self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, plan: _Plan):
        """Return the gradients of query, key and value for that of `mixed`, what `forward` returned."""
        rows = self._with_nothing([gradient], gradient)
        # The sum over the keys of weight x its gradient is that over the dimensions of output x its gradient.
        ones = operators.ones((self.dim, 1), self.kind)
        inner = operators.matmul(rows.astype(self.kind) * self._with_nothing([mixed], mixed), ones)
        of_queries, of_keys, of_values = [], [], []
        for window in plan.windows:
            weights, queries, keys, values = self._weights(query, key, value, window)
            upper = operators.gather(rows, window.results, 0)
            of_values.append(_bmm(weights, upper, transpose_a=True).reshape(-1, self.dim))
            slope = _bmm(upper, values, transpose_b=True).astype(self.kind)
            slope = (weights * (slope - operators.gather(inner, window.results, 0))).astype(gradient.dtype)
            of_queries.append(_bmm(slope, keys).reshape(-1, self.dim))
            of_keys.append(_bmm(slope, queries, transpose_a=True).reshape(-1, self.dim))
        by_query = self._collect(of_queries, query, plan) * self.scale
        return by_query, self._add_up(of_keys, key, plan), self._add_up(of_values, value, plan)

    def _weights(self, query, key, value, window: _Window):
        """The softmax of a window's scores, and the window's scaled queries, its keys and its values."""
        queries = operators.gather(query.reshape(-1, self.dim), window.queries, 0) * self.scale
        keys = operators.gather(key.reshape(-1, self.dim), window.keys, 0)
        values = operators.gather(value.reshape(-1, self.dim), window.keys, 0)
        scores = _bmm(queries, keys, transpose_b=True).astype(self.kind) + window.bias
        return operators.softmax(scores, -1).astype(value.dtype), queries, keys, values

    def _collect(self, parts: list[Tensor], like: Tensor, plan: _Plan) -> Tensor:
        """The tokens' rows out of the windows' results; zero for padding."""
        return operators.gather(self._with_nothing(parts, like), plan.place, 0).reshape(like.shape)

    def _with_nothing(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """The rows of heads, and a last one of zeros."""
        rows = [part.reshape(-1, self.dim) for part in parts]
        return operators.concat([*rows, operators.zeros((1, self.dim), like.dtype)])

    def _add_up(self, parts: list[Tensor], like: Tensor, plan: _Plan) -> Tensor:
        """The sum of what all windows say of a token's key or value."""
        if not parts:
            return operators.zeros_like(like)
        summed = operators.unsorted_segment_sum(operators.concat(parts), plan.sources, like.size // self.dim)
        return summed.reshape(like.shape)


def _indices(places: np.ndarray) -> Tensor:
    return Tensor(np.ascontiguousarray(places.reshape(-1) if places.ndim == 2 else places).astype(np.int32))


def _bmm(left: Tensor, right: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    return operators.BatchMatMul(transpose_a, transpose_b)(left, right)


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
