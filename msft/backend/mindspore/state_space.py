"""Selective scans over a line of tokens, a strip of them at a time, and their exact gradients; all in float32.

A strip takes the state that the one before it leaves. Of what happens within a strip nothing is kept: on its way back
it is computed again, so that memory follows the strip. Where an example begins, its state is 0.
"""

from functools import cache
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import line
from msft.backend.mindspore import ops
from msft.backend.segments import places
from msft.models.state_space import StateSpace

STRIP = line.TILE
# Mamba's strips are chunks of so many tokens, which are computed at once, token by token.
CHUNK = 16
FORGET = 1e30

_PRODUCT = operators.BatchMatMul()
_PRODUCT_A = operators.BatchMatMul(transpose_a=True)
_PRODUCT_B = operators.BatchMatMul(transpose_b=True)


def described(space: StateSpace) -> str:
    """Say in words how layers without attention are computed."""
    kind = "products of matrices" if space.num_heads else f"chunks of {CHUNK} at once"
    return f"none: states, scanned in float32 by plain operators, strips of {STRIP} tokens, {kind}"


class Plan(NamedTuple):
    """Each token's place in its example, int32 [length]; of each strip its rows in the line and their places."""

    places: Tensor
    rows: list[Tensor]
    parts: list[Tensor]


class Scan:
    """The scan of one kind of layer: what it takes of a token, and the state, are as `StateSpace` says.

    A state is [state_size, channels]. The result of a strip is one tensor, its outputs [STRIP, channels] and below them
    the state behind it, and so is its gradient, flat: those of what it takes, of the state before it, of tensors.
    """

    def __init__(self, space: StateSpace):
        self.space = space
        self.shape = space.state_size, space.intermediate_size

    def plan(self, found: line.Line) -> Plan:
        """Return what every layer's scan takes of a line."""
        return self.plan_of(places(found.pieces, len(found.input_ids)))

    def plan_of(self, where: np.ndarray) -> Plan:
        """Return it for the tokens' places in their examples, int32 [length], a multiple of `STRIP`."""
        starts = range(0, len(where), STRIP)
        rows = [Tensor(np.arange(start, start + STRIP, dtype=np.int32)) for start in starts]
        return Plan(Tensor(where), rows, [Tensor(where[start : start + STRIP]) for start in starts])

    def forward(self, packed: Tensor, tensors: list[Tensor], plan: Plan) -> list[Tensor]:
        """Return the strips' results for what they take [length, packed] and the layer's own tensors."""
        functions = _functions(self.space, ())
        before, results = _zeros(STRIP + self.shape[0], self.shape[1]), []
        for rows, part in zip(plan.rows, plan.parts, strict=True):
            before = functions.forward(functions.take(packed, rows), part, before, *tensors)
            results.append(before)
        return results

    def backward(self, gradient: Tensor, packed: Tensor, results: list[Tensor], tensors, plan: Plan, tuned):
        """Return the gradients of what the strips take [length, packed], and of the `tuned` tensors, flat (or None).

        `gradient` [length, at least channels] begins with that of the outputs.
        """
        functions = _functions(self.space, tuned)
        after = _zeros(STRIP * self.space.packed + self._behind(tensors, tuned))
        befores, flats = [_zeros(*results[0].shape), *results[:-1]], []
        for rows, part, before in reversed([*zip(plan.rows, plan.parts, befores, strict=True)]):
            taken, outputs = functions.take(packed, rows), functions.take(gradient, rows)
            after = functions.backward(outputs, after, taken, part, before, *tensors)
            flats.append(after)
        by_packed = functions.join(*reversed(flats))
        return by_packed, functions.tensors(after) if tuned else None

    def _behind(self, tensors, tuned) -> int:
        """How many numbers stand in a flat gradient behind those of what a strip takes."""
        return self.shape[0] * self.shape[1] + sum(tensors[place].size for place in tuned)


class _Functions(NamedTuple):
    take: object
    forward: object
    backward: object
    join: object
    tensors: object


