"""Protects torch's own loss and its gradient, and which kernels are chosen."""

import torch
from torch.nn import functional

from msft.backend.contract import Precision, Runtime
from msft.backend.torch import attention, ops
from tests.backend.torch_operators import drawn


def test_the_kernel_of_variable_length_is_chosen_where_torch_has_it(monkeypatch):
    from torch.nn.attention import varlen

    sixteen = Runtime(device="cuda", precision=Precision(compute="bfloat16"))
    assert ops.kernels(None, sixteen).attention is attention.across_segments
    assert ops.kernels(None, Runtime(device="cuda")).attention is attention.by_segment
    assert ops.kernels(None, Runtime(device="cpu")).attention is attention.on_cpu
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
