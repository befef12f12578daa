"""Protects attention on tiles, forwards and backwards: that of torch for each example alone, whatever its length."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mindspore import Tensor
from mindspore import ops as operators
from torch.nn import functional

from msft.backend.contract import Precision
from msft.backend.mindspore import attention

SPEC = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
# Tiles with 1, 2, 4, 8 and 16 tiles of keys, whole and broken ones.
LENGTHS = [64, 1, 130, 63, 300, 580, 17]
FILLING = 5


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


def line():
    """Heads and a direction for what attention makes of them, float32, and their segments."""
    random, tokens = np.random.default_rng(0), sum(LENGTHS) + FILLING
    segments = np.concatenate([np.repeat(np.arange(1, 8), LENGTHS), -np.arange(1, FILLING + 1)]).astype(np.int32)
    return *(random.normal(size=(tokens, size)).astype(np.float32) for size in (64, 32)), segments


@pytest.mark.parametrize("kept", [512, 64], ids=["weights kept", "weights computed again"])
def test_tiled_attention_is_that_of_each_example_alone(monkeypatch, kept):
    monkeypatch.setattr(attention, "KEPT", kept)
    tokens = sum(LENGTHS)
    heads, direction, segments = line()

    tiled = attention.TiledAttention(SPEC, Precision())
    plan = tiled.plan(segments)
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
    ends = told["actual_seq_qlen"]
    assert ends == told["actual_seq_kvlen"] and ends[-1] == told["query"].shape[0]
    number = np.searchsorted(ends, np.arange(ends[-1]), side="right")
    allowed = np.tril(number[:, None] == number)
    parts = [told[name].transpose(1, 0, 2).expand_dims(0) for name in ("query", "key", "value")]
    # `dense` scales by the head's size, the kernel by what it is told.
    parts[0] = parts[0] * (told["scalar_value"] * SPEC.head_dim**0.5)
    return attention.dense(Precision())(*parts, Tensor(allowed[None]))[0].transpose(1, 0, 2)


def test_fused_attention_asks_the_kernel_for_the_same(monkeypatch):
    monkeypatch.setattr(attention.operators, "flash_attention_score", stand_in)
    tokens = sum(LENGTHS)
    heads, direction, segments = line()
    direction[tokens:] = 0
    fused = attention.FusedAttention(SPEC)
    plan = fused.plan(segments)
    mixed, kept = fused.forward(Tensor(heads), plan)
    found = fused.backward(Tensor(direction), Tensor(heads), mixed, kept, plan)
    expected, gradient = of_torch(heads[:tokens], direction[:tokens])
    np.testing.assert_allclose(mixed.asnumpy()[:tokens], expected, atol=5e-6)
    np.testing.assert_allclose(found.asnumpy()[:tokens], gradient, atol=5e-5)
