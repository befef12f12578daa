"""Decoder blocks for generation, as functions of tensors that write their keys and values into a cache in place.

The cache of a layer is keys and values [rows x kv_heads x capacity, head_dim]; `places` int32 [n, 1] says where in it
the n new ones of a layer go. Every function has one result: a second would make the Python thread wait for each call.
"""

from functools import cache, partial

import mindspore
import numpy as np
from mindspore import ops as operators

from msft.backend.contract import Precision
from msft.backend.mindspore import block, ops

# Layers in one compiled function: each call costs as much as a small product, each layer 0.1 s of compiling.
GROUP = 6


class CachedBlocks:
    """The compiled functions of a decoder's generation, and which layers share one."""

    def __init__(self, decoder, numbers: block.Numbers):
        layers, half = decoder.spec.num_hidden_layers, decoder.spec.head_dim // 2
        self.prompt = partial(_prompt, numbers, decoder.runtime.precision)
        self.tokens = partial(_tokens, numbers, decoder.runtime.precision)
        self.finish = _finish(numbers.kernels.rms_norm)
        self.groups = [group.tolist() for group in np.array_split(np.arange(layers), -(-layers // GROUP))]
        # Exchanges the halves of a head and negates the second, as one product instead of four small operators.
        self.turn = decoder.tensor(np.kron([[0, -1], [1, 0]], np.eye(half)).astype(np.float32))


@cache
def _prompt(numbers: block.Numbers, precision: Precision, layout):
    """A block of a layout for whole prompts, compiled.

    (hidden [rows, length, hidden], cosine, sine [rows x length, 1, head_dim], turn, allowed [rows, length, length],
    places, keys, values, *tensors) -> hidden.
    """
    project, leave = _project(numbers, precision, layout), _leave(numbers, layout)
    put, attention, dim = operators.ScatterNdUpdate(), numbers.kernels.cached_attention, numbers.dim

    def by_head(heads, rows, length):
        return heads.reshape(rows, length, -1, dim).transpose(0, 2, 1, 3)

    def prompt(hidden, cosine, sine, turn, allowed, places, keys, values, *tensors):
        rows, length, features = hidden.shape
        flat = hidden.reshape(-1, features)
        query, key, value = project(flat, cosine, sine, turn, places, tensors)
        query, key, value = by_head(query, rows, length), by_head(key, rows, length), by_head(value, rows, length)
        keys = put(keys, places, key.reshape(-1, dim))
        values = put(values, places, value.reshape(-1, dim))
        mixed = operators.depend(attention(query, key, value, allowed), (keys, values))
        mixed = mixed.transpose(0, 2, 1, 3).reshape(rows * length, -1)
        return leave(flat, mixed, places, tensors).reshape(rows, length, features)

    return mindspore.jit(prompt)


@cache
def _tokens(numbers: block.Numbers, precision: Precision, layouts):
    """Blocks of some layouts, one after the other, for a token of each row, compiled.

    (hidden [rows, hidden], cosine, sine [rows, 1, head_dim], turn, bias, places, then keys, values and tensors of each
    layer) -> hidden; `bias` [rows x kv_heads, 1, capacity] is 0 for the slots that a row's token sees, else hugely
    negative.
    """
    ends = np.cumsum([2 + len(layout) for layout in layouts]).tolist()
    blocks = [_token(numbers, precision, layout) for layout in layouts]
    spans = list(zip(blocks, [0, *ends[:-1]], ends, strict=True))

    def tokens(hidden, cosine, sine, turn, bias, places, *tensors):
        for token, start, end in spans:
            hidden = token(hidden, cosine, sine, turn, bias, places, *tensors[start:end])
        return hidden

    return mindspore.jit(tokens)


def _token(numbers, precision, layout):
    project, leave = _project(numbers, precision, layout), _leave(numbers, layout)
    put, attention = operators.ScatterNdUpdate(), _attention(numbers, precision)
    dim, groups = numbers.dim, numbers.kv_heads

    def token(hidden, cosine, sine, turn, bias, places, keys, values, *tensors):
        rows = hidden.shape[0]
        query, key, value = project(hidden, cosine, sine, turn, places, tensors)
        keys = put(keys, places, key.reshape(-1, dim))
        values = put(values, places, value.reshape(-1, dim))
        # Grouped heads share one product: the queries of a group stand below one another.
        query, keys, values = (tensor.reshape(rows * groups, -1, dim) for tensor in (query, keys, values))
        mixed = attention(query, keys, values, bias).reshape(rows, -1)
        return leave(hidden, mixed, places, tensors)

    return token


def _project(numbers, precision, layout):
    """(hidden [n, hidden], cosine, sine, turn, places, tensors) -> turned queries and keys, values [n, heads, dim].

    Each module has a product of its own here: to join the weights would read them twice.
    """
    parts, rotary, dim = block.Parts(numbers, layout), _rotary(precision), numbers.dim
    norm, linears = parts.norm("input_layernorm"), [parts.linear([f"self_attn.{name}_proj"]) for name in "qkv"]
    query_of, key_of, value_of = linears

    def project(hidden, cosine, sine, turn, places, tensors):
        count, normed = hidden.shape[0], norm(hidden, *tensors)
        query = rotary(query_of(normed, places, *tensors).reshape(count, -1, dim), cosine, sine, turn)
        key = rotary(key_of(normed, places, *tensors).reshape(count, -1, dim), cosine, sine, turn)
        return query, key, value_of(normed, places, *tensors)

    return project


def _leave(numbers, layout):
    """(hidden, mixed [n, ...], places, tensors) -> hidden states behind attention's output and the feed-forward."""
    parts, swiglu = block.Parts(numbers, layout), numbers.kernels.swiglu
    output_of, norm = parts.linear(["self_attn.o_proj"]), parts.norm("post_attention_layernorm")
    gate_of, up_of, down_of = (parts.linear([f"mlp.{name}_proj"]) for name in ("gate", "up", "down"))

    def leave(hidden, mixed, places, tensors):
        hidden = hidden + output_of(mixed, places, *tensors)
        normed = norm(hidden, *tensors)
        wide = swiglu(gate_of(normed, places, *tensors), up_of(normed, places, *tensors))
        return hidden + down_of(wide, places, *tensors)

    return leave


def _rotary(precision):
    kind = ops.dtype(precision.rotary)

    def rotary(heads, cosine, sine, turn):
        wide = heads.astype(kind)
        turned = operators.dense(wide, turn.astype(kind))
        return (wide * cosine.astype(kind) + turned * sine.astype(kind)).astype(heads.dtype)

    return rotary


def _attention(numbers, precision):
    kind, scale = ops.dtype(precision.softmax), numbers.dim**-0.5
    scores_of, mix = operators.BatchMatMul(transpose_b=True), operators.BatchMatMul()

    def attention(query, keys, values, bias):
        scores = scores_of(query, keys).astype(kind) * scale + bias.astype(kind)
        return mix(operators.softmax(scores, -1).astype(values.dtype), values)

    return attention


@cache
def _finish(rms_norm):
    """(hidden [rows, hidden], norm, head) -> the logits, float32 [rows, vocabulary], compiled."""

    def finish(hidden, norm, head):
        return ops.linear(rms_norm(hidden, norm).astype(head.dtype), head).astype(mindspore.float32)

    return mindspore.jit(finish)