@cache
def _functions(space: StateSpace, tuned: tuple[int, ...]) -> _Functions:
    """The compiled functions of a scan's strips; `tuned` are the places of the tensors that have gradients."""
    strip, width, states = strip_of(space), space.packed, (space.state_size, space.intermediate_size)
    gradient_of, head, state = ops.gradient(strip), STRIP * width, states[0] * states[1]
    wanted, channels = tuple(3 + place for place in tuned), states[1]

    def take(values, rows):
        return operators.gather(values, rows, 0)

    def forward(packed, part, before, *tensors):
        return strip(packed, part, before[-states[0] :], *tensors)

    def backward(outputs, after, packed, part, before, *tensors):
        by_state = after[head : head + state].reshape(states)
        by_result = operators.concat((outputs[:, :channels].astype(mindspore.float32), by_state))
        found = gradient_of(packed, part, before[-states[0] :], *tensors, by_result)
        results = (found[0].astype(mindspore.float32).reshape(-1), found[2].reshape(-1))
        behind = head + state
        for place in wanted:
            size = found[place].size
            own = found[place].astype(mindspore.float32).reshape(-1)
            results = results + (own + after[behind : behind + size],)
            behind = behind + size
        return operators.concat(results)

    def join(*flats):
        rows = ()
        for flat in flats:
            rows = rows + (flat[:head].reshape(STRIP, width),)
        return operators.concat(rows)

    def tensors(after):
        return after[head + state :]

    return _Functions(*map(mindspore.jit, (take, forward, backward, join, tensors)))


def strip_of(space: StateSpace):
    """Return (packed [STRIP, n], places [STRIP], state, decays, biases of steps, what passes) -> outputs over state."""
    return _heads_strip(space) if space.num_heads else _channels_strip(space)


def _channels_strip(space: StateSpace):
    """Mamba: chunks of the strip at once, token by token, first from nothing to find what each leaves to the next."""
    states, channels, limit = space.state_size, space.intermediate_size, space.time_step_limit
    chunks = STRIP // CHUNK
    sizes = channels, channels, states, states

    def by_token(values):
        return values.reshape(chunks, CHUNK, -1).transpose(1, 0, 2)

    def strip(packed, part, state, decays, biases, passed):
        wide = packed.astype(mindspore.float32)
        inputs, raw, write, read = operators.split(wide, sizes, 1)
        steps = steps_of(raw, biases, limit)
        decays = -operators.exp(decays.astype(mindspore.float32)).transpose(1, 0).expand_dims(0)
        written = by_token(steps * inputs)
        # Where an example begins, a step that is long enough for every decay to forget what was before.
        steps = by_token(operators.where((part > 0).expand_dims(-1), steps, FORGET))
        ends = operators.exp(steps.sum(0).expand_dims(1) * decays)
        write, read = by_token(write), by_token(read)
        kept, added, leaves = (), (), None
        for token in range(CHUNK):
            keep = operators.exp(steps[token].expand_dims(1) * decays)
            add = written[token].expand_dims(1) * write[token].expand_dims(2)
            leaves = add if token == 0 else keep * leaves + add
            kept, added = kept + (keep,), added + (add,)
        starts = ()
        for chunk in range(chunks):
            starts = starts + (state.expand_dims(0),)
            state = ends[chunk] * state + leaves[chunk]
        current, outputs = operators.concat(starts), ()
        for token in range(CHUNK):
            current = kept[token] * current + added[token]
            outputs = outputs + (_PRODUCT(read[token].expand_dims(1), current),)
        found = operators.concat(outputs, 1).reshape(STRIP, channels)
        return operators.concat((found + inputs * passed.astype(mindspore.float32), state))

    return strip


