"""Causal attention within segments, and over a key-value cache."""

import inspect

import numpy as np
import torch
from torch.nn import functional


class Segments:
    """Where the examples lie in a line of tokens: `lengths` of each, one after the other, on a device."""

    def __init__(self, lengths: list[int], device: str):
        self.lengths = lengths
        self.longest = max(lengths)
        ends = np.cumsum([0, *lengths], dtype=np.int32)
        self.borders = torch.from_numpy(ends).to(device)


def by_segment(query, key, value, segments: Segments, scale: float) -> torch.Tensor:
    """Causal attention within each segment: [1, heads, tokens, dim] -> the same; pays for each segment's own square."""
    parts = zip(*(tensor.split(segments.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attend = functional.scaled_dot_product_attention
    grouped = query.shape[1] != key.shape[1]
    mixed = [attend(*part, is_causal=True, scale=scale, enable_gqa=grouped) for part in parts]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)


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


def cached(query, key, value, allowed, causal: bool, scale: float) -> torch.Tensor:
    """Attention over a key-value cache, [rows, heads, length, dim]; `allowed` bool [rows, 1, length, keys] or None."""
    grouped = query.shape[1] != key.shape[1]
    if query.shape[2] == 1 and query.device.type == "cpu":
        return _attend_one(query, key, value, allowed, scale)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _attend_one(query, key, value, allowed, scale: float) -> torch.Tensor:
    """Attention of one new token a row, written out: the kernel for whole texts takes several times as long on CPU."""
    rows, heads, _, dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, dim)
    scores = (grouped @ key.transpose(-1, -2)).float() * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return (torch.softmax(scores, -1).to(value.dtype) @ value).view(rows, heads, 1, dim)
