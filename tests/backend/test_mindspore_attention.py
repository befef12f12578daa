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
from msft.backend.mindspore import attention

SPEC = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
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
    return attention.dense(Precision())(*parts, Tensor(allowed[None]))[0].transpose(1, 0, 2)


def test_fused_attention_asks_the_kernel_for_the_same(monkeypatch):
    monkeypatch.setattr(attention.operators, "flash_attention_score", stand_in)
    tokens = sum(LENGTHS)
    heads, direction, found_line = line()
    direction[tokens:] = 0
    fused = attention.FusedAttention(SPEC)
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
    monkeypatch.setattr(attention, "distributed", SimpleNamespace(**fakes))
    mixed, gradient = np.zeros((tokens, 32), np.float32), np.zeros((tokens, 64), np.float32)
    for part in parts:
        shared = (
            attention.SharedTiledAttention(SPEC, Precision())
            if kind == "tiled"
            else attention.SharedFusedAttention(SPEC)
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
