"""Protects torch's own loss and its gradient, and which kernels are chosen."""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from msft.backend.contract import Precision, Runtime
from msft.backend.torch import attention, block, ops
from tests.backend.torch_operators import agree, drawn


def test_the_kernel_of_variable_length_is_chosen_where_torch_has_it(monkeypatch):
    from torch.nn.attention import varlen

    sixteen = Runtime(device="cuda", precision=Precision(compute="bfloat16"))
    assert ops.kernels(None, sixteen).attention is attention.across_segments
    assert ops.kernels(None, Runtime(device="cuda")).attention is attention.by_segment
    assert ops.kernels(None, Runtime(device="cpu")).attention is attention.on_cpu
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal: query)
    assert ops.kernels(None, sixteen).attention is attention.by_segment


def liger_operator(operator):
    """A stand-in for one of Liger's: its arguments (liger-kernel 0.8.5), and torch's gradient of a formula."""

    def check(*given):
        inspect.signature(operator).bind(*given)
        return operator(*given)

    return type(operator.__name__, (), {"apply": staticmethod(check)})


def LigerRMSNormFunction(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
    assert casting_mode in {"llama", "gemma", "none"} and not in_place
    return functional.rms_norm(X, W.shape, W + offset, eps)


def LigerRopeFunction(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    return block.plain_rotate(q, k, cos, sin)


def LigerSiLUMulFunction(a, b, gate_multiplier=1.0, down_multiplier=1.0):
    return functional.silu(a * gate_multiplier) * b * down_multiplier


@pytest.fixture
def liger(monkeypatch):
    """Liger's package, as far as it is called."""
    operators = {"rms_norm": LigerRMSNormFunction, "rope": LigerRopeFunction, "swiglu": LigerSiLUMulFunction}
    package = ModuleType("liger_kernel")
    package.__spec__ = inspect.getmodule(inspect).__spec__
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ModuleType("liger_kernel.ops"))
    for name, operator in operators.items():
        module = ModuleType(f"liger_kernel.ops.{name}")
        setattr(module, operator.__name__, liger_operator(operator))
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_ligers_kernels_are_chosen_on_cuda_where_they_are_installed(liger, monkeypatch):
    assert ops.kernels(None, Runtime(device="cuda")).parts.name == "Liger"
    assert ops.kernels(None, Runtime(device="cpu")).parts == block.Parts()
    assert ops.kernels(None, Runtime(device="cuda", compile=True)).parts.name == "torch.compile"
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert ops.kernels(None, Runtime(device="cuda")).parts == block.Parts()


def test_ligers_kernels_take_the_arguments_of_the_plain_ones_and_mean_the_same(liger):
    parts = block.liger_parts()
    hidden, weight = drawn(2, 5, 8), drawn(8, seed=1)
    query, key, gate = drawn(1, 2, 5, 8), drawn(1, 1, 5, 8, seed=2), drawn(2, 5, 8, seed=3)
    angles = drawn(1, 5, 4, seed=4, grad=False).repeat(1, 1, 2)
    agree(lambda: parts.rms_norm(hidden, weight, 1e-5), lambda: block.rms_norm(hidden, weight, 1e-5), (hidden, weight))
    agree(lambda: parts.swiglu(gate, hidden), lambda: block.swiglu(gate, hidden), (gate, hidden))
    for place, heads in enumerate((query, key)):
        agree(
            lambda place=place: parts.rotate(query, key, angles.cos(), angles.sin())[place],
            lambda place=place: block.rotate(query, key, angles.cos(), angles.sin())[place],
            (heads,),
        )


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
