"""Protects attention of packed examples: whatever computes it, each example sees itself and what is before, alone."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from msft.backend import context
from msft.backend.mesh import Mesh
from msft.backend.torch import attention
from tests.backend.torch_operators import agree, drawn

LENGTHS = [5, 1, 9]
WHOLE = context.part(np.repeat([1, 2, 3], LENGTHS)[None]).pieces


RULES = {
    "window": attention.Scores(window=3),
    "cap": attention.Scores(cap=0.8),
    "ALiBi": attention.Scores(slopes=(0.5, 0.25, 0.125, 0.0625, 0.03, 0.7)),
    "all": attention.Scores(0.8, (0.5, 0.25, 0.125, 0.0625, 0.03, 0.7), 3),
}


def by_rules(query, key, value, rules):
    """Attention written down plainly: softmax(cap tanh(0.3 q k / cap) + slope x key's place), masked."""
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    place = torch.cat([torch.arange(length) for length in LENGTHS])
    distance = place[:, None] - place
    allowed = (number[:, None] == number) & (distance >= 0) & (distance < (rules.window or 99))
    keys, values = (tensor.repeat_interleave(3, dim=1) for tensor in (key, value))
    scores = query @ keys.mT * 0.3
    scores = rules.cap * torch.tanh(scores / rules.cap) if rules.cap else scores
    scores = scores + torch.tensor(rules.slopes or [0.0]).view(-1, 1, 1) * place
    return torch.softmax(scores.masked_fill(~allowed, -1e9), -1) @ values


@pytest.mark.parametrize("how", ["tiled", "by_segment", "on_cpu"])
@pytest.mark.parametrize("kept", [512, 4])
@pytest.mark.parametrize("name", RULES)
def test_windows_soft_caps_and_alibi_are_what_their_formulas_say(monkeypatch, name, kept, how):
    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(attention, "KEPT", kept)
    inputs = [drawn(1, heads, sum(LENGTHS), 8, seed=seed) for seed, heads in enumerate((6, 2, 2))]
    segments = attention.Segments(WHOLE, "cpu", RULES[name])
    agree(
        lambda: getattr(attention, how)(*inputs, segments, 0.3),
        lambda: by_rules(*inputs, RULES[name]),
        inputs,
    )


@pytest.mark.parametrize("how", ["tiled", "by_segment", "on_cpu"])
@pytest.mark.parametrize("kept", [512, 4])
@pytest.mark.parametrize("contexts", [(3, 0, 7), (5, 1, 9), (1, 1, 2)])
def test_contexts_are_seen_by_all_of_their_segment(monkeypatch, contexts, kept, how):
    """By a mask over the whole line, both ways; tiles of four, so that contexts end inside and behind one."""
    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(attention, "KEPT", kept)
    inputs = [drawn(1, heads, sum(LENGTHS), 8, seed=seed) for seed, heads in enumerate((6, 2, 2))]
    segments = attention.Segments(WHOLE, "cpu", contexts=np.array(contexts))

    def masked(query, key, value):
        number = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
        place = torch.cat([torch.arange(length) for length in LENGTHS])
        ends = torch.repeat_interleave(torch.tensor(contexts), torch.tensor(LENGTHS))
        allowed = (number[:, None] == number) & ((place[:, None] >= place) | (place < ends))
        keys, values = (tensor.repeat_interleave(3, dim=1) for tensor in (key, value))
        return torch.softmax((query @ keys.mT * 0.3).masked_fill(~allowed, -1e9), -1) @ values

    agree(lambda: getattr(attention, how)(*inputs, segments, 0.3), lambda: masked(*inputs), inputs)


def under_a_block_mask(query, key, value):
    """torch's attention of three heads to a key, each segment seeing itself alone."""
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    allowed = (number[:, None] == number) & torch.ones(len(number), len(number), dtype=torch.bool).tril()
    keys, values = (tensor.repeat_interleave(3, dim=1) for tensor in (key, value))
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=allowed, scale=0.3)


def test_segment_attention_is_attention_under_a_block_mask():
    query, key, value = drawn(1, 6, 15, 8), drawn(1, 2, 15, 8, seed=1), drawn(1, 2, 15, 8, seed=2)
    segments = attention.Segments(WHOLE, "cpu")
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
    segments = attention.Segments(WHOLE, "cpu")
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
        attention.tiled(query, key, value, attention.Segments(WHOLE, "cpu"), 0.3)
    assert [list(tensor.shape) for tensor in kept[3:]] == [[2, 15, 5], [2, 3, 1]]


@pytest.mark.parametrize(
    ("kind", "kept", "expected"),
    [(torch.float32, 9, "tiled"), (torch.float32, 8, "by_segment"), (torch.bfloat16, 8, "tiled")],
)
def test_long_segments_in_float32_are_left_to_torchs_kernel(monkeypatch, kind, kept, expected):
    monkeypatch.setattr(attention, "KEPT", kept)
    for name in ("tiled", "by_segment"):
        monkeypatch.setattr(attention, name, lambda *_, name=name: name)
    segments = attention.Segments(WHOLE, "cpu")
    assert attention.on_cpu(*(drawn(1, 2, 15, 8).to(kind) for _ in range(3)), segments, 0.3) == expected


