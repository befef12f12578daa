"""Protects torch's written-out operators: each equals the plain one, forwards and backwards, and keeps what it says."""

import pytest
import torch
from torch.nn import functional

from msft.backend.torch import block
from tests.backend.torch_operators import agree, drawn


@pytest.mark.parametrize("rows", [3, 80])
@pytest.mark.parametrize("tuned", [False, True])
def test_linear(rows, tuned):
    hidden, weight, bias = drawn(2, rows, 12), drawn(7, 12, seed=1, grad=tuned), drawn(7, seed=2, grad=tuned)
    agree(
        lambda: block.linear(hidden, weight, bias, torch.float32),
        lambda: functional.linear(hidden, weight, bias),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("rows", [1, 2, block.VECTORS, block.VECTORS + 1, block.NARROW, block.NARROW + 1])
@pytest.mark.parametrize("features", [7, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows(rows, features, biased):
    hidden, weight = drawn(rows, 12, grad=False), drawn(features, 12, seed=1, grad=False)
    bias = drawn(features, seed=2, grad=False) if biased else None
    torch.testing.assert_close(block.few_rows(hidden, weight, bias), functional.linear(hidden, weight, bias))


@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_adapted_linear_is_a_linear_layer_and_its_low_rank_part(probability):
    hidden, weight, bias = drawn(1, 70, 12), drawn(7, 12, seed=1, grad=False), drawn(7, seed=2, grad=False)
    a, b = drawn(4, 12, seed=3), drawn(7, 4, seed=4)
    keep = drawn(1, 70, 12, seed=5, grad=False) > -0.5 if probability else None

    def plain():
        kept = hidden if keep is None else torch.where(keep, hidden / (1 - probability), 0.0)
        return functional.linear(hidden, weight, bias) + functional.linear(functional.linear(kept, a), b) * 2.0

    inputs = (hidden, a, b)
    agree(lambda: block.adapted_linear(hidden, weight, bias, a, b, 2.0, keep, probability), plain, inputs)
    apart = functional.linear(hidden, weight, bias) + block.low_rank(hidden, a, b, 2.0, keep, probability)
    torch.testing.assert_close(apart, plain())


def test_adapted_linear_keeps_no_more_than_its_input_the_mask_weights_and_rank_numbers_a_token():
    hidden, weight = drawn(1, 70, 12), drawn(7, 12, seed=1, grad=False)
    a, b, keep = drawn(4, 12, seed=3), drawn(7, 4, seed=4), drawn(1, 70, 12, seed=5, grad=False) > 0
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        block.adapted_linear(hidden, weight, None, a, b, 2.0, keep, 0.5)
    given = {tensor.data_ptr() for tensor in (hidden, weight, a, b, keep)}
    assert given < {tensor.data_ptr() for tensor in kept}
    assert [tensor.shape for tensor in kept if tensor.data_ptr() not in given] == [(70, 4)]


@pytest.mark.parametrize("rotate", [block.rotate, block.plain_rotate])
def test_rotate_is_llamas(rotate):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = drawn(2, 6, 4, 8).transpose(1, 2), drawn(2, 6, 2, 8, seed=1).transpose(1, 2)
    angles = drawn(2, 6, 4, seed=2, grad=False).repeat(1, 1, 2)
    for place, heads in enumerate((query, key)):
        agree(
            lambda place=place: rotate(query, key, angles.cos(), angles.sin())[place],
            lambda place=place: apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())[place],
            (heads,),
        )


def test_swiglu():
    gate, up = drawn(3, 10), drawn(3, 10, seed=1)
    agree(lambda: block.swiglu(gate, up), lambda: functional.silu(gate) * up, (gate, up))


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rms_norm_is_llamas(kind, tuned):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(16, eps=1e-5)
    norm.weight = torch.nn.Parameter(drawn(16, seed=1, grad=False), requires_grad=tuned)
    hidden = drawn(2, 6, 16).detach().to(kind).requires_grad_()
    tolerance = 2e-6 if kind == torch.float32 else 1e-2
    agree(lambda: block.rms_norm(hidden, norm.weight, 1e-5), lambda: norm(hidden), (hidden, norm.weight), tolerance)
