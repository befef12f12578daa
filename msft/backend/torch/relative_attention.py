"""Attention of an encoder-decoder on lines of tokens: with T5's relative positions, and from one line to another."""

import numpy as np
import torch
from torch.nn import functional

from msft.backend.seq2seq import Side
from msft.models.encoder import RelativePositions


class RelativeAttention:
    """Attention within a line's segments, to whose scores buckets of distances add a head's number from a table.

    It is of one line; the table [buckets, heads] is looked up once for each length, for all layers. What is added to
    segments of one length is one tensor.
    """

    def __init__(self, positions: RelativePositions, side: Side, table: torch.Tensor, is_causal: bool):
        self.lengths = [length for length in side.lengths() if length]
        self.biases = {length: _bias(positions, length, table, is_causal) for length in set(self.lengths)}

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the mixed values for heads [1, heads, tokens, head_dim]."""
        parts = zip(*(heads.split(self.lengths, 2) for heads in (query, key, value)), strict=True)
        found = [mixed(*part, self.biases[part[0].shape[2]]) for part in parts]
        return torch.cat(found, 2) if found else value


class CrossAttention:
    """Attention of the segments of a line to the same segments of another, to all of their tokens."""

    def __init__(self, target: Side, source: Side):
        pairs = zip(target.lengths(), source.borders.tolist(), source.borders.tolist()[1:], strict=False)
        self.pieces = [piece for piece in pairs if piece[0]]

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the mixed values [1, heads, tokens, head_dim] for queries, and keys and values of the other line."""
        queries = query.split([length for length, _, _ in self.pieces], 2)
        parts = zip(queries, self.pieces, strict=True)
        found = [mixed(part, key[:, :, start:end], value[:, :, start:end]) for part, (_, start, end) in parts]
        return torch.cat(found, 2) if found else query


def mixed(query, key, value, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return attention of heads [rows, heads, tokens, head_dim], to whose scores `bias` is added, not scaled."""
    bias = None if bias is None else bias.to(query.dtype)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)


def _bias(positions: RelativePositions, length: int, table: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """What is added to the scores of a segment [1, heads, length, length]."""
    places = np.arange(length)
    buckets = torch.from_numpy(positions.bucket(places - places[:, None], is_causal)).to(table.device)
    added = functional.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)
    if not is_causal:
        return added
    later = torch.full((length, length), float("-inf"), dtype=added.dtype, device=added.device).triu(1)
    return added + later
