"""Generation with state spaces: what a layer remembers of each row is a state and its convolution's last inputs.

A layer gives one tensor a row: its output, these inputs, and the state, one after another, float32. The next layer
reads its output, and the layer itself the rest for the next token.
"""

from functools import cache

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend.mindspore import state_block
from msft.backend.mindspore.block import LineTensors
from msft.backend.mindspore.cached_block import finish_of
from msft.backend.mindspore.parts import Numbers
from msft.backend.mindspore.state_space import STRIP, Scan, step_of


class CachedStates:
    """The compiled functions of a decoder's generation."""

    def __init__(self, decoder, numbers: Numbers):
        self.numbers = numbers
        self.finish = finish_of(numbers.kernels.normed, False, decoder.spec.head_cap or 0.0)

    def functions(self, layout):
        """Return (remember, token, output) of a layout's layers."""
        return _functions(self.numbers, layout)


class StateSession:
    """A batch being generated; see `decoding.Session`."""

    bucket = STRIP

    def __init__(self, model, max_new_tokens: int):
        self.decoder = model.decoder

    def prefill(self, input_ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """Take left-padded prompts int32 [rows, length] with `padding` int32 [rows]; return the last logits."""
        decoder, (rows, length) = self.decoder, input_ids.shape
        slots = np.arange(length) - padding[:, None]
        scan, nothing = Scan(decoder.spec.state_space), decoder.tensor(np.zeros(1, np.int32))
        plan = scan.plan_of(np.maximum(slots, 0).astype(np.int32).reshape(-1))
        line = LineTensors(nothing, nothing, nothing, scan, plan)
        inside = decoder.tensor((slots[:, 1 - decoder.spec.state_space.conv_kernel :] >= 0).astype(np.float32))
        ends = range(length // STRIP - 1, rows * length // STRIP, length // STRIP)
        self.weight, self.memories = decoder.head_weight(), []
        hidden = decoder.entrance.of(input_ids.reshape(-1), slots.reshape(-1))
        with decoder.mode(None, adapter=True):
            for apply, names_of_layer, _ in decoder.blocks():
                hidden, kept = apply.forward(hidden, line, [*map(decoder.parameter, names_of_layer)], keeps=True)
                remember, _, _ = decoder.cached_blocks.functions(decoder.layers[len(self.memories)][0])
                lasts = [kept.inner.results[end] for end in ends]
                self.memories.append(remember(hidden, kept.inner.wide, inside, *lasts))
        return self._logits(self.memories[-1])

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""
        decoder = self.decoder
        found = decoder.entrance.of(tokens, tokens)
        for number, (layout, names_of_layer) in enumerate(decoder.layers):
            _, token, _ = decoder.cached_blocks.functions(layout)
            found = token(found, self.memories[number], *map(decoder.parameter, names_of_layer))
            self.memories[number] = found
        return self._logits(found)

    def _logits(self, found: Tensor) -> np.ndarray:
        decoder = self.decoder
        _, _, output = decoder.cached_blocks.functions(decoder.layers[0][0])
        tensors = map(decoder.parameter, decoder.norm.names)
        return decoder.cached_blocks.finish(output(found), self.weight, *tensors).asnumpy()


@cache
def _functions(numbers: Numbers, layout):
    space, parts = numbers.form.space, state_block.StateParts(numbers, layout)
    gate_of, step = state_block.gate_of(space), step_of(space)
    project, mixed, packed, leave = parts.project(), parts.mixed_window(), parts.packed(), parts.leave()
    back, channels = space.conv_kernel - 1, space.convolved
    own = tuple(parts.position[name] for name in space.scanned)

    def output(found):
        return found[:, : found.shape[1] - back * channels - space.state_size * space.intermediate_size]

    def remember(hidden, wide, inside, *lasts):
        """What a prompt leaves: `inside` [rows, kernel - 1] tells which of its last tokens there are."""
        rows = inside.shape[0]
        _, columns, _ = gate_of(wide)
        inputs = columns.reshape(rows, -1, channels)[:, -back:].astype(mindspore.float32) * inside.expand_dims(-1)
        states = ()
        for last in lasts:
            states = states + (last[STRIP:].reshape(1, -1),)
        last_hidden = hidden.reshape(rows, -1, hidden.shape[1])[:, -1].astype(mindspore.float32)
        return operators.concat((last_hidden, inputs.reshape(rows, -1), operators.concat(states)), 1)

    def token(before, memory, *tensors):
        rows, hidden_size = memory.shape[0], memory.shape[1] - back * channels
        hidden_size = hidden_size - space.state_size * space.intermediate_size
        hidden = before[:, :hidden_size]
        sizes = hidden_size, back * channels, space.state_size * space.intermediate_size
        _, inputs, state = operators.split(memory, sizes, 1)
        gate, columns, steps = gate_of(project(hidden, hidden, *tensors))
        window, kept = (), ()
        for tap in range(back):
            window = window + (inputs[:, tap * channels : (tap + 1) * channels].astype(columns.dtype),)
        window = window + (columns,)
        for tap in range(back):
            kept = kept + (window[tap + 1].astype(mindspore.float32),)
        taken = packed(mixed(window, tensors), steps, hidden, *tensors)
        state = state.reshape(rows, space.state_size, space.intermediate_size)
        outputs, state = step(taken, state, tensors[own[0]], tensors[own[1]], tensors[own[2]])
        scanned = operators.concat((outputs, gate.astype(mindspore.float32)), 1)
        hidden = hidden.astype(mindspore.float32) + leave(scanned, hidden, *tensors)
        return operators.concat((hidden.astype(mindspore.float32), *kept, state.reshape(rows, -1)), 1)

    return tuple(map(mindspore.jit, (remember, token, output)))
