"""msft's own encoder-decoder (T5): a line of sources and a line of targets, each segment seeing its own alone."""

from collections.abc import Callable
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import seq2seq
from msft.backend.contract import Batch, Runtime, Tuning
from msft.backend.line import Line
from msft.backend.mindspore import attention, block, ops, outside, reading_block
from msft.backend.mindspore.decoder import Decoder, by_position
from msft.backend.mindspore.model import Model
from msft.backend.mindspore.parts import Form, Numbers
from msft.backend.mindspore.relative_attention import CrossAttention, RelativeAttention
from msft.models.encoder import Cross
from msft.models.spec import Block, ModelSpec


class Stack:
    """An encoder or a decoder: (layout, names of tensors) of its layers, and the tensor of its relative positions."""

    def __init__(self, decoder, prefixes: list[str], form: Block, cross: Cross | None):
        self.decoder, self.prefixes, self.cross, spec = decoder, prefixes, cross, decoder.spec
        self.form = Form(form, attention.Scores.of(spec))
        self.table = f"{prefixes[0]}{spec.encoder.positions.module}.weight"
        self.layers = [self._layer(prefix) for prefix in prefixes]

    def blocks(self):
        """Yield each layer's compiled block and its tensors."""
        decoder, kind = self.decoder, reading_block.ReadingBlock if self.cross else block.Block
        for layout, names in self.layers:
            functions = reading_block.functions(self.numbers(), layout, self.cross)
            yield kind(functions, decoder.runtime.recompute), [*map(decoder.parameter, names)]

    def numbers(self) -> Numbers:
        """Return what the functions of the layers are compiled for."""
        decoder = self.decoder
        dropout = decoder.dropout if decoder.dropout_keys is not None else 0.0
        return decoder._numbers(dropout, decoder.adapter)._replace(form=self.form)

    def tuned(self, number: int, places) -> list[str]:
        """Return the tuned tensors at some places of a layer's layout."""
        return [self.decoder.tuned_names[self.layers[number][1][place]] for place in places]

    def _layer(self, prefix: str):
        """A layer's layout, and the tensors' whole names; the table of positions is no layer's own."""
        layout, names = self.decoder._layout(prefix)
        kept = [place for place, name in enumerate(names) if name != self.table]
        return tuple(layout[place] for place in kept), [names[place] for place in kept]


class Way(NamedTuple):
    """A line's way through a stack: what the layers take and kept, and the last one's output."""

    line: Line
    tensors: block.LineTensors
    kept: list
    last: Tensor


class Trace(NamedTuple):
    """A batch's way through both stacks; `line` is the targets', `hidden` what the head takes [length, hidden]."""

    line: Line
    source: Way
    target: Way
    lines: reading_block.Lines
    hidden: Tensor


# Called with the name of a module, its output [length, hidden] and the line of that.
Seen = Callable[[str, Tensor, Line], None]


