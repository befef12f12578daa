"""A decoder's layer that reads an encoder: self-attention, attention to the encoder's states, feed-forward."""

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

from mindspore import Tensor

from msft.backend.mindspore import block
from msft.backend.mindspore.parts import Form, Numbers
from msft.backend.mindspore.relative_attention import CrossAttention
from msft.models import spec
from msft.models.encoder import Cross


class Lines(NamedTuple):
    """What all layers take: of the decoder's line, of the encoder's, and how the first sees the `states` of the second.

    `states` are the encoder's hidden states [length, hidden] behind its norm.
    """

    target: block.LineTensors
    source: block.LineTensors
    attention: CrossAttention
    plan: list
    states: Tensor


class Inner(NamedTuple):
    """What a layer makes of its input before its output; `weights` and `read_weights` are attention's."""

    heads: Tensor
    mixed: Tensor
    weights: list
    middle: Tensor
    queries: Tensor
    told: Tensor
    read: Tensor
    read_weights: list
    after: Tensor
    wide: Tensor


class Kept(NamedTuple):
    """What the way back needs: a layer's input, and what it makes of it (None: make it again)."""

    hidden: Tensor
    inner: Inner | None


class ReadingBlock:
    """One layer of a layout, (name, tuned or not) for each of its tensors, which the methods take in this order."""

    def __init__(self, functions, recompute: bool):
        self.functions, self.recompute = functions, recompute

    def forward(self, hidden: Tensor, lines: Lines, tensors: list[Tensor]) -> tuple[Tensor, Kept]:
        """Return the output for hidden states [length, hidden], and what `backward` needs."""
        inner = self._inner(hidden, lines, tensors)
        output = self.functions.contract.forward(inner.wide, lines.target, tensors, onto=inner.after)
        return output, Kept(hidden, None if self.recompute else inner)

    def backward(self, gradient: Tensor, by_states: Tensor, kept: Kept, lines: Lines, tensors: list[Tensor]):
        """Return the gradient of the input, `by_states` with that of the encoder's states, and the tuned tensors'.

        These are (places, flat tensor), as `block.Block.backward` gives them.
        """
        functions, hidden, line, source = self.functions, kept.hidden, lines.target, lines.source
        inner = kept.inner or self._inner(hidden, lines, tensors)
        by_wide = functions.contract.backward(gradient, inner.wide, line, tensors)
        by_after = functions.expand.backward(by_wide, inner.after, line, tensors, onto=gradient)
        by_read = functions.take.backward(by_after, inner.read, line, tensors)
        reading = inner.queries, inner.told, inner.read, inner.read_weights
        by_queries, by_told = lines.attention.backward(by_read, *reading, lines.plan)
        by_states = functions.tell.backward(by_told, lines.states, source, tensors, onto=by_states)
        by_middle = functions.ask.backward(by_queries, inner.middle, line, tensors, onto=by_after)
        by_mixed = functions.merge.backward(by_middle, inner.mixed, line, tensors)
        by_heads = line.attention.backward(by_mixed, inner.heads, inner.mixed, inner.weights, line.plan)
        by_hidden = functions.project.backward(by_heads, hidden, line, tensors, onto=by_middle)
        found = [
            functions.contract.tuned_gradients(gradient, inner.wide, line, tensors),
            functions.expand.tuned_gradients(by_wide, inner.after, line, tensors),
            functions.take.tuned_gradients(by_after, inner.read, line, tensors),
            functions.tell.tuned_gradients(by_told, lines.states, source, tensors),
            functions.ask.tuned_gradients(by_queries, inner.middle, line, tensors),
            functions.merge.tuned_gradients(by_middle, inner.mixed, line, tensors),
            functions.project.tuned_gradients(by_heads, hidden, line, tensors),
        ]
        return by_hidden, by_states, [part for part in found if part]

    def _inner(self, hidden, lines, tensors):
        functions, line = self.functions, lines.target
        heads = functions.project.forward(hidden, line, tensors)
        mixed, weights = line.attention.forward(heads, line.plan)
        middle = functions.merge.forward(mixed, line, tensors, onto=hidden)
        queries = functions.ask.forward(middle, line, tensors)
        told = functions.tell.forward(lines.states, lines.source, tensors)
        read, read_weights = lines.attention.forward(queries, told, lines.plan)
        after = functions.take.forward(read, line, tensors, onto=middle)
        wide = functions.expand.forward(after, line, tensors)
        return Inner(heads, mixed, weights, middle, queries, told, read, read_weights, after, wide)


@cache
def functions(numbers: Numbers, layout, cross: Cross | None):
    """Return the compiled functions of all layers of a layout, of an encoder where there is no `cross`."""
    own = numbers.form.block
    found = {
        "project": block.Step("project", (own.attention_norm, *own.project), numbers, layout),
        "merge": block.Step("merge", (own.merge,), numbers, layout),
        "expand": block.Step("expand", (own.feed_norm, *own.expand), numbers, layout),
        "contract": block.Step("contract", (own.contract,), numbers, layout),
    }
    if cross:
        asking, telling = of_cross(numbers, cross)
        found |= {
            "ask": block.Step("project", (cross.norm, cross.query), asking, layout),
            "tell": block.Step("project", cross.states, telling, layout),
            "take": block.Step("merge", (cross.merge,), asking, layout),
        }
    return SimpleNamespace(**found, turn=_as_it_is, turn_back=_as_it_is, is_parallel=False)


def of_cross(numbers: Numbers, cross: Cross) -> tuple[Numbers, Numbers]:
    """Return what parts are written for that read the decoder's states and merge, and that read the encoder's."""
    asking = spec.Block(attention_norm=cross.norm, project=(cross.query,), merge=cross.merge)
    telling = spec.Block(attention_norm="", project=cross.states)
    return tuple(numbers._replace(form=Form(each, numbers.form.scores)) for each in (asking, telling))


def _as_it_is(heads, cosine, sine):
    return heads
