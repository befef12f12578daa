"""A block with a state space in place of attention and feed-forward, as `block.Block` is one with them."""

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import mindspore
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend.mindspore import ops
from msft.backend.mindspore.block import Kept, LineTensors, Step
from msft.backend.mindspore.parts import ABSENT, Numbers, Parts
from msft.backend.mindspore.state_space import STRIP
from msft.models import spec, state_space
from msft.models.state_space import StateSpace

PLACES = "line.places"


class Form(NamedTuple):
    """How a family's blocks are made: of which modules, of which sizes, and what their norms add."""

    block: spec.Block
    space: StateSpace
    eps: float


class Inner(NamedTuple):
    """What a block makes of its input before its output; `results` are the scan's strips."""

    wide: Tensor
    packed: Tensor
    results: list[Tensor]
    scanned: Tensor


class StateBlock:
    """One block of a layout, (name, tuned or not) for each of its tensors, which the methods take in this order."""

    def __init__(self, functions, recompute: bool):
        self.functions, self.recompute = functions, recompute

    def forward(
        self, hidden: Tensor, line: LineTensors, tensors: list[Tensor], keeps: bool = False
    ) -> tuple[Tensor, Kept]:
        """Return the output for hidden states [length, hidden], and what `backward` needs; `keeps` even what it can
        compute again.
        """
        if self.functions.is_wide and hidden.dtype != mindspore.float32:
            hidden = hidden.astype(mindspore.float32)
        inner = self._inner(hidden, line, tensors)
        output = self.functions.leave.forward(inner.scanned, line, tensors, onto=hidden)
        return output, Kept(hidden, inner if keeps or not self.recompute else None)

    def backward(self, gradient: Tensor, kept: Kept, line: LineTensors, tensors: list[Tensor]):
        """Return the gradient of the input for that of the output, and the tuned tensors' as (places, flat tensor).

        Those of several tensors stand one after another in a flat tensor; a tensor may be among several.
        """
        functions, hidden = self.functions, kept.hidden
        inner = kept.inner or self._inner(hidden, line, tensors)
        by_scanned = functions.leave.backward(gradient, inner.scanned, line, tensors)
        scanned, tuned = functions.own(tensors), functions.tuned
        arguments = by_scanned, inner.packed, inner.results, scanned, line.plan
        by_packed, by_tensors = line.attention.backward(*arguments, tuned)
        with_places = [*tensors, line.plan.places]
        by_wide = functions.select.backward(by_packed, inner.wide, line, with_places)
        by_wide = functions.with_gate(by_wide, by_scanned)
        by_hidden = functions.project.backward(by_wide, hidden, line, tensors, onto=gradient)
        found = [
            functions.leave.tuned_gradients(gradient, inner.scanned, line, tensors),
            functions.select.tuned_gradients(by_packed, inner.wide, line, with_places),
            functions.project.tuned_gradients(by_wide, hidden, line, tensors),
            (tuple(functions.scanned[place] for place in tuned), by_tensors) if tuned else (),
        ]
        return by_hidden, [part for part in found if part]

    def _inner(self, hidden, line, tensors):
        functions = self.functions
        wide = functions.project.forward(hidden, line, tensors)
        packed = functions.select.forward(wide, line, [*tensors, line.plan.places])
        results = line.attention.forward(packed, functions.own(tensors), line.plan)
        return Inner(wide, packed, results, functions.gated(wide, *results))


@cache
def functions(numbers: Numbers, layout):
    """Return the compiled functions of all blocks of a layout."""
    space, block = numbers.form.space, numbers.form.block
    names = [name for name, _ in layout]
    scanned = tuple(names.index(name) for name in space.scanned)
    between = (state_space.CONVOLUTION, state_space.SELECT, f"{state_space.STEP}.weight", PLACES)
    with_places = (*layout, (PLACES, False))
    return SimpleNamespace(
        project=Step("project", (block.attention_norm, state_space.INPUT), numbers, layout, StateParts),
        select=Step("select", between, numbers, with_places, StateParts),
        leave=Step("leave", (state_space.GATED_NORM, state_space.OUTPUT), numbers, layout, StateParts),
        gated=mindspore.jit(_gated(space)),
        with_gate=mindspore.jit(_with_gate(space)),
        own=_chosen(scanned),
        scanned=scanned,
        tuned=tuple(place for place, at in enumerate(scanned) if layout[at][1]),
        is_wide=space.residual_in_fp32,
    )


def _chosen(places):
    def chosen(tensors):
        return [tensors[place] for place in places]

    return chosen


def gate_of(space: StateSpace):
    """Return (what the first module gives [tokens, projected]) -> the gate, the convolution's part, time steps.

    Mamba has no time steps there: the third is the gate again.
    """
    inner, sizes = space.intermediate_size, (space.intermediate_size, space.convolved, space.num_heads)

    def heads(wide):
        return operators.split(wide, sizes, 1)

    def channels(wide):
        convolved, gate = operators.split(wide, inner, 1)
        return gate, convolved, gate

    return heads if space.num_heads else channels


