"""What the tests of torch's operators share: drawn tensors, and agreement with the plain operator."""

import torch


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