class EncoderDecoder(Decoder):
    """Weights on the device and the way through them, as `Decoder` has them."""

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime, kernels: ops.Kernels):
        super().__init__(spec, source, tuning, runtime, kernels)
        seq2seq.check_whole(self.mesh, is_sharded=False)
        encoder = spec.encoder
        names = [encoder.layer(number) for number in range(encoder.num_hidden_layers)]
        self.encoder = Stack(self, names, encoder.block, None)
        names = [spec.layer(number) for number in range(spec.num_hidden_layers)]
        self.decoder = Stack(self, names, spec.block, encoder.cross)
        self.encoder_norm = outside.Norm(self, encoder.norm)

    def forward(self, sides: seq2seq.Split, keep: bool = False, seen: Seen | None = None) -> Trace:
        """Take a batch through encoder and decoder; `keep` what `backward` needs.

        `seen` is called with what each module gives.
        """
        seen, encoder = seen or _not_seen, self.spec.encoder
        source = self._entered(self.encoder, sides.source, sides.batch, False, seen)
        source = self._through(self.encoder, source, source.tensors, keep, seen)
        states = self.encoder_norm.forward(source.last)
        seen(encoder.norm, states, source.line)
        target = self._entered(self.decoder, sides.target, sides.batch, True, seen)
        cross = CrossAttention(self.spec, self.runtime.precision)
        plan = cross.of(sides.target.line(sides.batch, sides.source))
        lines = reading_block.Lines(target.tensors, source.tensors, cross, plan, states)
        target = self._through(self.decoder, target, lines, keep, seen)
        hidden = self.norm.forward(target.last)
        seen(self.spec.outside.norm, hidden, target.line)
        return Trace(target.line, source, target, lines, _scaled(hidden, encoder.output_scale))

    def backward(self, gradient: Tensor, trace: Trace) -> tuple[dict[str, Tensor], Tensor]:
        """Return what `Decoder.backward` does; the second is the gradient of the targets' embeddings."""
        gradient, found = self.norm.backward(_scaled(gradient, self.spec.encoder.output_scale), trace.target.last)
        by_states, flats = _zeros_like(trace.lines.states), []
        for number, (apply, tensors) in _reversed(self.decoder.blocks()):
            kept = trace.target.kept.pop()
            gradient, by_states, parts = apply.backward(gradient, by_states, kept, trace.lines, tensors)
            flats += [(flat, self.decoder.tuned(number, places)) for places, flat in parts]
        by_source, of_norm = self.encoder_norm.backward(by_states, trace.source.last)
        for number, (apply, tensors) in _reversed(self.encoder.blocks()):
            by_source, parts = apply.backward(by_source, trace.source.kept.pop(), trace.source.tensors, tensors)
            flats += [(flat, self.encoder.tuned(number, places)) for places, flat in parts]
        found |= of_norm
        for stack, way, upper in ((self.encoder, trace.source, by_source), (self.decoder, trace.target, gradient)):
            if stack.table in self.tuned_names:
                name = self.tuned_names[stack.table]
                found[name] = way.tensors.attention.table_gradient(self.tuned[name])
            for name, part in self.entrance.backward(upper, way.line).items():
                found[name] = found[name] + part if name in found else part
        while flats:
            found |= self._parts_of(*flats.pop())
        return found, gradient

    def states(self, sides: seq2seq.Split) -> dict[str, np.ndarray]:
        """Return the output of the embedding, of each block and of the norms, as `by_position`, by name.

        The encoder's stand at sources, the decoder's at targets, the embedding's at both.
        """
        found: dict[str, np.ndarray] = {}

        def seen(name, hidden, line):
            placed = by_position(hidden, line, sides.batch.segment_ids)
            found[name] = found[name] + placed if name in found else placed

        self.forward(sides, seen=seen)
        return found

    def _entered(self, stack: Stack, side: seq2seq.Side, batch: Batch, is_causal: bool, seen: Seen) -> Way:
        """A line before the first layer of a stack."""
        found = side.line(batch)
        table, precision = self.parameter(stack.table), self.runtime.precision
        mixer = RelativeAttention(self.spec, precision, is_causal, stack.table in self.tuned_names)
        keys = np.zeros(1, np.int32) if self.dropout_keys is None else found.fill(self.dropout_keys)
        plan = mixer.of(found, side.positions(), table)
        hidden = self.entrance.forward(found)
        seen(self.spec.outside.embedding, hidden, found)
        return Way(found, block.LineTensors(None, None, self.tensor(keys), mixer, plan), [], hidden)

    def _through(self, stack: Stack, way: Way, taken, keep: bool, seen: Seen) -> Way:
        """A line behind the layers of a stack, which take `taken` of it."""
        hidden = way.last
        for prefix, (apply, tensors) in zip(stack.prefixes, stack.blocks(), strict=True):
            hidden, kept = apply.forward(hidden, taken, tensors)
            if keep:
                way.kept.append(kept)
            seen(prefix.removesuffix("."), hidden, way.line)
        return way._replace(last=hidden)


class EncoderDecoderModel(Model):
    """An encoder-decoder and its losses."""

    decoder_kind = EncoderDecoder

    def activations(self, batch: Batch, adapter: bool) -> dict[str, np.ndarray]:
        """Return the hidden states by module in the order of the forward pass, float32 [rows, length, hidden]."""
        with self.decoder.mode(None, adapter):
            return self.decoder.states(seq2seq.split(batch))

    def describe(self) -> dict[str, str]:
        """Say what was applied."""
        return {**super().describe(), **seq2seq.overflow(self.runtime.precision)}

    def _forward(self, batch: Batch, keep: bool = False, taken: Tensor | None = None) -> Trace:
        return self.decoder.forward(seq2seq.split(batch), keep)


def _reversed(blocks):
    return reversed([*enumerate(blocks)])


def _not_seen(name: str, hidden: Tensor, line: Line) -> None:
    """What a forward pass calls that nobody looks at."""


@mindspore.jit
def _scaled(values, scale):
    return values * scale


@mindspore.jit
def _zeros_like(values):
    return operators.zeros(values.shape, values.dtype)
