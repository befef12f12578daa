"""A block whose attention and feed-forward are added to a multiple of what their norms give.

DeepNorm, arXiv 2203.00555, in ChatGLM-6B's form.
"""

import mindspore
from mindspore import Tensor

from msft.backend.mindspore import block
from msft.backend.mindspore.block import Inner, Kept, LineTensors


class DeepNormBlock(block.Block):
    """A block with norms apart (`sequence.functions`) and a `residual`; it keeps what `block.Block` does."""

    def __init__(self, functions, recompute: bool, residual: float):
        super().__init__(functions, recompute)
        self.residual = residual

    def forward(self, hidden: Tensor, line: LineTensors, tensors: list[Tensor]) -> tuple[Tensor, Kept]:
        """Return the output for hidden states [length, hidden], and what `backward` needs."""
        inner = self._inner(hidden, line, tensors)
        normed = self.functions.second_norm.forward(inner.middle, line, tensors)
        output = self.functions.contract.forward(inner.wide, line, tensors, onto=self._kept(normed))
        return output, Kept(hidden, None if self.recompute else inner)

    def backward(self, gradient: Tensor, kept: Kept, line: LineTensors, tensors: list[Tensor]):
        """Return what `Block.backward` does."""
        functions, hidden = self.functions, kept.hidden
        inner = kept.inner or self._inner(hidden, line, tensors)
        by_wide = functions.contract.backward(gradient, inner.wide, line, tensors)
        found = [functions.contract.tuned_gradients(gradient, inner.wide, line, tensors)]
        steps = functions.second_norm, functions.expand
        by_middle = self._read_back(*steps, by_wide, inner.middle, gradient, line, tensors, found)
        found.append(functions.merge.tuned_gradients(by_middle, inner.mixed, line, tensors))
        by_mixed = functions.merge.backward(by_middle, inner.mixed, line, tensors)
        by_heads = line.attention.backward(by_mixed, inner.heads, inner.mixed, inner.weights, line.plan)
        by_turned = functions.turn_back(by_heads, line.cosine, line.sine)
        steps = functions.first_norm, functions.project
        by_hidden = self._read_back(*steps, by_turned, hidden, by_middle, line, tensors, found)
        return by_hidden, [part for part in found if part]

    def _inner(self, hidden, line, tensors):
        functions = self.functions
        normed = functions.first_norm.forward(hidden, line, tensors)
        heads = functions.turn(functions.project.forward(normed, line, tensors), line.cosine, line.sine)
        mixed, weights = line.attention.forward(heads, line.plan)
        middle = functions.merge.forward(mixed, line, tensors, onto=self._kept(normed))
        normed = functions.second_norm.forward(middle, line, tensors)
        return Inner(heads, mixed, weights, middle, functions.expand.forward(normed, line, tensors))

    def _kept(self, normed):
        """What of a norm stays beside the modules that read it."""
        return _times(normed, self.residual)

    def _read_back(self, norm, modules, gradient, hidden, beside, line, tensors, found):
        """The gradient of what a norm reads, whose result modules read (`gradient`) and is kept (`beside`)."""
        normed = norm.forward(hidden, line, tensors)
        by_normed = modules.backward(gradient, normed, line, tensors, onto=self._kept(beside))
        found.append(modules.tuned_gradients(gradient, normed, line, tensors))
        found.append(norm.tuned_gradients(by_normed, hidden, line, tensors))
        return norm.backward(by_normed, hidden, line, tensors)


@mindspore.jit
def _times(values, factor):
    return values * factor