def _gated(space):
    """What the first module gives, and the strips' results -> outputs and gates side by side, float32."""
    parts = gate_of(space)

    def gated(wide, *results):
        outputs = ()
        for result in results:
            outputs = outputs + (result[:STRIP],)
        gate, _, _ = parts(wide)
        return operators.concat((operators.concat(outputs), gate.astype(mindspore.float32)), 1)

    return gated


def _with_gate(space):
    """The gradient of what the first module gives, with that of the gates, which stand behind the outputs."""
    inner = space.intermediate_size

    def heads(by_wide, by_scanned):
        return operators.concat((by_scanned[:, inner:].astype(by_wide.dtype), by_wide[:, inner:]), 1)

    def channels(by_wide, by_scanned):
        return operators.concat((by_wide[:, :inner], by_scanned[:, inner:].astype(by_wide.dtype)), 1)

    return heads if space.num_heads else channels


class StateParts(Parts):
    """Writes the parts of such a block, as `Parts` does of others."""

    def project(self):
        """Hidden states -> what the first module gives for their norm [tokens, projected]."""
        return self.normed_linear(self.block.attention_norm, [state_space.INPUT])

    def select(self):
        """What the first module gives -> what the scan takes [tokens, packed]."""
        space, convolved, packed = self.numbers.form.space, self.convolved(), self.packed()
        parts, places = gate_of(space), self.position[PLACES]

        def select(wide, tokens, *tensors):
            _, columns, steps = parts(wide)
            found = convolved(columns, tensors[places], *tensors)
            return packed(found, steps, tokens, *tensors)

        return select

    def convolved(self):
        """(columns [tokens, channels], places [tokens], *tensors) -> the causal convolution's result, activated."""
        kernel, mixed = self.numbers.form.space.conv_kernel, self.mixed_window()

        def convolved(columns, places, *tensors):
            earlier = ()
            for back in range(kernel - 1, 0, -1):
                shifted = operators.concat((operators.zeros_like(columns[:back]), columns[:-back]))
                inside = (places >= back).astype(columns.dtype).expand_dims(-1)
                earlier = earlier + (shifted * inside,)
            return mixed(earlier + (columns,), tensors)

        return convolved

    def mixed_window(self):
        """(what stands under each of the convolution's taps [rows, channels], tensors) -> its result, activated."""
        weight, bias = (self.position.get(f"{state_space.CONVOLUTION}.{leaf}", ABSENT) for leaf in ("weight", "bias"))
        kernel, activated = self.numbers.form.space.conv_kernel, self.numbers.kernels.activated

        def mixed_window(window, tensors):
            taps = tensors[weight].astype(window[0].dtype).reshape(-1, kernel).transpose(1, 0)
            total = window[0] * taps[0]
            for tap in range(1, kernel):
                total = total + window[tap] * taps[tap]
            if bias != ABSENT:
                total = total + tensors[bias].astype(total.dtype)
            return activated(total)

        return mixed_window

    def packed(self):
        """(convolved [tokens, channels], steps, tokens, *tensors) -> what the scan takes [tokens, packed]."""
        space = self.numbers.form.space
        if space.num_heads:
            return _side_by_side
        chosen, weight = self.linear([state_space.SELECT]), self.position[f"{state_space.STEP}.weight"]
        sizes, compute = (space.time_step_rank, 2 * space.state_size), self.compute

        def packed(convolved, steps, tokens, *tensors):
            low, write_and_read = operators.split(chosen(convolved, tokens, *tensors), sizes, 1)
            steps = ops.linear(low, tensors[weight])
            return operators.concat((convolved.astype(compute), steps, write_and_read), 1)

        return packed

    def leave(self):
        """Outputs and gates side by side [tokens, 2 x channels], float32 -> the last module's result."""
        linear, inner = self.linear([state_space.OUTPUT]), self.numbers.form.space.intermediate_size
        normed = self.gated_norm()

        def leave(scanned, tokens, *tensors):
            outputs, gate = operators.split(scanned, inner, 1)
            return linear(normed(outputs * (gate * operators.sigmoid(gate)), *tensors), tokens, *tensors)

        return leave

    def gated_norm(self):
        """(values [tokens, channels], *tensors) -> their RMSNorm by groups of heads, where there are heads."""
        space, eps = self.numbers.form.space, self.numbers.form.eps
        weight = self.position.get(f"{state_space.GATED_NORM}.weight", ABSENT)

        def as_it_is(values, *tensors):
            return values

        def normed(values, *tensors):
            groups = values.reshape(values.shape[0] * space.n_groups, -1)
            scale = operators.rsqrt(operators.square(groups).mean(-1, True) + eps)
            return (groups * scale).reshape(values.shape) * tensors[weight].astype(values.dtype)

        return normed if space.num_heads else as_it_is


def _side_by_side(convolved, steps, tokens, *tensors):
    return operators.concat((convolved, steps), 1)
