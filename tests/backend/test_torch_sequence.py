"""Protects what modules keep of gathered hidden states: a rank's part, from which gradients are those of the whole."""

import weakref

import pytest
import torch

from msft.backend.mesh import Mesh
from msft.backend.torch import block, distributed, sequence

MESH = Mesh(tensor=2, sequence=True)


@pytest.fixture
def gathered(monkeypatch):
    """Two ranks in one: the other one's tokens are this one's, negative. Gathered states, as weak references."""
    found = []

    def gather(part):
        whole = torch.cat((part, -part), 1)
        found.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(distributed, "scatter", lambda values: values[:, :3] - values[:, 3:])
    return found


@pytest.mark.parametrize(("recompute", "gathers"), [(False, 2), (True, 1)])
def test_modules_keep_a_part_and_gather_it_once_more(recompute, gathers, gathered):
    torch.manual_seed(0)
    part = torch.randn(1, 3, 4, requires_grad=True)
    weights = [torch.randn(5, 4, requires_grad=True) for _ in range(3)]
    modules = [lambda hidden, weight=weight: block.linear(hidden, weight, None, torch.float32) for weight in weights]
    outputs = sequence.cut_parts(block.Parts(), MESH, recompute).read(part, *modules)
    assert (gathered[0]() is None) == (not recompute), "the whole is kept unless the block is computed anew"
    sum(output.square().sum() for output in outputs).backward()
    assert len(gathered) == gathers and gathered[-1]() is None
    plain = torch.cat((part, -part), 1).detach().requires_grad_()
    own = [weight.detach().requires_grad_() for weight in weights]
    sum((plain @ weight.t()).square().sum() for weight in own).backward()
    torch.testing.assert_close(part.grad, plain.grad[:, :3] - plain.grad[:, 3:])
    for weight, expected in zip(weights, own, strict=True):
        torch.testing.assert_close(weight.grad, expected.grad)


def test_what_modules_keep_beside_is_left_alone(gathered):
    part, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    (output,) = sequence.cut_parts(block.Parts(), MESH, False).read(part, lambda hidden: hidden.sin() * weight)
    output.sum().backward()
    torch.testing.assert_close(weight.grad, torch.cat((part, -part), 1).sin().sum((0, 1)))


def test_a_model_that_is_not_cut_has_the_parts_that_were_given():
    parts = block.Parts()
    assert sequence.cut_parts(parts, Mesh(data=4, sequence=True), False) is parts
    assert sequence.cut_parts(parts, Mesh(tensor=2), False).keep is parts.keep
