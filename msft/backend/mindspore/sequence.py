"""A block of whose hidden states each rank of a model has its part of the tokens (Megatron, arXiv 2205.05198).

What Megatron gathers and scatters is summed here, because MindSpore has nothing else for a group of ranks on CPU: a
part with zeros around it to gather, all tokens to scatter. A block sends twice of what it sends where tokens are whole,
and once more for what tuned modules read.
"""

from functools import cache
from types import SimpleNamespace

from mindspore import Tensor

from msft.backend.mindspore import block, distributed
from msft.backend.mindspore.block import Inner, Kept, LineTensors, Step
from msft.backend.mindspore.parts import Numbers


@cache
def functions(numbers: Numbers, layout):
    """Return `block.functions` with norms apart from the modules that read them, for they are gathered in between."""
    found, parts = vars(block.functions(numbers, layout)), numbers.form.block
    return SimpleNamespace(
        **found
        | {
            "first_norm": Step("first_norm", (parts.attention_norm,), numbers, layout),
            "project": Step("project", parts.project, numbers, layout),
            "second_norm": Step("second_norm", (parts.feed_norm,), numbers, layout),
            "expand": Step("expand", parts.expand, numbers, layout),
        }
    )


class SequenceBlock(block.Block):
    """A block whose input and output are this rank's tokens [own, hidden]; between them it computes all tokens.

    It keeps its input and its middle alone of what is not cut by features.
    """

    def forward(self, hidden: Tensor, line: LineTensors, tensors: list[Tensor]) -> tuple[Tensor, Kept]:
        """Return the output for hidden states, and what `backward` needs."""
        inner = self._inner(hidden, line, tensors)
        output = inner.middle + distributed.scatter(self.functions.contract.forward(inner.wide, line, tensors))
        return output, Kept(hidden, None if self.recompute else inner)

    def backward(self, gradient: Tensor, kept: Kept, line: LineTensors, tensors: list[Tensor]):
        """Return what `Block.backward` does."""
        functions, hidden = self.functions, kept.hidden
        inner = kept.inner or self._inner(hidden, line, tensors)
        whole = distributed.gather(gradient)
        found = [functions.contract.tuned_gradients(whole, inner.wide, line, tensors)]
        by_wide = functions.contract.backward(whole, inner.wide, line, tensors)
        steps = functions.second_norm, functions.expand
        by_middle = self._read_back(*steps, by_wide, inner.middle, gradient, line, tensors, found)
        whole = distributed.gather(by_middle)
        found.append(functions.merge.tuned_gradients(whole, inner.mixed, line, tensors))
        by_mixed = functions.merge.backward(whole, inner.mixed, line, tensors)
        by_heads = line.attention.backward(by_mixed, inner.heads, inner.mixed, inner.weights, line.plan)
        by_turned = functions.turn_back(by_heads, line.cosine, line.sine)
        steps = functions.first_norm, functions.project
        by_hidden = self._read_back(*steps, by_turned, hidden, by_middle, line, tensors, found)
        return by_hidden, [part for part in found if part]

    def _inner(self, hidden, line, tensors):
        functions = self.functions
        normed = distributed.gather(functions.first_norm.forward(hidden, line, tensors))
        heads = functions.turn(functions.project.forward(normed, line, tensors), line.cosine, line.sine)
        mixed, weights = line.attention.forward(heads, line.plan)
        middle = hidden + distributed.scatter(functions.merge.forward(mixed, line, tensors))
        normed = distributed.gather(functions.second_norm.forward(middle, line, tensors))
        return Inner(heads, mixed, weights, middle, functions.expand.forward(normed, line, tensors))

    def _read_back(self, norm, modules, gradient, hidden, onto, line, tensors, found):
        """The gradient of hidden states that a norm and then modules read, added to `onto`; tuned ones go to `found`.

        The modules' own gradient does not depend on what they read, so that it is gathered for tuned ones alone.
        """
        normed = norm.forward(hidden, line, tensors)
        normed = distributed.gather(normed) if modules.tuned else distributed.placed(normed)
        by_normed = distributed.scatter(modules.backward(gradient, normed, line, tensors))
        found.append(modules.tuned_gradients(gradient, normed, line, tensors))
        found.append(norm.tuned_gradients(by_normed, hidden, line, tensors))
        return norm.backward(by_normed, hidden, line, tensors, onto=onto)
