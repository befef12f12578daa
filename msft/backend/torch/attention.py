"""Causal attention within segments, and over a key-value cache."""

import inspect
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from msft.backend.context import Part
from msft.backend.torch import distributed

# Queries that `tiled` takes at a time: smaller tiles have smaller products, larger ones compute more masked scores.
TILE = 128
# Segments up to this length keep their attention weights for the backward pass, longer ones compute them again.
KEPT = 512


class Scores(NamedTuple):
    """What becomes of a query's product with a key, beside its scale: squashed to +-`cap` (0 = not).

    ALiBi adds `slopes` (one for each head, none = no ALiBi) x the key's place in its segment. A query sees no more than
    the last `window` tokens (0 = all).
    """

    cap: float = 0.0
    slopes: tuple[float, ...] = ()
    window: int = 0


class Tile(NamedTuple):
    """Queries [first, end) of a piece and the keys [start, stop) that they see, of a segment that begins at `begin`.

    The last of the keys before which causality lets the queries see is `last`; all of them see those before `open_to`.
    """

    first: int
    end: int
    start: int
    stop: int
    begin: int
    is_kept: bool
    last: int
    open_to: int


class Segments:
    """Stretches of queries and the keys that they see in a line of tokens (`Part.pieces`), on a device.

    All queries of a piece see the first keys, as many as `contexts` int64 [pieces] says (None = none).
    """

    def __init__(
        self, pieces: np.ndarray, device: str, scores: Scores | None = None, contexts: np.ndarray | None = None
    ):
        self.pieces, self.device = pieces.tolist(), device
        first, end, start, stop = pieces.T
        scores = scores or Scores()
        # What no segment is longer than is no window.
        self.scores = scores._replace(window=scores.window if scores.window < int((stop - start).max()) else 0)
        self.queries, self.keys = end - first, stop - start
        # Whether queries and keys are the same tokens: whole examples, one after another.
        self.is_whole = bool((first == start).all() and (end == stop).all())
        self.longest = int(self.keys.max())
        self.contexts = [0] * len(pieces) if contexts is None else contexts.tolist()
        # A context of one token is what every query sees anyway.
        self.has_contexts = max(self.contexts) > 1
        self.tiles = [
            tile
            for piece, context in zip(self.pieces, self.contexts, strict=True)
            for tile in _tiles(*piece, self.scores.window, context)
        ]
        self._biases: dict[int, torch.Tensor] = {}

    def borders(self, lengths: np.ndarray) -> torch.Tensor:
        """Return where stretches of these lengths begin and end, one after another, int32 [n + 1]."""
        return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(self.device)

    def seen(self) -> torch.Tensor:
        """Return the places of the keys of each piece, one piece after another."""
        places = [np.arange(start, stop) for _, _, start, stop in self.pieces]
        return torch.from_numpy(np.concatenate(places)).to(self.device)

    def bias(self, number: int, kind: torch.dtype) -> torch.Tensor | None:
        """Return what hides keys from the queries of a piece, [queries, keys]; None where only later ones are hidden.

        One tensor for all layers, as it is kept for the way back.
        """
        queries, keys, window = int(self.queries[number]), int(self.keys[number]), self.scores.window
        context = self.contexts[number]
        if (queries < keys or window or context > 1) and number not in self._biases:
            hidden = torch.full((queries, keys), float("-inf"), dtype=kind, device=self.device)
            bias = hidden.triu(keys - queries + 1)
            bias = bias + hidden.tril(keys - queries - window) if window else bias
            bias[:, :context] = 0
            self._biases[number] = bias
        return self._biases.get(number)