def test_segments_are_cut_into_tiles_of_nearly_equal_length(monkeypatch):
    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(attention, "KEPT", 5)
    assert attention.Segments(WHOLE, "cpu").tiles == [
        (0, 2, 0, 2, 0, True, 2, 0),
        (2, 5, 0, 5, 0, True, 5, 0),
        (5, 6, 5, 6, 5, True, 6, 5),
        (6, 9, 6, 9, 6, False, 9, 6),
        (9, 12, 6, 12, 6, False, 12, 6),
        (12, 15, 6, 15, 6, False, 15, 6),
    ]
    narrow = attention.Segments(WHOLE, "cpu", attention.Scores(window=2))
    assert narrow.tiles[-1] == (12, 15, 11, 15, 6, False, 15, 6)


def varlen_by_its_description(monkeypatch, calls):
    """A stand-in for the kernel that exists on CUDA alone, by its signature and documentation: its calls are noted."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*arguments, **options):
        given = signature.bind(*arguments, **options).arguments
        calls.append(given)
        assert given["window_size"] == (-1, 0) and given["enable_gqa"]
        parts = [given[name].transpose(0, 1).unsqueeze(0) for name in ("query", "key", "value")]
        borders = given["cu_seq_q"].tolist(), given["cu_seq_k"].tolist(), given["cu_seq_k"].tolist()
        mixed = []
        for number in range(len(borders[0]) - 1):
            query, key, value = (
                part[:, :, at[number] : at[number + 1]] for part, at in zip(parts, borders, strict=True)
            )
            allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
            how = {"attn_mask": allowed, "scale": given["scale"], "enable_gqa": True}
            mixed.append(functional.scaled_dot_product_attention(query, key, value, **how))
        return torch.cat(mixed, dim=2).squeeze(0).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)


def test_varlen_attention_passes_what_the_fused_kernel_takes(monkeypatch):
    calls = []
    varlen_by_its_description(monkeypatch, calls)
    query, key, value = drawn(1, 6, 15, 8), drawn(1, 2, 15, 8, seed=1), drawn(1, 2, 15, 8, seed=2)
    segments = attention.Segments(WHOLE, "cpu")
    agree(
        lambda: attention.across_segments(query, key, value, segments, 0.3),
        lambda: attention.by_segment(query, key, value, segments, 0.3),
        (query, key, value),
    )
    for given in calls:
        assert given["cu_seq_q"].tolist() == given["cu_seq_k"].tolist() == [0, 5, 6, 15]
        assert (given["max_q"], given["max_k"]) == (9, 9)


@pytest.mark.parametrize("kernel", ["by_segment", "tiled", "on_cpu", "across_segments"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_queries_of_a_rank_with_keys_of_all_are_a_part_of_the_whole_attention(monkeypatch, kernel, ranks):
    """Mixed values in the places of each rank's tokens, and gradients that add up over the ranks."""
    varlen_by_its_description(monkeypatch, [])
    monkeypatch.setattr(attention, "TILE", 2)
    monkeypatch.setattr(attention, "KEPT", 4)
    query, key, value = drawn(1, 6, 15, 8), drawn(1, 2, 15, 8, seed=1), drawn(1, 2, 15, 8, seed=2)

    def of_ranks():
        mixed = torch.zeros(1, 6, 15, 8)
        for rank in range(ranks):
            part = context.part(np.repeat([1, 2, 3], LENGTHS)[None], ranks, rank)
            places, segments = torch.from_numpy(part.places), attention.Segments(part.pieces, "cpu")
            own = getattr(attention, kernel)(query[:, :, places], key, value, segments, 0.3)
            mixed = mixed.index_copy(2, places, own)
        return mixed

    agree(of_ranks, lambda: under_a_block_mask(query, key, value), (query, key, value))


def test_keys_and_values_are_gathered_again_rather_than_kept(monkeypatch):
    """One rank of two whose other one has nothing: what attention saves of the gathered tensor is not held."""
    count = []

    def gather(part):
        count.append(len(part))
        return torch.cat((part, torch.zeros_like(part)))

    monkeypatch.setattr(
        attention,
        "distributed",
        SimpleNamespace(
            gather_parts=gather, sum_parts=lambda whole: whole[: len(whole) // 2], mesh=lambda: Mesh(context=2)
        ),
    )
    part = context.part(np.repeat([1, 2, 3], LENGTHS)[None])
    segments = attention.Segments(WHOLE, "cpu")
    inputs = [drawn(1, heads, 15, 8, seed=seed) for seed, heads in enumerate((6, 2, 2))]
    for keeps_own, gathered in ((True, 2), (False, 1)):
        count.clear()
        shared = attention.Shared(attention.by_segment, part, keeps_own, "cpu")
        query, key, value = (tensor.clone().requires_grad_() for tensor in inputs)
        mixed = shared(query, key, value, segments, 0.3)
        expected = attention.by_segment(*(leaf := [t.clone().requires_grad_() for t in inputs]), segments, 0.3)
        torch.testing.assert_close(mixed, expected)
        found = torch.autograd.grad(mixed.square().sum(), (query, key, value))
        torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), leaf))
        assert count == [15] * gathered


def test_segments_know_their_borders():
    segments = attention.Segments(WHOLE, "cpu")
    np.testing.assert_array_equal(segments.borders(segments.keys).numpy(), np.array([0, 5, 6, 15], np.int32))
    assert segments.longest == 9 and segments.is_whole
