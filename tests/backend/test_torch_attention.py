"""Protects attention of packed examples: whatever computes it, each example sees itself and what is before, alone."""

import inspect

import numpy as np
import pytest
import torch
from torch.nn import functional

from msft.backend.torch import attention
from tests.backend.torch_operators import agree, drawn

LENGTHS = [5, 1, 9]


def under_a_block_mask(query, key, value):
    """torch's attention of three heads to a key, each segment seeing itself alone."""
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    allowed = (number[:, None] == number) & torch.ones(len(number), len(number), dtype=torch.bool).tril()
    keys, values = (tensor.repeat_interleave(3, dim=1) for tensor in (key, value))
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=allowed, scale=0.3)


def test_segment_attention_is_attention_under_a_block_mask():
    query, key, value = drawn(1, 6, 15, 8), drawn(1, 2, 15, 8, seed=1), drawn(1, 2, 15, 8, seed=2)
    segments = attention.Segments(LENGTHS, "cpu")
    agree(
        lambda: attention.by_segment(query, key, value, segments, 0.3),
        lambda: under_a_block_mask(query, key, value),
        (query, key, value),
    )


@pytest.mark.parametrize("kept", [512, 4])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_tiled_attention_is_attention_under_a_block_mask(monkeypatch, kind, kept):
    """Two tiles and more for a segment; attention weights kept, and computed again."""
    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(attention, "KEPT", kept)
    inputs = [drawn(1, heads, sum(LENGTHS), 8, seed=seed) for seed, heads in enumerate((6, 2, 2))]
    segments = attention.Segments(LENGTHS, "cpu")
    tolerance = 2e-6 if kind == torch.float32 else 2e-2
    agree(
        lambda: attention.tiled(*(tensor.to(kind) for tensor in inputs), segments, 0.3).float(),
        lambda: under_a_block_mask(*inputs),
        inputs,
        tolerance,
    )


def test_tiled_attention_keeps_weights_of_short_segments_alone(monkeypatch):
    monkeypatch.setattr(attention, "KEPT", 5)
    query, key, value = (drawn(1, heads, sum(LENGTHS), 8) for heads in (6, 2, 2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        attention.tiled(query, key, value, attention.Segments(LENGTHS, "cpu"), 0.3)
    assert [list(tensor.shape) for tensor in kept[3:]] == [[2, 15, 5], [2, 3, 1]]


@pytest.mark.parametrize(
    ("kind", "kept", "expected"),
    [(torch.float32, 9, "tiled"), (torch.float32, 8, "by_segment"), (torch.bfloat16, 8, "tiled")],
)
def test_long_segments_in_float32_are_left_to_torchs_kernel(monkeypatch, kind, kept, expected):
    monkeypatch.setattr(attention, "KEPT", kept)
    for name in ("tiled", "by_segment"):
        monkeypatch.setattr(attention, name, lambda *_, name=name: name)
    segments = attention.Segments(LENGTHS, "cpu")
    assert attention.on_cpu(*(drawn(1, 2, 15, 8).to(kind) for _ in range(3)), segments, 0.3) == expected


def test_segments_are_cut_into_tiles_of_nearly_equal_length(monkeypatch):
    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(attention, "KEPT", 5)
    assert attention.Segments(LENGTHS, "cpu").tiles == [
        (0, 0, 2, True),
        (0, 2, 5, True),
        (5, 5, 6, True),
        (6, 6, 9, False),
        (6, 9, 12, False),
        (6, 12, 15, False),
    ]


def test_varlen_attention_passes_what_the_fused_kernel_takes(monkeypatch):
    """The kernel exists on CUDA alone: a stand-in with its signature computes what its documentation says."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*arguments, **options):
        given = signature.bind(*arguments, **options).arguments
        assert given["cu_seq_q"].tolist() == given["cu_seq_k"].tolist() == [0, 5, 6, 15]
        assert (given["max_q"], given["max_k"], given["window_size"]) == (9, 9, (-1, 0))
        query, key, value = (given[name].transpose(0, 1).unsqueeze(0) for name in ("query", "key", "value"))
        assert given["enable_gqa"] and query.shape[1] == 3 * key.shape[1]
        mixed = attention.by_segment(query, key, value, attention.Segments(LENGTHS, "cpu"), given["scale"])
        return mixed.squeeze(0).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    query, key, value = drawn(1, 6, 15, 8), drawn(1, 2, 15, 8, seed=1), drawn(1, 2, 15, 8, seed=2)
    segments = attention.Segments(LENGTHS, "cpu")
    agree(
        lambda: attention.across_segments(query, key, value, segments, 0.3),
        lambda: attention.by_segment(query, key, value, segments, 0.3),
        (query, key, value),
    )


def test_segments_know_their_borders():
    segments = attention.Segments(LENGTHS, "cpu")
    np.testing.assert_array_equal(segments.borders.numpy(), np.array([0, 5, 6, 15], np.int32))
    assert segments.longest == 9