def _tiles(first: int, end: int, start: int, stop: int, window: int, context: int) -> list[Tile]:
    """A piece in tiles of nearly equal length."""
    length, ahead = end - first, stop - end
    count = -(-length // TILE)
    borders = [first + length * number // count for number in range(count + 1)]
    ends = zip(borders, borders[1:], strict=False)
    return [
        Tile(
            begin,
            until,
            max(start, begin + ahead - window + 1) if window else start,
            max(until + ahead, start + context),
            start,
            stop - start <= KEPT,
            until + ahead,
            start + context,
        )
        for begin, until in ends
    ]


def by_segment(query, key, value, segments: Segments, scale: float) -> torch.Tensor:
    """Causal attention within each segment: [1, heads, tokens, dim] -> the same; pays for each segment's own square.

    Keys and values may be of more tokens than the queries, of which the pieces of `segments` see their own. torch's
    kernel has neither soft caps nor ALiBi: `tiled` has.
    """
    if segments.scores.cap or segments.scores.slopes:
        return tiled(query, key, value, segments, scale)
    queries = query.split(segments.queries.tolist(), dim=2)
    parts = zip(queries, *(_seen(tensor, segments) for tensor in (key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    mixed = []
    for number, part in enumerate(parts):
        bias = segments.bias(number, query.dtype)
        how = {"attn_mask": bias, "is_causal": bias is None, "scale": scale, "enable_gqa": grouped}
        mixed.append(functional.scaled_dot_product_attention(*part, **how))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)


def _seen(tensor, segments: Segments):
    """What each piece sees of keys or values."""
    if segments.is_whole:
        return tensor.split(segments.keys.tolist(), dim=2)
    return [tensor[:, :, start:stop] for _, _, start, stop in segments.pieces]


def tiled(query, key, value, segments: Segments, scale: float) -> torch.Tensor:
    """`by_segment` by plain products, for CPU, where torch's kernel takes two to four times as long backwards.

    The scores are in the dtype of the arguments, the softmax in float32.
    """
    return _Tiled.apply(query.to(value.dtype), key.to(value.dtype), value, segments, scale)


def on_cpu(query, key, value, segments: Segments, scale: float) -> torch.Tensor:
    """`tiled`, or in float32 `by_segment` where a segment is longer than `KEPT` and a rank's own."""
    # To compute the weights again takes longer than torch's kernel there: 219 for 167 ms at 2048 tokens.
    long = value.dtype == torch.float32 and segments.longest > KEPT and segments.is_whole
    return (by_segment if long else tiled)(query, key, value, segments, scale)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, segments, scale):
        mixed = _in_reading_order(query)
        weights = []
        for tile in segments.tiles:
            tile_weights = _weights(tile, _rows(query, key, tile), key, scale, segments.scores)
            _put(mixed, key, tile, torch.bmm(tile_weights, _keys(value, tile)))
            weights.append(tile_weights if tile.is_kept and any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.tiles, ctx.scale, ctx.scores = segments.tiles, scale, segments.scores
        return mixed

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *kept = ctx.saved_tensors
        d_query, d_key, d_value = (_in_reading_order(tensor) for tensor in (query, key, value))
        d_key.zero_(), d_value.zero_()
        for tile, weights in zip(ctx.tiles, kept, strict=True):
            queries, d_mixed = _rows(query, key, tile), _rows(gradient, key, tile)
            if weights is None:
                weights = _weights(tile, queries, key, ctx.scale, ctx.scores)
            d_weights = _scaled_product(d_mixed, _keys(value, tile).mT, ctx.scale)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if ctx.scores.cap:
                squashed = _scaled_product(queries, _keys(key, tile).mT, ctx.scale).div_(ctx.scores.cap).tanh_()
                d_scores = d_scores * (1 - squashed.square_())
            _put(d_query, key, tile, torch.bmm(d_scores, _keys(key, tile)))
            _add(d_key, tile, torch.bmm(d_scores.mT, queries))
            _add(d_value, tile, torch.bmm(weights.mT, d_mixed))
        return d_query, d_key, d_value, None, None


def _weights(tile: Tile, queries, key, scale: float, rules: Scores) -> torch.Tensor:
    """Softmax of the scores, [kv_heads, queries of a group, keys]; a query sees no key behind it."""
    scores = _scaled_product(queries, _keys(key, tile).mT, scale)
    if rules.cap:
        scores.div_(rules.cap).tanh_().mul_(rules.cap)
    length, count = tile.end - tile.first, tile.stop - tile.start
    by_query = scores.unflatten(1, (-1, length))
    if rules.slopes:
        slopes = scores.new_tensor(rules.slopes).view(len(scores), -1, 1, 1)
        by_query.add_(slopes * torch.arange(tile.start - tile.begin, tile.stop - tile.begin, device=scores.device))
    ahead = scores.new_full((length, tile.stop - tile.last + length), float("-inf")).triu(1)
    if tile.open_to > tile.last - length:
        ahead[:, : tile.open_to - tile.last + length] = 0
    by_query[..., tile.last - length - tile.start :].add_(ahead)
    if rules.window:
        behind = scores.new_full((length, count), float("-inf")).tril(tile.last - tile.start - length - rules.window)
        by_query.add_(behind)
    return torch.softmax(scores, -1)


def _scaled_product(left, right, scale: float) -> torch.Tensor:
    product = left.new_empty(len(left), left.shape[1], right.shape[2])
    return product.baddbmm_(left, right, beta=0, alpha=scale)


def _in_reading_order(tensor) -> torch.Tensor:
    """An empty [1, heads, tokens, dim] whose heads lie together for each token, as the products around it want them."""
    return torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _grouped(tensor, key, tile: Tile) -> torch.Tensor:
    """A view of a tile's queries, [kv_heads, group, queries, dim]."""
    return tensor[0, :, tile.first : tile.end].unflatten(0, (key.shape[1], -1))


def _rows(tensor, key, tile: Tile) -> torch.Tensor:
    """A copy of a tile's queries, those of the heads that share keys one below the other."""
    return _grouped(tensor, key, tile).flatten(1, 2)


def _put(target, key, tile: Tile, rows) -> None:
    place = _grouped(target, key, tile)
    place.copy_(rows.view(place.shape))


def _keys(tensor, tile: Tile) -> torch.Tensor:
    return tensor[0, :, tile.start : tile.stop]


def _add(target, tile: Tile, part) -> None:
    """Add what a tile's queries bring to its keys."""
    target[0, :, tile.start : tile.stop] += part


def has_variable_length() -> bool:
    """Whether this torch has the kernel of `across_segments`, which came after 2.9."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def across_segments(query, key, value, segments: Segments, scale: float) -> torch.Tensor:
    """`by_segment` as one kernel, on CUDA in 16 bits."""
    from torch.nn.attention.varlen import varlen_attn

    if segments.scores.cap or segments.scores.slopes:
        return tiled(query, key, value, segments, scale)
    if segments.has_contexts:
        return by_segment(query, key, value, segments, scale)
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    if not segments.is_whole:
        key, value = (tensor.index_select(0, segments.seen()) for tensor in (key, value))
    borders = [segments.borders(lengths) for lengths in (segments.queries, segments.keys)]
    longest = int(segments.queries.max()), segments.longest
    # Where keys are more than queries, the kernel's last query sees the last key.
    window = segments.scores.window - 1 if segments.scores.window else -1
    mixed = varlen_attn(query, key, value, *borders, *longest, scale=scale, window_size=(window, 0), enable_gqa=grouped)
    return mixed.transpose(0, 1).unsqueeze(0)


class Shared:
    """Attention of a rank's queries with the keys and values of all ranks that share its rows.

    These are gathered for each layer, and again for its way back where `keeps_own`, so that a rank keeps its own alone.
    """

    def __init__(self, attention, part: Part, keeps_own: bool, device: str):
        self.attention, self.keeps_own, self.length = attention, keeps_own, part.most
        self.order = torch.from_numpy(part.order(part.most)).to(device)

    def __call__(self, query, key, value, segments: Segments, scale: float) -> torch.Tensor:
        """`by_segment` of the whole line's keys and values; `key` and `value` [1, kv_heads, tokens, dim] are own."""
        own = torch.cat((key.to(value.dtype), value), dim=1)
        whole = _Gathered.apply(own, self)
        with _Again(own.detach(), whole, self).hooks if self.keeps_own else nullcontext():
            return self.attention(query, *whole.split(key.shape[1], dim=1), segments, scale)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Return [1, heads, tokens of all, dim] in the order of the line for those of this rank."""
        heads, count, dim = own.shape[1:]
        padded = own.new_zeros(self.length, heads, dim)
        padded[:count] = own[0].transpose(0, 1)
        whole = distributed.gather_parts(padded.flatten(1)).index_select(0, self.order)
        return whole.unflatten(1, (heads, dim)).transpose(0, 1).unsqueeze(0)

    def summed(self, whole: torch.Tensor, count: int) -> torch.Tensor:
        """Return what all ranks give for the tokens of this one, the other way round."""
        heads, _, dim = whole.shape[1:]
        parts = whole.new_zeros(distributed.mesh().context * self.length, heads * dim)
        parts[self.order] = whole[0].transpose(0, 1).flatten(1)
        own = distributed.sum_parts(parts)[:count]
        return own.unflatten(1, (heads, dim)).transpose(0, 1).unsqueeze(0)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, shared):
        ctx.shared, ctx.count = shared, own.shape[2]
        return shared.gather(own)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.shared.summed(gradient, ctx.count), None


class _View(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Again:
    """Keeps of the gathered tensor, in what attention saves, where it is read; gathers it again for the way back."""

    def __init__(self, own, whole, shared: Shared):
        self.own, self.shared, self.storage = own, shared, whole.untyped_storage().data_ptr()
        self.whole, self.uses = None, 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor):
        if tensor.untyped_storage().data_ptr() != self.storage:
            return tensor
        self.uses += 1
        return _View(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _unpack(self, kept):
        if not isinstance(kept, _View):
            return kept
        if self.whole is None:
            self.whole = self.shared.gather(self.own)
        found = self.whole.as_strided(*kept)
        self.uses -= 1
        if not self.uses:
            self.whole = None
        return found


def over_cache(query, key, value, allowed, bias, scale: float, rules: Scores) -> torch.Tensor:
    """Attention over a key-value cache, [rows, heads, length, dim]; keys and values [rows, kv_heads, keys, dim].

    `allowed` bool [rows, 1, length, keys] serves whole prompts, None = causal from the first key; `bias` float32
    [rows, 1, 1, keys] one new token a row, 0 or -inf, None = it sees every key. Soft caps and ALiBi are `rules`.
    """
    if rules.cap or rules.slopes:
        return _attend_by_rules(query, key, value, allowed, scale, rules)
    if query.shape[2] == 1 and query.device.type == "cpu":
        return _attend_one(query, key, value, bias, scale)
    grouped, causal = query.shape[1] != key.shape[1], allowed is None and query.shape[2] > 1
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _attend_by_rules(query, key, value, allowed, scale: float, rules: Scores) -> torch.Tensor:
    """`over_cache` written out; `allowed` None = causal from the first key."""
    rows, heads, length, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(rows, groups, -1, dim)
    scores = (grouped @ key.mT).float().mul_(scale).view(rows, groups, -1, length, keys)
    if rules.cap:
        scores.div_(rules.cap).tanh_().mul_(rules.cap)
    if rules.slopes:
        slopes = scores.new_tensor(rules.slopes).view(groups, -1, 1, 1)
        scores += slopes * torch.arange(keys, device=scores.device)
    if allowed is None:
        allowed = torch.ones(length, keys, dtype=torch.bool, device=scores.device).tril(keys - length)[None, None]
    # No infinity: queries on padding see nothing.
    scores.masked_fill_(~allowed.unsqueeze(2), torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1).to(value.dtype).view(rows, groups, -1, keys)
    return (weights @ value).view(rows, heads, length, dim)


def _attend_one(query, key, value, bias, scale: float) -> torch.Tensor:
    """Attention of one new token a row, written out: the kernel for whole texts takes several times as long on CPU."""
    rows, heads, _, dim = query.shape
    grouped = query.reshape(rows * key.shape[1], -1, dim)
    scores = torch.bmm(grouped, key.flatten(0, 1).mT).float().mul_(scale)
    if bias is not None:
        scores.view(rows, key.shape[1], -1, scores.shape[-1]).add_(bias)
    weights = torch.softmax(scores, -1).to(value.dtype)
    return torch.bmm(weights, value.flatten(0, 1)).view(rows, heads, 1, dim)
