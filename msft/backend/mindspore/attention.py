"""Causal attention within segments, and over a key-value cache, by plain operators."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import line
from msft.backend.contract import Precision
from msft.backend.mindspore import distributed
from msft.models import alibi
from msft.models.spec import ModelSpec

MASKED = -1e30
# Where the hyperbolic tangent is 1 in float32.
FLAT = 10.0
# Tiles up to this number of keys keep their weights for the way back: a fifth less time for a tenth more memory.
KEPT = 512

# Primitives, which can be compiled without looking at cases.
_PRODUCT = operators.BatchMatMul()
_PRODUCT_A = operators.BatchMatMul(transpose_a=True)
_PRODUCT_B = operators.BatchMatMul(transpose_b=True)
_SOFTMAX = operators.Softmax(-1)
_UPDATE = operators.TensorScatterUpdate()
_ADD = operators.TensorScatterAdd()


class Scores(NamedTuple):
    """What becomes of a query's product with a key: x `scale`, squashed to +-`cap` (0 = not).

    ALiBi adds `slopes` (one for each head, none = no ALiBi) x the key's position.
    """

    scale: float
    cap: float
    slopes: tuple[float, ...]

    @classmethod
    def of(cls, spec: ModelSpec) -> "Scores":
        """Return those of a model, or of what a rank has of its heads."""
        slopes = alibi.slopes(spec.num_attention_heads) if spec.has_alibi else ()
        return cls(spec.attention_scale, spec.attention_cap or 0.0, slopes)


def capped(values, cap: float):
    """Return values squashed to +-`cap` (0 = as they are); it can be compiled."""
    return _tanh(values / cap) * cap if cap else values


def _tanh(values):
    """The hyperbolic tangent; MindSpore's own is 1e-4 off on CPU."""
    values = operators.clip_by_value(values, -FLAT, FLAT)
    return operators.sinh(values) / operators.cosh(values)


