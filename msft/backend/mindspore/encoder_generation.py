"""Generation by an encoder-decoder: prompts are encoded once, and answers decoded token by token with caches."""

from functools import cache

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import seq2seq
from msft.backend.line import rounded_up
from msft.backend.mindspore import ops, reading_block
from msft.backend.mindspore.attention import MASKED
from msft.backend.mindspore.parts import Numbers, Parts
from msft.models.encoder import Cross

# Caches and prompts are padded to multiples of this, so that few shapes are compiled.
BUCKET = 64


class EncoderSession:
    """A batch being generated; see `decoding.Session`."""

    bucket = 1

    def __init__(self, model, max_new_tokens: int):
        self.decoder = model.decoder
        self.capacity = -(-max_new_tokens // BUCKET) * BUCKET
        self.slot = 0

    def prefill(self, input_ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """Take left-padded prompts int32 [rows, length] with `padding` int32 [rows]; return the first logits."""
        decoder, spec = self.decoder, self.decoder.spec
        self.rows, self.weight = len(padding), decoder.head_weight()
        sides = seq2seq.sources(input_ids, padding)
        trace = decoder.forward(sides)
        lengths = np.array(sides.source.lengths())
        width = rounded_up(int(lengths.max()), BUCKET)
        slots = np.arange(width)
        places = np.minimum(sides.source.borders[:-1, None] + slots, sides.source.borders[1:, None] - 1)
        self.told = self._told(trace, decoder.tensor(places.astype(np.int32)))
        self.hidden_sources = self._bias(np.where(slots < lengths[:, None], 0.0, MASKED)[:, None])
        self.caches = self._empty(self.rows * spec.num_attention_heads * self.capacity)
        self.table = ops.to_numpy(decoder.parameter(decoder.decoder.table))
        return self.decode(np.full(self.rows, spec.encoder.start_id, np.int32))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""
        decoder, spec = self.decoder, self.decoder.spec
        slots, heads = np.arange(self.capacity), np.arange(self.rows * spec.num_attention_heads, dtype=np.int32)
        buckets = spec.encoder.positions.bucket(slots - self.slot, is_causal=True)
        bias = np.where(slots <= self.slot, self.table[buckets].T, np.float32(MASKED))
        shared = self._bias(np.tile(bias, (self.rows, 1, 1))), self.hidden_sources
        shared = *shared, decoder.tensor((heads * self.capacity + self.slot).reshape(-1, 1))
        self.slot += 1
        hidden, stack = decoder.entrance.of(tokens, np.zeros(self.rows, np.int32)), decoder.decoder
        for number, (layout, names) in enumerate(stack.layers):
            token, tensors = _token(stack.numbers(), layout, stack.cross), map(decoder.parameter, names)
            hidden = token(hidden, *shared, *self.caches[number], *self.told[number], *tensors)
        finish, tensors = _finish(decoder.kernels.normed, spec.encoder.output_scale), decoder.norm.names
        return finish(hidden, self.weight, *map(decoder.parameter, tensors)).asnumpy()

    def _told(self, trace, places: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer of the decoder, [rows x heads, width, head_dim]."""
        found, split = [], _split(self.decoder.spec.num_attention_heads, self.decoder.spec.head_dim)
        for apply, tensors in self.decoder.decoder.blocks():
            told = apply.functions.tell.forward(trace.lines.states, trace.lines.source, tensors)
            found.append((split.keys(told, places), split.values(told, places)))
        return found

    def _bias(self, bias: np.ndarray) -> Tensor:
        """What is added to scores, [rows x heads, 1, keys], for an array [rows, heads or 1, keys]."""
        heads = self.decoder.spec.num_attention_heads
        whole = np.broadcast_to(bias, (self.rows, heads, bias.shape[-1])).reshape(-1, 1, bias.shape[-1])
        return self.decoder.tensor(whole.astype(np.float32))

    def _empty(self, places: int) -> list[list[Tensor]]:
        spec, runtime = self.decoder.spec, self.decoder.runtime
        zeros = np.zeros((places, spec.head_dim), np.float32)
        return [
            [ops.from_numpy(zeros, runtime.device, runtime.precision.compute) for _ in range(2)]
            for _ in range(spec.num_hidden_layers)
        ]


class _Split:
    """Takes the rows of keys or values at places [rows, width] of a line [length, 2 heads x dim]."""

    def __init__(self, heads: int, dim: int):
        self.heads, self.dim = heads, dim
        self.keys, self.values = mindspore.jit(self._keys), mindspore.jit(self._values)

    def _keys(self, told, places):
        return self.by_head(told[:, : self.heads * self.dim], places)

    def _values(self, told, places):
        return self.by_head(told[:, self.heads * self.dim :], places)

    def by_head(self, told, places):
        rows, width = places.shape
        found = operators.gather(told, places, 0).reshape(rows, width, self.heads, self.dim)
        return found.transpose(0, 2, 1, 3).reshape(rows * self.heads, width, self.dim)


_split = cache(_Split)


@cache
def _token(numbers: Numbers, layout, cross: Cross):
    """A layer of a layout for a token of each row, compiled.

    (hidden [rows, hidden], bias [rows x heads, 1, capacity], hidden_sources [rows x heads, 1, width], places [rows x
    heads, 1], caches [rows x heads x capacity, dim] of keys and values, keys and values of the sources, *tensors) ->
    hidden. `places` are the new key's in the cache.
    """
    asking, _ = reading_block.of_cross(numbers, cross)
    parts, reading, form, dim = Parts(numbers, layout), Parts(asking, layout), numbers.form.block, numbers.dim
    norm, linears = parts.norm(form.attention_norm), [parts.linear([module]) for module in form.project]
    merge, ask, take = parts.merge(), reading.project(), reading.merge()
    feed_norm, expanding = parts.norm(form.feed_norm), [parts.linear([module]) for module in form.expand]
    contract, put = parts.contract(), operators.ScatterNdUpdate()
    scores_of, mix, is_gated = operators.BatchMatMul(transpose_b=True), operators.BatchMatMul(), form.is_gated

    def attend(query, keys, values, bias):
        scores = scores_of(query.reshape(keys.shape[0], 1, dim), keys).astype(bias.dtype) + bias
        return mix(operators.softmax(scores, -1).astype(values.dtype), values)

    def token(hidden, bias, hidden_sources, places, keys, values, told_keys, told_values, *tensors):
        rows, normed = hidden.shape[0], norm(hidden, *tensors)
        keys = put(keys, places, linears[1](normed, places, *tensors).reshape(-1, dim))
        values = put(values, places, linears[2](normed, places, *tensors).reshape(-1, dim))
        keys, values = keys.reshape(places.shape[0], -1, dim), values.reshape(places.shape[0], -1, dim)
        mixed = attend(linears[0](normed, places, *tensors), keys, values, bias)
        middle = hidden + merge(mixed.reshape(rows, -1), places, *tensors)
        read = attend(ask(middle, places, *tensors), told_keys, told_values, hidden_sources)
        after = middle + take(read.reshape(rows, -1), places, *tensors)
        normed = feed_norm(after, *tensors)
        wide = expanding[0](normed, places, *tensors)
        if is_gated:
            wide = operators.concat((wide, expanding[1](normed, places, *tensors)), 1)
        return after + contract(wide, places, *tensors)

    return mindspore.jit(token)


@cache
def _finish(normed, scale: float):
    """(hidden [rows, hidden], head, the norm's weight) -> the logits, float32 [rows, vocabulary], compiled."""

    def finish(hidden, head, weight):
        last = normed(hidden, weight) * scale
        return ops.linear(last.astype(head.dtype), head).astype(mindspore.float32)

    return mindspore.jit(finish)
