"""A decoder's block as compiled functions that pass one tensor from each to the next, and those of its gradients.

MindSpore computes a compiled function of tensors at once, but waits by spinning, which costs a core, where functions
give several tensors, stand in its own differentiation, or have plain operators between them.
"""

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import mindspore
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend.mindspore import experts, ops
from msft.backend.mindspore.attention import TiledAttention
from msft.backend.mindspore.fused_attention import FusedAttention
from msft.backend.mindspore.parts import Numbers, Parts


class LineTensors(NamedTuple):
    """What all blocks take of a line: rotary tables [length, features], dropout's keys [length], attention, its plan.

    The plan tells attention who sees whom; `routing` is for layers with experts.
    """

    cosine: Tensor
    sine: Tensor
    tokens: Tensor
    attention: TiledAttention | FusedAttention
    plan: list | tuple
    routing: experts.Routing | None = None


class Inner(NamedTuple):
    """What a block makes of its input before its output; `weights` are attention's."""

    heads: Tensor
    mixed: Tensor
    weights: list
    middle: Tensor
    wide: Tensor


class Kept(NamedTuple):
    """What a block's backward pass needs: its input, and what it makes of it (None: make it again)."""

    hidden: Tensor
    inner: Inner | None


class Block:
    """One block of a layout, (name, tuned or not) for each of its tensors, which the methods take in this order.

    Where the model is cut over ranks, `reduce` sums what each gives of an output or a gradient; the gradients of norms
    are then shares of a rank as well. Models whose attention and feed-forward are parallel, or whose outputs are
    normed, are not cut.
    """

    def __init__(self, functions, recompute: bool, reduce=None):
        self.functions, self.recompute, self.reduce = functions, recompute, reduce

    def forward(self, hidden: Tensor, line: LineTensors, tensors: list[Tensor]) -> tuple[Tensor, Kept]:
        """Return the output for hidden states [length, hidden], and what `backward` needs."""
        inner = self._inner(hidden, line, tensors)
        output = self._onto(inner.middle, self.functions.contract.forward, inner.wide, line, tensors)
        return output, Kept(hidden, None if self.recompute else inner)

    def backward(self, gradient: Tensor, kept: Kept, line: LineTensors, tensors: list[Tensor]):
        """Return the gradient of the input for that of the output, and the tuned tensors' as (places, flat tensor).

        Those of several tensors stand one after another in a flat tensor; a tensor may be among several.
        """
        functions, hidden = self.functions, kept.hidden
        inner = kept.inner or self._inner(hidden, line, tensors)
        read = hidden if functions.is_parallel else inner.middle
        by_wide = functions.contract.backward(gradient, inner.wide, line, tensors)
        by_read = self._onto(gradient, functions.expand.backward, by_wide, read, line, tensors)
        by_middle = gradient if functions.is_parallel else by_read
        by_mixed = functions.merge.backward(by_middle, inner.mixed, line, tensors)
        by_heads = line.attention.backward(by_mixed, inner.heads, inner.mixed, inner.weights, line.plan)
        by_turned = functions.turn_back(by_heads, line.cosine, line.sine)
        by_hidden = self._onto(by_read, functions.project.backward, by_turned, hidden, line, tensors)
        found = [
            functions.contract.tuned_gradients(gradient, inner.wide, line, tensors),
            functions.expand.tuned_gradients(by_wide, read, line, tensors),
            functions.merge.tuned_gradients(by_middle, inner.mixed, line, tensors),
            functions.project.tuned_gradients(by_turned, hidden, line, tensors),
        ]
        return by_hidden, [part for part in found if part]

    def _inner(self, hidden, line, tensors):
        functions = self.functions
        heads = functions.turn(functions.project.forward(hidden, line, tensors), line.cosine, line.sine)
        mixed, weights = line.attention.forward(heads, line.plan)
        middle = self._onto(hidden, functions.merge.forward, mixed, line, tensors)
        wide = functions.expand.forward(hidden if functions.is_parallel else middle, line, tensors)
        return Inner(heads, mixed, weights, middle, wide)

    def _onto(self, values, function, *arguments):
        """`values` and what a function gives, summed over the ranks of a model that is cut."""
        return function(*arguments, onto=values) if self.reduce is None else values + self.reduce(function(*arguments))


@cache
def functions(numbers: Numbers, layout):
    """Return the compiled functions of all blocks of a layout."""
    block = numbers.form.block
    expand, contract = _feed_forward(numbers, layout)
    return SimpleNamespace(
        project=Step("project", (block.attention_norm, *block.project, *block.head_norms), numbers, layout),
        merge=Step("merge", (block.merge, block.merged_norm), numbers, layout),
        expand=expand,
        contract=contract,
        turn=mindspore.jit(numbers.kernels.rotary),
        turn_back=mindspore.jit(_turned_back(numbers.kernels.rotary)),
        is_parallel=block.is_parallel,
    )