def dense(scores_of: Scores, precision: Precision) -> Callable:
    """Return attention of all queries with all keys that are allowed.

    (query [rows, heads, length, dim], key, value [rows, kv_heads, keys, dim], allowed [rows, length, keys]) -> mixed.
    """
    kind, (scale, cap, slopes) = getattr(mindspore, precision.softmax), scores_of

    def attention(query, key, value, allowed):
        rows, heads, length, dim = query.shape
        groups, keys = key.shape[1], key.shape[2]
        # Grouped heads share one product: the queries of a group stand below one another.
        query = query.reshape(rows, groups, heads // groups * length, dim)
        scores = capped(_PRODUCT_B(query, key).astype(kind) * scale, cap)
        scores = scores.reshape(rows, groups, heads // groups, length, keys)
        if slopes:
            by_head = Tensor(slopes, kind).reshape(groups, heads // groups, 1, 1)
            scores = scores + by_head * operators.arange(keys).astype(kind)
        bias = operators.where(allowed, Tensor(0.0, kind), Tensor(MASKED, kind))
        scores = scores + bias.expand_dims(1).expand_dims(1)
        weights = operators.softmax(scores, -1).astype(value.dtype)
        mixed = _PRODUCT(weights.reshape(rows, groups, heads // groups * length, keys), value)
        return mixed.reshape(rows, heads, length, dim)

    return attention


class TilePlan(NamedTuple):
    """What is computed for `line.Tiles`: int32 places of heads, and `bias` [tiles, 1, heads of a group x TILE, keys].

    `queries`, `keys`, `values` are places in [length x (heads + 2 kv_heads), dim], `mixed` in [length x heads, dim];
    `upper` too, but lies behind the last for a query that only repeats another. With ALiBi `bias` is
    [tiles, kv_heads, heads of a group x TILE, keys].
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    mixed: Tensor
    upper: Tensor
    bias: Tensor


class TiledAttention:
    """Attention of a line's queries, keys and values within its segments, by plain operators on tiles of queries.

    `heads` is [length, (heads + 2 kv_heads) x dim]: queries, keys and values side by side; a plan tells who sees whom.
    The weights of tiles with more than KEPT keys are computed again backwards.
    """

    def __init__(self, spec: ModelSpec, precision: Precision, window: int = 0):
        self.heads, self.kv_heads, self.window = spec.num_attention_heads, spec.num_key_value_heads, window
        self.kind, self.scores = getattr(mindspore, precision.softmax), Scores.of(spec)
        self.functions = _compiled(self.heads, self.kv_heads, spec.head_dim, self.scores, precision.softmax)

    def plan(self, found: line.Line) -> list[TilePlan]:
        """Return what both ways need to know of a line."""
        return self._plans(line.tiles(found.pieces, self.window, found.contexts), found)

    def forward(self, heads: Tensor, plan: list[TilePlan]) -> tuple[Tensor, list[Tensor | None]]:
        """Return the mixed values [length, heads x dim], and the weights that are kept for the way back."""
        return self._forward(heads, *self._with_table(heads), plan)

    def _forward(self, like: Tensor, heads: Tensor, table: Tensor, plan: list[TilePlan]):
        mixed, kept = self.functions.nothing(heads), []
        for tiles in plan:
            weights = self.functions.weights(table, tiles.queries, tiles.keys, tiles.bias)
            mixed = self.functions.mix(mixed, weights, table, tiles.values, tiles.mixed)
            kept.append(weights if tiles.bias.shape[-1] <= KEPT else None)
        return self._shortened(mixed, like), kept

    def backward(self, gradient: Tensor, heads: Tensor, mixed: Tensor, kept: list, plan: list[TilePlan]) -> Tensor:
        """Return the gradient of `heads`, float32, for that of the mixed values."""
        _, table = self._with_table(heads)
        return self._of_own(self._by_table(gradient, table, mixed, kept, plan), heads)

    def _by_table(self, gradient: Tensor, table: Tensor, mixed: Tensor, kept: list, plan: list[TilePlan]) -> Tensor:
        """The gradient of the table."""
        gradient, mixed = map(self._lengthened, (gradient, mixed))
        found = self.functions.no_gradient(table)
        upper, inner = self.functions.with_zeros(gradient), self.functions.inner(gradient, mixed)
        for tiles, weights in zip(plan, kept, strict=True):
            if weights is None:
                weights = self.functions.weights(table, tiles.queries, tiles.keys, tiles.bias)
            found = self.functions.differentiate(found, weights, table, upper, inner, *tiles[:3], tiles.upper)
        return found

    def _with_table(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """The heads of a lengthened line, and the table [..., dim] from which tiles take theirs."""
        heads = self._lengthened(heads)
        return heads, heads

    def _of_own(self, found: Tensor, like: Tensor) -> Tensor:
        """The gradient of the heads `like`, from that of the table."""
        return self._shortened(found, like)

    def _strides(self, length: int) -> tuple[int, int, int]:
        """How many heads of the table a query's token has, where keys begin, and how many heads a key's token has."""
        each = self.heads + 2 * self.kv_heads
        return each, self.heads, each

    def _lengthened(self, values: Tensor) -> Tensor:
        """Values of a line whose length is made a power of two, so that few lengths meet many numbers of tiles."""
        return values if len(values) == _whole(len(values)) else self.functions.lengthened(values)

    def _shortened(self, values: Tensor, like: Tensor) -> Tensor:
        return values if len(values) == len(like) else self.functions.shortened(values, like)

    def _plans(self, tiles: list[line.Tiles], found: line.Line) -> list[TilePlan]:
        length = _whole(len(found.input_ids))
        return [self._plan(each, found.order, length) for each in tiles]

    def _plan(self, tiles: line.Tiles, order: np.ndarray, length: int) -> TilePlan:
        """The queries of the heads that share keys stand below one another; `order` tells where a key's token is."""
        heads, groups, group = self.heads, self.kv_heads, self.heads // self.kv_heads
        by_head = np.arange(heads).reshape(1, groups, group, 1)
        stacked = (len(tiles.queries), groups, group * line.TILE)
        each, first, each_key = self._strides(length)
        keys = order[tiles.keys][:, None] * each_key + (first + np.arange(groups))[:, None]
        allowed = np.tile(tiles.allowed, (1, group, 1))[:, None]
        queries = (tiles.queries[:, None, None] * each + by_head).reshape(stacked)
        mixed = (tiles.queries[:, None, None] * heads + by_head).reshape(stacked)
        upper = np.where(np.tile(tiles.real, (1, group))[:, None], mixed, length * heads)
        places = (queries, keys, keys + groups, mixed, upper)
        bias = np.where(allowed, np.float32(0), np.float32(MASKED))
        if self.scores.slopes:
            slopes = np.repeat(np.reshape(self.scores.slopes, (groups, group)), line.TILE, axis=1)[..., None]
            bias = bias + (slopes * tiles.places[:, None, None]).astype(np.float32)
        return TilePlan(*(Tensor(place.astype(np.int32)) for place in places), Tensor(bias).astype(self.kind))


class SharedTiledAttention(TiledAttention):
    """`TiledAttention` of a rank's queries with the keys and values of all ranks that share its rows.

    The table holds the own queries, and behind them keys and values, which are gathered anew for the way back.
    """

    def _with_table(self, heads):
        whole = distributed.gather_parts(self.functions.keys_of(heads))
        heads = self._lengthened(heads)
        return heads, self.functions.joined(heads, self._lengthened(whole))

    def _of_own(self, found, like):
        queries, whole = self.functions.by_queries(found, like), self.functions.by_whole(found, like)
        # What stands behind the last rank's keys only makes the table longer.
        whole = whole[: distributed.mesh().context * len(like)]
        return self.functions.side_by_side(queries, distributed.sum_parts(whole))

    def _strides(self, length):
        return self.heads, length * self.heads, 2 * self.kv_heads


def _whole(length: int) -> int:
    """The next power of two; it can be compiled, as it needs no more than products and comparisons."""
    whole = 1
    while whole < length:
        whole = whole * 2
    return whole


@cache
def _compiled(heads: int, kv_heads: int, dim: int, scores: Scores, softmax: str):
    """The functions of attention, compiled once in a process for every model of these sizes."""
    functions = _Tiles(heads, kv_heads, dim, scores, getattr(mindspore, softmax))
    names = (
        "lengthened",
        "shortened",
        "nothing",
        "weights",
        "mix",
        "no_gradient",
        "with_zeros",
        "inner",
        "differentiate",
        "keys_of",
        "joined",
        "by_queries",
        "by_whole",
        "side_by_side",
    )
    return SimpleNamespace(**{name: mindspore.jit(getattr(functions, name)) for name in names})


class _Tiles:
    """Attention on tiles, each a row of scores as long as its keys, and its gradients."""

    def __init__(self, heads: int, kv_heads: int, dim: int, scores: Scores, kind):
        self.heads, self.kv_heads, self.dim, self.kind = heads, kv_heads, dim, kind
        self.scale, self.cap = scores.scale, scores.cap

    def lengthened(self, values):
        """With zeros up to a power of two."""
        rows = _whole(values.shape[0]) - values.shape[0]
        return operators.concat((values, operators.zeros((rows, values.shape[1]), values.dtype)))

    def shortened(self, values, like):
        """The other way round."""
        return values[: like.shape[0]]

    def nothing(self, heads):
        """Mixed values to begin with."""
        return operators.zeros((heads.shape[0], self.heads * self.dim), heads.dtype)

    def weights(self, heads, queries, keys, bias):
        """The softmax of the scores of some tiles [tiles, kv_heads, heads of a group x TILE, keys]."""
        query, key = self.chosen(heads, queries) * self.scale, self.chosen(heads, keys)
        return _SOFTMAX(capped(_PRODUCT_B(query, key).astype(self.kind), self.cap) + bias)

    def mix(self, mixed, weights, heads, values, places):
        """`mixed` with those of some tiles in their places."""
        found = _PRODUCT(weights.astype(heads.dtype), self.chosen(heads, values))
        flat = mixed.reshape(-1, self.dim)
        return _UPDATE(flat, places.reshape(-1, 1), found.reshape(-1, self.dim)).reshape(mixed.shape)

    def no_gradient(self, heads):
        """Gradients to begin with, float32, because those of keys and values are sums over tiles."""
        return operators.zeros(heads.shape, mindspore.float32)

    def with_zeros(self, gradient):
        """The mixed values' gradient [length x heads + 1, dim]."""
        gradient = gradient.reshape(-1, self.dim)
        return operators.concat((gradient, operators.zeros((1, self.dim), gradient.dtype)))

    def inner(self, gradient, mixed):
        """The inner products of the mixed values and their gradient [length x heads + 1, 1]."""
        products = (gradient.astype(self.kind) * mixed.astype(self.kind)).reshape(-1, self.dim)
        # A product with ones takes a third of the time that MindSpore's sum over a short axis does.
        sums = operators.matmul(products, operators.ones((self.dim, 1), self.kind))
        return operators.concat((sums, operators.zeros((1, 1), self.kind)))

    def differentiate(self, total, weights, heads, upper, inner, queries, keys, values, places):
        """`total` [length, (heads + 2 kv_heads) x dim] with the gradients that some tiles bring."""
        query, key, value = (self.chosen(heads, at) for at in (queries, keys, values))
        upper, inner = operators.gather(upper, places, 0), operators.gather(inner, places, 0)
        slope = weights * (_PRODUCT_B(upper, value).astype(self.kind) - inner)
        if self.cap:
            slope = slope * self.capped_slope(query, key)
        slope, weights = (slope * self.scale).astype(heads.dtype), weights.astype(heads.dtype)
        found = (_PRODUCT(slope, key), _PRODUCT_A(slope, query), _PRODUCT_A(weights, upper))
        rows = operators.concat([part.astype(mindspore.float32).reshape(-1, self.dim) for part in found])
        at = operators.concat([part.reshape(-1, 1) for part in (queries, keys, values)])
        return _ADD(total.reshape(-1, self.dim), at, rows).reshape(total.shape)

    def capped_slope(self, query, key):
        """The slope of `capped`."""
        squashed = _tanh(_PRODUCT_B(query * self.scale, key).astype(self.kind) / self.cap)
        return 1 - squashed * squashed

    def keys_of(self, heads):
        """The keys and values among the heads [length, 2 kv_heads x dim]."""
        return heads[:, self.heads * self.dim :]

    def joined(self, heads, whole):
        """The queries among the heads, and keys and values of all ranks [length, 2 kv_heads x dim], as heads below."""
        queries = heads[:, : self.heads * self.dim]
        return operators.concat((queries.reshape(-1, self.dim), whole.reshape(-1, self.dim)))

    def by_queries(self, found, like):
        """The gradient of the queries of `like`, from that of what `joined` gives."""
        return found[: like.shape[0] * self.heads].reshape(like.shape[0], -1)

    def by_whole(self, found, like):
        """The gradient of all ranks' keys and values."""
        return found[_whole(like.shape[0]) * self.heads :].reshape(-1, 2 * self.kv_heads * self.dim)

    def side_by_side(self, queries, keys):
        """Gradients of queries, and of keys and values, as that of heads."""
        return operators.concat((queries, keys), 1)

    def chosen(self, heads, places):
        """Some of the heads [..., dim]."""
        return operators.gather(heads.reshape(-1, self.dim), places, 0)
