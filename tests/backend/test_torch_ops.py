"""Protects torch's written-out operators: each equals the plain one, forwards and backwards, and keeps what it says."""

import inspect

import numpy as np
import pytest
import torch
from torch.nn import functional

from msft.backend.contract import Precision, Runtime
from msft.backend.torch import attention, block, ops

LENGTHS = [5, 1, 9]


def drawn(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_(grad)


def agree(ours, plain, inputs, tolerance=2e-6):
    """Outputs and the gradients of a drawn projection for the inputs that want them."""
    left, right = ours(), plain()
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    direction = drawn(*left.shape, seed=9, grad=False).to(left.dtype)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = (torch.autograd.grad(output, wanted, direction) for output in (left, right))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance * 5, atol=tolerance * 5)


@pytest.mark.parametrize("rows", [3, 80])
@pytest.mark.parametrize("tuned", [False, True])
def test_linear(rows, tuned):
    hidden, weight, bias = drawn(2, rows, 12), drawn(7, 12, seed=1, grad=tuned), drawn(7, seed=2, grad=tuned)
    agree(
        lambda: block.linear(hidden, weight, bias, torch.float32),
        lambda: functional.linear(hidden, weight, bias),
        (hidden, weight, bias),
    )


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


def test_adapted_linear_keeps_no_more_than_its_input_the_mask_and_weights():
    hidden, weight = drawn(1, 70, 12), drawn(7, 12, seed=1, grad=False)
    a, b, keep = drawn(4, 12, seed=3), drawn(7, 4, seed=4), drawn(1, 70, 12, seed=5, grad=False) > 0
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        block.adapted_linear(hidden, weight, None, a, b, 2.0, keep, 0.5)
    given = {tensor.data_ptr() for tensor in (hidden, weight, a, b, keep)}
    assert {tensor.data_ptr() for tensor in kept} == given


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


def test_segment_attention_is_attention_under_a_block_mask():
    tokens = sum(LENGTHS)
    query, key, value = drawn(1, 6, tokens, 8), drawn(1, 2, tokens, 8, seed=1), drawn(1, 2, tokens, 8, seed=2)
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    allowed = (number[:, None] == number) & torch.ones(tokens, tokens, dtype=torch.bool).tril()

    def plain():
        keys, values = (tensor.repeat_interleave(3, dim=1) for tensor in (key, value))
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=allowed, scale=0.3)

    segments = attention.Segments(LENGTHS, "cpu")
    agree(lambda: attention.by_segment(query, key, value, segments, 0.3), plain, (query, key, value))


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


def test_the_kernel_of_variable_length_is_chosen_where_torch_has_it(monkeypatch):
    from torch.nn.attention import varlen

    sixteen = Runtime(device="cuda", precision=Precision(compute="bfloat16"))
    assert ops.kernels(None, sixteen).attention is attention.across_segments
    assert ops.kernels(None, Runtime(device="cuda")).attention is attention.by_segment
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal: query)
    assert ops.kernels(None, sixteen).attention is attention.by_segment


def test_token_losses_and_their_gradient_are_cross_entropys():
    logits = drawn(9, 700).detach() * 8
    labels = torch.arange(9, dtype=torch.int32) * 70
    wide = logits.double().requires_grad_()
    expected = functional.cross_entropy(wide, labels.long(), reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum() * 0.5, wide)
    torch.testing.assert_close(ops.token_losses(logits.clone(), labels).double(), expected, rtol=1e-6, atol=1e-6)
    losses, ours = ops.token_losses_and_gradient(logits.clone(), labels, 0.5)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.double(), gradient, rtol=1e-5, atol=1e-8)


def test_segments_know_their_borders():
    segments = attention.Segments(LENGTHS, "cpu")
    np.testing.assert_array_equal(segments.borders.numpy(), np.array([0, 5, 6, 15], np.int32))
    assert segments.longest == 9