def _feed_forward(numbers: Numbers, layout):
    """The two parts of a feed-forward, or those of the experts in its place."""
    block, routed = numbers.form.block, numbers.form.experts
    if not has_experts(numbers, layout):
        expand = Step("expand", (block.feed_norm, *block.expand), numbers, layout)
        return expand, Step("contract", (block.contract, block.contracted_norm), numbers, layout)
    norm = Step("second_norm", (block.feed_norm,), numbers, layout)
    shared = Step("shared", routed.modules, numbers, layout) if routed.shared_width else None
    return experts.Expand(numbers, layout, norm), experts.Contract(numbers, layout, shared)


def has_experts(numbers: Numbers, layout) -> bool:
    """Whether blocks of a layout have experts in place of their feed-forward."""
    routed = numbers.form.experts
    return routed is not None and routed.router in (name for name, _ in layout)


def _turned_back(rotary):
    def turn_back(gradient, cosine, sine):
        return rotary(gradient, cosine, -sine)

    return turn_back


class Step:
    """One of the parts, a function (values, dropout's keys, *tensors), and its gradients, each compiled when used.

    Of the layout's tensors it takes those of its `modules`.
    """

    def __init__(self, part: str, modules: tuple[str, ...], numbers: Numbers, layout, parts: type[Parts] = Parts):
        starts = tuple(f"{module}." for module in modules if module)
        self.places = tuple(
            place for place, (name, _) in enumerate(layout) if name.startswith(starts) or name in modules
        )
        own = tuple(layout[place] for place in self.places)
        tuned = tuple(place for place, (_, is_tuned) in enumerate(own) if is_tuned)
        self.tuned = tuple(self.places[place] for place in tuned)
        function = getattr(parts(numbers, own), part)()
        self.apply, self.apply_onto = (mindspore.jit(made) for made in _forward(function))
        compute = ops.dtype(numbers.compute)
        self.differentiate, self.differentiate_onto = (mindspore.jit(made) for made in _backward(function, compute))
        self.differentiate_tuned = mindspore.jit(_backward_tuned(function, tuned, compute))

    def forward(self, values: Tensor, line: LineTensors, tensors, onto: Tensor | None = None) -> Tensor:
        """Return the function's result, added to `onto`."""
        arguments = values, line.tokens, *self._own(tensors)
        return self.apply(*arguments) if onto is None else self.apply_onto(onto, *arguments)

    def backward(self, gradient: Tensor, values: Tensor, line: LineTensors, tensors, onto: Tensor | None = None):
        """Return the gradient of `values` for that of the result, added to `onto`."""
        arguments = gradient, values, line.tokens, *self._own(tensors)
        return self.differentiate(*arguments) if onto is None else self.differentiate_onto(onto, *arguments)

    def tuned_gradients(self, gradient: Tensor, values: Tensor, line: LineTensors, tensors) -> tuple:
        """Return the tuned tensors' places, and their gradients one after another in a flat tensor; or nothing."""
        if not self.tuned:
            return ()
        return self.tuned, self.differentiate_tuned(gradient, values, line.tokens, *self._own(tensors))

    def _own(self, tensors):
        return [tensors[place] for place in self.places]


def _forward(function):
    def forward(values, tokens, *tensors):
        return function(values, tokens, *tensors)

    def forward_onto(onto, values, tokens, *tensors):
        return onto + function(values, tokens, *tensors)

    return forward, forward_onto


def _backward(function, compute):
    """Gradients of a part, whose result is in the compute dtype whatever the hidden states are in."""
    gradient_of = ops.gradient(function)

    def backward(gradient, values, tokens, *tensors):
        return gradient_of(values, tokens, *tensors, gradient.astype(compute))[0]

    def backward_onto(onto, gradient, values, tokens, *tensors):
        return onto + gradient_of(values, tokens, *tensors, gradient.astype(compute))[0]

    return backward, backward_onto


def _backward_tuned(function, tuned, compute):
    gradient_of, places = ops.gradient(function), tuple(2 + place for place in tuned)

    def backward_tuned(gradient, values, tokens, *tensors):
        found = gradient_of(values, tokens, *tensors, gradient.astype(compute))
        results = ()
        for place in places:
            results = results + (found[place].reshape(-1),)
        return operators.concat(results)

    return backward_tuned
