"""Attention with T5's relative positions, and attention of a decoder's line to its encoder's, on tiles of queries.

Both are `attention.TiledAttention`, whose scores have no scale here.
"""

from functools import cache
from types import SimpleNamespace

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import line
from msft.backend.contract import Precision
from msft.backend.mindspore import attention
from msft.models.encoder import RelativePositions
from msft.models.spec import ModelSpec

_PRODUCT_B = operators.BatchMatMul(transpose_b=True)


class RelativeAttention(attention.TiledAttention):
    """Attention within a line's segments, to whose scores buckets of distances add a head's number from a table.

    It is of one line, whose plan all layers share, and with `differentiates` sums up the table's gradient over them.
    """

    def __init__(self, spec: ModelSpec, precision: Precision, is_causal: bool, differentiates: bool):
        super().__init__(spec, precision)
        self.positions: RelativePositions = spec.encoder.positions
        self.is_causal, self.differentiates = is_causal, differentiates
        self.biases = _bias_functions(spec.num_attention_heads, spec.head_dim, self.positions.buckets)
        self.buckets: list[Tensor] = []
        self.slopes: list[Tensor] = []

    def of(self, found: line.Line, place_of: np.ndarray, table: Tensor) -> list[attention.TilePlan]:
        """Return the plan of a line; `place_of` int64 [tokens] are the tokens' places within their segments."""
        all_tiles = line.tiles(found.pieces, is_causal=self.is_causal)
        for tiles in all_tiles:
            distance = tiles.places[:, None] - place_of[tiles.queries][:, :, None]
            self.buckets.append(Tensor(self.positions.bucket(distance, self.is_causal)))
        plans = zip(self._plans(all_tiles, found), self.buckets, strict=True)
        return [plan._replace(bias=self.biases.added(plan.bias, table, buckets)) for plan, buckets in plans]

    def backward(self, gradient, heads, mixed, kept, plan):
        """Return what `TiledAttention` does."""
        if self.differentiates:
            self._add_slopes(gradient, heads, mixed, kept, plan)
        return super().backward(gradient, heads, mixed, kept, plan)

    def table_gradient(self, table: Tensor) -> Tensor:
        """Return the table's gradient, once all layers have been backwards."""
        total = self.biases.nothing(table)
        for slopes, buckets in zip(self.slopes, self.buckets, strict=False):
            total = self.biases.by_table(total, slopes, buckets)
        return total

    def _add_slopes(self, gradient, heads, mixed, kept, plan) -> None:
        _, table = self._with_table(heads)
        gradient, mixed = map(self._lengthened, (gradient, mixed))
        upper, inner = self.functions.with_zeros(gradient), self.functions.inner(gradient, mixed)
        found = []
        for tiles, weights in zip(plan, kept, strict=True):
            if weights is None:
                weights = self.functions.weights(table, tiles.queries, tiles.keys, tiles.bias)
            found.append(self.biases.slopes(weights, table, upper, inner, tiles.values, tiles.upper))
        if self.slopes:
            found = [self.biases.sum(left, right) for left, right in zip(self.slopes, found, strict=True)]
        self.slopes = found


class CrossAttention(attention.TiledAttention):
    """Attention of a line's queries [length, heads x dim] to keys and values side by side [keys, 2 heads x dim]."""

    def of(self, found: line.Line) -> list[attention.TilePlan]:
        """Return the plan of a line whose pieces see keys of another."""
        return self._plans(line.tiles(found.pieces, is_causal=False), found)

    def forward(self, queries: Tensor, states: Tensor, plan: list) -> tuple[Tensor, list]:
        """Return the mixed values [length, heads x dim], and the weights that are kept for the way back."""
        return self._forward(queries, self._lengthened(queries), self._joined(queries, states), plan)

    def backward(self, gradient: Tensor, queries: Tensor, states: Tensor, mixed: Tensor, kept: list, plan: list):
        """Return the gradients of `queries` and `states`, float32."""
        found = self._by_table(gradient, self._joined(queries, states), mixed, kept, plan)
        by_queries, by_states = self.functions.by_queries(found, queries), self.functions.by_whole(found, queries)
        return by_queries, self._shortened(by_states, states)

    def _joined(self, queries, states):
        return self.functions.joined(self._lengthened(queries), self._lengthened(states))

    def _strides(self, length):
        return self.heads, length * self.heads, 2 * self.heads


@cache
def _bias_functions(heads: int, dim: int, buckets: int):
    """What the table adds to scores, and its gradient, compiled once in a process for every model of these sizes."""
    functions = _Biases(heads, dim, buckets)
    names = ("added", "slopes", "sum", "nothing", "by_table")
    return SimpleNamespace(**{name: mindspore.jit(getattr(functions, name)) for name in names})


class _Biases:
    def __init__(self, heads: int, dim: int, buckets: int):
        self.heads, self.dim, self.buckets = heads, dim, buckets

    def added(self, masks, table, buckets):
        """What is added to the scores of tiles [tiles, heads, TILE, keys]: masks, and the numbers of buckets."""
        return masks + operators.gather(table.astype(masks.dtype), buckets, 0).transpose(0, 3, 1, 2)

    def slopes(self, weights, heads, upper, inner, values, places):
        """The gradient of what is added to the scores of some tiles."""
        value = operators.gather(heads.reshape(-1, self.dim), values, 0)
        upper, inner = operators.gather(upper, places, 0), operators.gather(inner, places, 0)
        return weights * (_PRODUCT_B(upper, value).astype(weights.dtype) - inner)

    def sum(self, left, right):
        return left + right

    def nothing(self, table):
        """A gradient to begin with."""
        return operators.zeros(table.shape, mindspore.float32)

    def by_table(self, total, slopes, buckets):
        """`total` [buckets, heads] with the gradients that some tiles bring."""
        rows = slopes.astype(mindspore.float32).transpose(0, 2, 3, 1).reshape(-1, self.heads)
        return total + operators.unsorted_segment_sum(rows, buckets.reshape(-1), self.buckets)
