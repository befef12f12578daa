"""The MindSpore engine's attention within segments against torch's, gradients included, and Ascend's form of it."""

import importlib
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from msft.backend.contract import Precision
from tests.backend.test_tiles import pairs_of, random_segments

HEADS, KV_HEADS, DIM = 4, 2, 8


@pytest.fixture(scope="module")
def attention():
    # Engines do so too, and cannot any more once something has run without.
    importlib.import_module("mindspore").set_device("CPU")
    return importlib.import_module("msft.backend.mindspore.attention")


@pytest.fixture(scope="module")
def tiled(attention):
    spec = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM)
    return attention.TiledAttention(spec, Precision())


def expected(segment_ids, query, key, value, gradient):
    """Mixed values and the gradients of query, key and value by torch, in float64."""
    query, key, value = (torch.from_numpy(array).double().requires_grad_() for array in (query, key, value))
    allowed = torch.from_numpy(pairs_of(segment_ids))
    keys, values = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * DIM**-0.5
    weights = torch.softmax(scores.masked_fill(~allowed, -1e30), -1) * allowed
    mixed = torch.einsum("hqk,khd->qhd", weights, values)
    gradients = torch.autograd.grad(mixed, (query, key, value), torch.from_numpy(gradient).double())
    return [part.detach().numpy() for part in (mixed, *gradients)]


@pytest.mark.parametrize("rows,length", [(1, 20), (3, 20), (2, 200)])
def test_mixed_values_and_gradients_are_torchs(tiled, rows, length):
    tensor = importlib.import_module("mindspore").Tensor
    for seed in range(4):
        segment_ids, random = random_segments(rows, length, seed), np.random.default_rng(seed)
        shapes = [(rows * length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
        arrays = [random.standard_normal(shape, np.float32) for shape in shapes]
        *heads, gradient = map(tensor, arrays)
        plan = tiled.plan(segment_ids)
        mixed = tiled.forward(*heads, plan)
        ours = [part.asnumpy() for part in (mixed, *tiled.backward(gradient, *heads, mixed, plan))]
        for one, other in zip(ours, expected(segment_ids, *arrays), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
        assert not ours[0][segment_ids.reshape(-1) == 0].any()


def test_ascends_flash_attention_has_the_same_methods_and_takes_the_arguments_it_is_given(attention):
    operators = importlib.import_module("mindspore.ops")
    for name in ("plan", "forward", "backward"):
        signatures = [
            list(inspect.signature(getattr(kind, name)).parameters)
            for kind in (attention.TiledAttention, attention.FusedAttention)
        ]
        assert signatures[0] == signatures[1]
    known = set(inspect.signature(operators.flash_attention_score).parameters)
    assert known >= {"attn_mask", "actual_seq_qlen", "actual_seq_kvlen", "scalar_value", "input_layout", "sparse_mode"}


def test_ascends_flash_attention_is_told_where_each_run_of_tokens_ends(attention):
    """The last end must be the number of tokens, so padding counts as a run; its results are made zero."""
    segment_ids = np.array([[1, 1, 2, 0], [1, 2, 2, 2]], np.int32)
    ends, real, triangle = attention.FusedAttention().plan(segment_ids)
    assert ends == (2, 3, 4, 5, 8)
    assert real.asnumpy().reshape(-1).tolist() == (segment_ids != 0).reshape(-1).tolist()
    assert triangle.asnumpy()[:3, :3].tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
