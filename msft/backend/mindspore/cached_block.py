"""Decoder blocks for generation, as functions of tensors that write their keys and values into a cache in place.

The cache of a layer is keys and values [rows x kv_heads x capacity, head_dim]; `places` int32 [n, 1] says where in it
the n new ones of a layer go. Every function has one result: a second would make the Python thread wait for each call.
"""

from functools import cache

import mindspore
import numpy as np
from mindspore import ops as operators

from msft.backend.mindspore import block, ops

# Layers in one compiled function: each call costs as much as a small product, each layer 0.1 s of compiling.
GROUP = 6


class CachedBlocks:
    """The compiled functions of a decoder's generation, and which layers share one."""

    def __init__(self, decoder):
        layers, half = decoder.spec.num_hidden_layers, decoder.spec.head_dim // 2
        self.prompt = cache(lambda layout: mindspore.jit(_prompt(decoder, layout)))
        self.tokens = cache(lambda layouts: mindspore.jit(_tokens(decoder, layouts)))
        self.finish = mindspore.jit(_finish(decoder.kernels.rms_norm, decoder.spec.rms_norm_eps))
        self.groups = [numbers.tolist() for numbers in np.array_split(np.arange(layers), -(-layers // GROUP))]
        # Exchanges the halves of a head and negates the second, as one product instead of four small operators.
        self.turn = decoder.tensor(np.kron([[0, -1], [1, 0]], np.eye(half)).astype(np.float32))


def _prompt(decoder, layout):
    """(hidden [rows, length, hidden], cosine, sine, allowed [rows, length, length], places, keys, values, *tensors)."""
    parts, put = block.Parts(decoder, layout, 0.0, True), operators.ScatterNdUpdate()
    project, merge, feed_forward, attention = parts.project(), parts.merge(), parts.feed_forward(), parts.attention

    def prompt(hidden, cosine, sine, allowed, places, keys, values, *tensors):
        query, key, value = project(hidden, cosine, sine, places, tensors)
        keys = put(keys, places, key.reshape(-1, key.shape[-1]))
        values = put(values, places, value.reshape(-1, value.shape[-1]))
        mixed = operators.depend(attention(query, key, value, allowed), (keys, values))
        hidden = hidden + merge(mixed, places, tensors)
        return hidden + feed_forward(hidden, places, tensors)

    return prompt


def _tokens(decoder, layouts):
    """(hidden [rows, hidden], cosine, sine, turn, bias, places, then keys, values and tensors of each layer) -> hidden.

    cosine, sine [rows, 1, head_dim]; `bias` [rows x kv_heads, 1, capacity] is 0 for the slots that a row's token sees,
    else hugely negative.
    """
    ends = np.cumsum([2 + len(layout) for layout in layouts]).tolist()
    spans = list(zip([_token(decoder, layout) for layout in layouts], [0, *ends[:-1]], ends, strict=True))

    def tokens(hidden, cosine, sine, turn, bias, places, *tensors):
        for token, start, end in spans:
            hidden = token(hidden, cosine, sine, turn, bias, places, *tensors[start:end])
        return hidden

    return tokens


def _token(decoder, layout):
    parts, put, rotary = block.Parts(decoder, layout, 0.0, True), operators.ScatterNdUpdate(), _rotary(decoder)
    norm, feed_forward, attention = parts.norm("input_layernorm"), parts.feed_forward(), _attention(decoder)
    query_of, key_of, value_of, output_of = (parts.linear(f"self_attn.{name}_proj") for name in "qkvo")
    dim, groups = decoder.spec.head_dim, decoder.spec.num_key_value_heads

    def token(hidden, cosine, sine, turn, bias, places, keys, values, *tensors):
        rows, normed = hidden.shape[0], norm(hidden, tensors)
        query = rotary(query_of(normed, places, tensors).reshape(rows, -1, dim), cosine, sine, turn)
        key = rotary(key_of(normed, places, tensors).reshape(rows, -1, dim), cosine, sine, turn)
        keys = put(keys, places, key.reshape(-1, dim))
        values = put(values, places, value_of(normed, places, tensors).reshape(-1, dim))
        # Grouped heads share one product: the queries of a group stand below one another.
        query, keys, values = (tensor.reshape(rows * groups, -1, dim) for tensor in (query, keys, values))
        mixed = attention(query, keys, values, bias).reshape(rows, -1)
        hidden = hidden + output_of(mixed, places, tensors)
        return hidden + feed_forward(hidden, places, tensors)

    return token


def _rotary(decoder):
    kind = ops.dtype(decoder.runtime.precision.rotary)

    def rotary(heads, cosine, sine, turn):
        wide = heads.astype(kind)
        return (wide * cosine.astype(kind) + ops.linear(wide, turn) * sine.astype(kind)).astype(heads.dtype)

    return rotary


def _attention(decoder):
    kind, scale = ops.dtype(decoder.runtime.precision.softmax), decoder.spec.head_dim**-0.5
    scores_of, mix = operators.BatchMatMul(transpose_b=True), operators.BatchMatMul()

    def attention(query, keys, values, bias):
        scores = scores_of(query, keys).astype(kind) * scale + bias.astype(kind)
        return mix(operators.softmax(scores, -1).astype(values.dtype), values)

    return attention


def _finish(rms_norm, eps: float):
    """(hidden [rows, hidden], norm, head) -> the logits, float32 [rows, vocabulary]."""

    def finish(hidden, norm, head):
        return ops.linear(rms_norm(hidden, norm, eps).astype(head.dtype), head).astype(mindspore.float32)

    return finish
