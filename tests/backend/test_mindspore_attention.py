"""Protects attention on tiles, forwards and backwards: that of torch for each example alone, whatever its length."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mindspore import Tensor
from mindspore import ops as operators
from torch.nn import functional

from msft.backend import line as lines
from msft.backend.contract import Precision
from msft.backend.mesh import Mesh
from msft.backend.mindspore import attention, fused_attention

SPEC = SimpleNamespace(
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    attention_scale=8**-0.5,
    attention_cap=None,
    has_alibi=False,
)
# Tiles with 1, 2, 4, 8 and 16 tiles of keys, whole and broken ones.
LENGTHS = [64, 1, 130, 63, 300, 580, 17]


def of_torch(heads, direction):
    """Mixed values and the gradient of `heads`, example by example."""
    heads = torch.from_numpy(heads).requires_grad_()
    parts = heads.reshape(len(heads), -1, SPEC.head_dim).transpose(0, 1).split(LENGTHS, dim=1)
    mixed = []
    for part in parts:
        query, key, value = part.split([4, 2, 2])
        found = functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, enable_gqa=True
        )
        mixed.append(found[0].transpose(0, 1).flatten(1))
    mixed = torch.cat(mixed)
    return mixed.detach().numpy(), torch.autograd.grad(mixed, heads, torch.from_numpy(direction))[0].numpy()


def by_rules(heads, direction, cap, slopes, window):
    """`of_torch` written down plainly: softmax(cap tanh(q k / (cap root 8)) + slope x key's place), masked."""
    heads = torch.from_numpy(heads).requires_grad_()
    parts = heads.reshape(len(heads), -1, SPEC.head_dim).transpose(0, 1).split(LENGTHS, dim=1)
    mixed = []
    for part in parts:
        query, key, value = part.split([4, 2, 2])
        place = torch.arange(part.shape[1])
        distance = place[:, None] - place
        scores = query @ key.repeat_interleave(2, 0).mT * SPEC.attention_scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        scores = scores + torch.tensor(slopes or [0.0]).view(-1, 1, 1) * place
        scores = scores.masked_fill((distance < 0) | (distance >= (window or 9999)), -1e9)
        found = torch.softmax(scores, -1) @ value.repeat_interleave(2, 0)
        mixed.append(found.transpose(0, 1).flatten(1))
    mixed = torch.cat(mixed)
    return mixed.detach().numpy(), torch.autograd.grad(mixed, heads, torch.from_numpy(direction))[0].numpy()


def line(ranks=1, rank=0):
    """Heads and a direction for what attention makes of them, float32, and the line that they stand in."""
    segments = np.repeat(np.arange(1, 8), LENGTHS)[None].astype(np.int32)
    found, random = lines.line(segments, segments, segments, ranks, rank), np.random.default_rng(0)
    sizes = (len(found.input_ids), 64), (len(found.input_ids), 32)
    return *(random.normal(size=size).astype(np.float32) for size in sizes), found


@pytest.mark.parametrize("kept", [512, 64], ids=["weights kept", "weights computed again"])
def test_tiled_attention_is_that_of_each_example_alone(monkeypatch, kept):
    monkeypatch.setattr(attention, "KEPT", kept)
    tokens = sum(LENGTHS)
    heads, direction, found_line = line()

    tiled = attention.TiledAttention(SPEC, Precision())
    plan = tiled.plan(found_line)
    mixed, weights = tiled.forward(Tensor(heads), plan)
    found = tiled.backward(Tensor(direction), Tensor(heads), mixed, weights, plan)

    assert [one is None for one in weights] == [tiles.bias.shape[-1] > kept for tiles in plan]
    expected, gradient = of_torch(heads[:tokens], direction[:tokens])
    np.testing.assert_allclose(mixed.asnumpy()[:tokens], expected, atol=5e-6)
    np.testing.assert_allclose(found.asnumpy()[:tokens], gradient, atol=5e-5)
    assert not mixed.asnumpy()[tokens:].any() and not found.asnumpy()[tokens:].any()


@pytest.mark.parametrize(
    ("cap", "alibi", "window", "kept"),
    [(None, False, 40, 512), (0.8, False, 0, 64), (None, True, 0, 64), (0.8, True, 100, 512)],
)
def test_windows_soft_caps_and_alibi_are_what_their_formulas_say(monkeypatch, cap, alibi, window, kept):
    monkeypatch.setattr(attention, "KEPT", kept)
    tokens = sum(LENGTHS)
    heads, direction, found_line = line()
    spec = SimpleNamespace(**{**vars(SPEC), "attention_cap": cap, "has_alibi": alibi})
    tiled = attention.TiledAttention(spec, Precision(), window)
    plan = tiled.plan(found_line)
    mixed, weights = tiled.forward(Tensor(heads), plan)
    found = tiled.backward(Tensor(direction), Tensor(heads), mixed, weights, plan)
    # Slopes of four heads: 2^-2, 2^-4, 2^-6, 2^-8.
    slopes = [0.25, 0.0625, 0.015625, 0.00390625] if alibi else None
    expected, gradient = by_rules(heads[:tokens], direction[:tokens], cap, slopes, window)
    np.testing.assert_allclose(mixed.asnumpy()[:tokens], expected, atol=2e-5)
    np.testing.assert_allclose(found.asnumpy()[:tokens], gradient, atol=5e-5)


FLASH = inspect.signature(operators.flash_attention_score)


def stand_in(*arguments, **words):
    """What Ascend's kernel computes of queries, keys and values [tokens, heads, dim] by its description, plainly."""
    told = FLASH.bind(*arguments, **words).arguments
    assert told["input_layout"] == "TND" and told["sparse_mode"] == 3
    assert np.array_equal(told["attn_mask"].asnumpy(), np.triu(np.ones((2048, 2048)), 1))
    ends, key_ends = told["actual_seq_qlen"], told["actual_seq_kvlen"]
    assert (ends[-1], key_ends[-1]) == (told["query"].shape[0], told["key"].shape[0])
    # The last query of each stretch sees its last key, the one before all but the last ...
    number, of_key = (np.searchsorted(at, np.arange(at[-1]), side="right") for at in (ends, key_ends))
    behind = np.array(ends)[number] - np.arange(ends[-1])
    key_behind = np.array(key_ends)[of_key] - np.arange(key_ends[-1])
    allowed = (number[:, None] == of_key) & (key_behind >= behind[:, None])
    parts = [told[name].transpose(1, 0, 2).expand_dims(0) for name in ("query", "key", "value")]
    # `dense` scales by the head's size, the kernel by what it is told.
    parts[0] = parts[0] * (told["scalar_value"] * SPEC.head_dim**0.5)
    return attention.dense(attention.Scores.of(SPEC), Precision())(*parts, Tensor(allowed[None]))[0].transpose(1, 0, 2)


def test_fused_attention_asks_the_kernel_for_the_same(monkeypatch):
    monkeypatch.setattr(attention.operators, "flash_attention_score", stand_in)
    tokens = sum(LENGTHS)
    heads, direction, found_line = line()
    direction[tokens:] = 0
    fused = fused_attention.FusedAttention(SPEC)
    plan = fused.plan(found_line)
    mixed, kept = fused.forward(Tensor(heads), plan)
    found = fused.backward(Tensor(direction), Tensor(heads), mixed, kept, plan)
    expected, gradient = of_torch(heads[:tokens], direction[:tokens])
    np.testing.assert_allclose(mixed.asnumpy()[:tokens], expected, atol=5e-6)
    np.testing.assert_allclose(found.asnumpy()[:tokens], gradient, atol=5e-5)


@pytest.mark.parametrize("kind", ["tiled", "fused"])
def test_queries_of_a_rank_with_keys_of_all_are_a_part_of_the_whole_attention(monkeypatch, kind):
    """Mixed values of each of two ranks, and gradients, those of keys and values summed over both ranks."""
    monkeypatch.setattr(attention.operators, "flash_attention_score", stand_in)
    whole, direction, _ = line()
    parts = [line(2, rank)[2] for rank in range(2)]
    length, tokens = len(parts[0].input_ids), sum(LENGTHS)

    def placed(values, part):
        """A rank's line of values."""
        found = np.zeros((length, values.shape[1]), np.float32)
        found[: len(part.places)] = values[part.places]
        return found

    gathered = np.concatenate([placed(whole, part)[:, 32:] for part in parts])
    sums = []

    def sum_parts(given):
        sums.append(given.asnumpy())
        return given[:length]

    fakes = {"gather_parts": lambda _: Tensor(gathered), "sum_parts": sum_parts, "mesh": lambda: Mesh(context=2)}
    for module in (attention, fused_attention):
        monkeypatch.setattr(module, "distributed", SimpleNamespace(**fakes))
    mixed, gradient = np.zeros((tokens, 32), np.float32), np.zeros((tokens, 64), np.float32)
    for part in parts:
        shared = (
            attention.SharedTiledAttention(SPEC, Precision())
            if kind == "tiled"
            else fused_attention.SharedFusedAttention(SPEC)
        )
        plan, heads = shared.plan(part), Tensor(placed(whole, part))
        found, kept = shared.forward(heads, plan)
        by_heads = shared.backward(Tensor(placed(direction, part)), heads, found, kept, plan)
        count = len(part.places)
        mixed[part.places] = found.asnumpy()[:count]
        gradient[part.places, :32] = by_heads.asnumpy()[:count, :32]
    gradient[:, 32:] = sum(sums)[parts[0].order]
    expected, expected_gradient = of_torch(whole[:tokens], direction[:tokens])
    np.testing.assert_allclose(mixed, expected, atol=5e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=5e-5)
