"""Causal attention within segments, and over a key-value cache."""

import inspect
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

# Queries that `tiled` takes at a time: smaller tiles have smaller products, larger ones compute more masked scores.
TILE = 128
# Segments up to this length keep their attention weights for the backward pass, longer ones compute them again.
KEPT = 512


class Tile(NamedTuple):
    """Queries [first, end) of a segment and the keys [start, end) that they see."""

    start: int
    first: int
    end: int
    is_kept: bool


class Segments:
    """Where the examples lie in a line of tokens: `lengths` of each, one after the other, on a device."""

    def __init__(self, lengths: list[int], device: str):
        self.lengths = lengths
        self.longest = max(lengths)
        ends = np.cumsum([0, *lengths], dtype=np.int32)
        self.borders = torch.from_numpy(ends).to(device)
        self.tiles = [
            Tile(start, start + length * number // count, start + length * (number + 1) // count, length <= KEPT)
            for start, length in zip(ends.tolist(), lengths, strict=False)
            for count in [-(-length // TILE)]
            for number in range(count)
        ]


def by_segment(query, key, value, segments: Segments, scale: float) -> torch.Tensor:
    """Causal attention within each segment: [1, heads, tokens, dim] -> the same; pays for each segment's own square."""
    parts = zip(*(tensor.split(segments.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attend = functional.scaled_dot_product_attention
    grouped = query.shape[1] != key.shape[1]
    mixed = [attend(*part, is_causal=True, scale=scale, enable_gqa=grouped) for part in parts]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)


def tiled(query, key, value, segments: Segments, scale: float) -> torch.Tensor:
    """`by_segment` by plain products, for CPU, where torch's kernel takes two to four times as long backwards.

    The scores are in the dtype of the arguments, the softmax in float32.
    """
    return _Tiled.apply(query.to(value.dtype), key.to(value.dtype), value, segments, scale)


def on_cpu(query, key, value, segments: Segments, scale: float) -> torch.Tensor:
    """`tiled`, or in float32 `by_segment` where a segment is longer than `KEPT`."""
    # To compute the weights again takes longer than torch's kernel there: 219 for 167 ms at 2048 tokens.
    long = value.dtype == torch.float32 and segments.longest > KEPT
    return (by_segment if long else tiled)(query, key, value, segments, scale)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, segments, scale):
        mixed = _in_reading_order(query)
        weights = []
        for tile in segments.tiles:
            tile_weights = _weights(tile, _rows(query, key, tile), key, scale)
            _put(mixed, key, tile, torch.bmm(tile_weights, _keys(value, tile)))
            weights.append(tile_weights if tile.is_kept and any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.tiles, ctx.scale = segments.tiles, scale
        return mixed

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *kept = ctx.saved_tensors
        d_query, d_key, d_value = (_in_reading_order(tensor) for tensor in (query, key, value))
        for tile, weights in zip(ctx.tiles, kept, strict=True):
            queries, d_mixed = _rows(query, key, tile), _rows(gradient, key, tile)
            if weights is None:
                weights = _weights(tile, queries, key, ctx.scale)
            d_weights = _scaled_product(d_mixed, _keys(value, tile).mT, ctx.scale)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            _put(d_query, key, tile, torch.bmm(d_scores, _keys(key, tile)))
            _add(d_key, tile, torch.bmm(d_scores.mT, queries))
            _add(d_value, tile, torch.bmm(weights.mT, d_mixed))
        return d_query, d_key, d_value, None, None


def _weights(tile: Tile, queries, key, scale: float) -> torch.Tensor:
    """Softmax of the scores, [kv_heads, queries of a group, keys]; a query sees no key behind it."""
    scores = _scaled_product(queries, _keys(key, tile).mT, scale)
    length = tile.end - tile.first
    ahead = scores.new_full((length, length), float("-inf")).triu(1)
    scores.unflatten(1, (-1, length))[..., tile.first - tile.start :].add_(ahead)
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
    return tensor[0, :, tile.start : tile.end]


def _add(target, tile: Tile, part) -> None:
    """Add what a tile's queries bring to its keys; those that no earlier tile saw get their first value."""
    seen = tile.first - tile.start
    target[0, :, tile.first : tile.end] = part[:, seen:]
    if seen:
        target[0, :, tile.start : tile.first] += part[:, :seen]


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

    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    borders, longest = segments.borders, segments.longest
    grouped = query.shape[1] != key.shape[1]
    mixed = varlen_attn(
        query, key, value, borders, borders, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=grouped
    )
    return mixed.transpose(0, 1).unsqueeze(0)


def over_cache(query, key, value, allowed, bias, scale: float) -> torch.Tensor:
    """Attention over a key-value cache, [rows, heads, length, dim]; keys and values [rows, kv_heads, keys, dim].

    `allowed` bool [rows, 1, length, keys] serves whole prompts, None = causal from the first key; `bias` float32
    [rows, 1, 1, keys] one new token a row, 0 or -inf, None = it sees every key.
    """
    if query.shape[2] == 1 and query.device.type == "cpu":
        return _attend_one(query, key, value, bias, scale)
    grouped, causal = query.shape[1] != key.shape[1], allowed is None and query.shape[2] > 1
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _attend_one(query, key, value, bias, scale: float) -> torch.Tensor:
    """Attention of one new token a row, written out: the kernel for whole texts takes several times as long on CPU."""
    rows, heads, _, dim = query.shape
    grouped = query.reshape(rows * key.shape[1], -1, dim)
    scores = torch.bmm(grouped, key.flatten(0, 1).mT).float().mul_(scale)
    if bias is not None:
        scores.view(rows, key.shape[1], -1, scores.shape[-1]).add_(bias)
    weights = torch.softmax(scores, -1).to(value.dtype)
    return torch.bmm(weights, value.flatten(0, 1)).view(rows, heads, 1, dim)