def _heads_strip(space: StateSpace):
    """Mamba2: section 6 of arXiv 2405.21060, products of matrices within the strip and with the state before it."""
    states, channels, limit = space.state_size, space.intermediate_size, space.time_step_limit
    heads, dim, groups = space.num_heads, space.head_dim, space.n_groups
    sizes = channels, groups * states, groups * states, heads
    own = heads // groups
    order = np.arange(STRIP)
    until, later = (
        Tensor((order <= order[:, None]).astype(np.float32)),
        Tensor((order[:, None] > order).astype(np.float32)),
    )
    order = Tensor(order.astype(np.int32))

    def by_group(values):
        return values.reshape(STRIP, groups, -1).transpose(1, 0, 2)

    def strip(packed, part, state, decays, biases, passed):
        wide = packed.astype(mindspore.float32)
        inputs, write, read, raw = operators.split(wide, sizes, 1)
        steps = steps_of(raw, biases, limit)
        falls = (steps * -operators.exp(decays.astype(mindspore.float32))).transpose(1, 0)
        # What a token's example has in the strip begins here; below 0 it began before.
        begins = order - part
        sees = until * (order.expand_dims(0) >= begins.expand_dims(1)).astype(mindspore.float32)
        goes_on = (begins < 0).astype(mindspore.float32)
        # Sums from each token to each later one, not differences of sums, which lose small ones beside large ones.
        spans = operators.matmul(until, falls.expand_dims(-1) * later)
        weights = operators.exp(spans) * sees
        since = operators.exp(operators.matmul(falls, until.transpose(1, 0))) * goes_on
        by_head = inputs.reshape(STRIP, heads, dim)
        written = by_head * steps.expand_dims(-1)
        write, read = by_group(write), by_group(read)
        scores = _PRODUCT_B(read, write).expand_dims(1) * weights.reshape(groups, own, STRIP, STRIP)
        within = _PRODUCT(scores.reshape(heads, STRIP, STRIP), written.transpose(1, 0, 2)).transpose(1, 0, 2)
        before = state.reshape(states, groups, own * dim).transpose(1, 0, 2)
        reached = _PRODUCT(read, before).transpose(1, 0, 2).reshape(STRIP, heads, dim)
        outputs = within + reached * since.transpose(1, 0).expand_dims(-1)
        outputs = outputs + by_head * passed.astype(mindspore.float32).reshape(heads, 1)
        leaves = by_group(written * weights[:, -1].transpose(1, 0).expand_dims(-1))
        left = _PRODUCT_A(write, leaves).transpose(1, 0, 2).reshape(states, heads, dim)
        behind = state.reshape(states, heads, dim) * since[:, -1].expand_dims(-1) + left
        return operators.concat((outputs.reshape(STRIP, channels), behind.reshape(states, channels)))

    return strip


def steps_of(raw: Tensor, biases: Tensor, limit: tuple[float, float]) -> Tensor:
    """Return time steps [tokens, n]: softplus of what a layer gives and their biases, within the limit."""
    found = raw + biases.astype(mindspore.float32)
    found = operators.relu(found) + operators.log1p(operators.exp(-operators.abs(found)))
    least, largest = limit
    if least > 0:
        found = operators.maximum(found, least)
    return operators.minimum(found, largest) if largest < float("inf") else found


@cache
def _zeros(*shape: int) -> Tensor:
    return Tensor(np.zeros(shape, np.float32))


def step_of(space: StateSpace):
    """Return (packed [rows, n], state [rows, state_size, channels], decays, biases, what passes) for one token a row.

    It gives the outputs [rows, channels] and the state behind them.
    """
    return _heads_step(space) if space.num_heads else _channels_step(space)


def _channels_step(space):
    states, channels = space.state_size, space.intermediate_size
    sizes = channels, channels, states, states

    def step(packed, state, decays, biases, passed):
        inputs, raw, write, read = operators.split(packed.astype(mindspore.float32), sizes, 1)
        steps = steps_of(raw, biases, space.time_step_limit)
        decays = -operators.exp(decays.astype(mindspore.float32)).transpose(1, 0).expand_dims(0)
        state = operators.exp(steps.expand_dims(1) * decays) * state
        state = state + (steps * inputs).expand_dims(1) * write.expand_dims(2)
        outputs = (read.expand_dims(2) * state).sum(1)
        return outputs + inputs * passed.astype(mindspore.float32), state

    return step


def _heads_step(space):
    states, channels, groups = space.state_size, space.intermediate_size, space.n_groups
    heads, dim = space.num_heads, space.head_dim
    sizes = channels, groups * states, groups * states, heads

    def by_group(values, rows):
        return values.reshape(rows, groups, states).transpose(0, 2, 1).reshape(rows, states, groups, 1, 1)

    def step(packed, state, decays, biases, passed):
        rows = packed.shape[0]
        inputs, write, read, raw = operators.split(packed.astype(mindspore.float32), sizes, 1)
        steps = steps_of(raw, biases, space.time_step_limit)
        keep = operators.exp(steps * -operators.exp(decays.astype(mindspore.float32)))
        by_head = inputs.reshape(rows, heads, dim)
        written = (by_head * steps.expand_dims(-1)).reshape(rows, 1, groups, -1, dim)
        state = state.reshape(rows, states, groups, -1, dim) * keep.reshape(rows, 1, groups, -1, 1)
        state = state + by_group(write, rows) * written
        outputs = (by_group(read, rows) * state).sum(1).reshape(rows, heads, dim)
        outputs = outputs + by_head * passed.astype(mindspore.float32).reshape(heads, 1)
        return outputs.reshape(rows, channels), state.reshape(rows, states, channels)

    return step
