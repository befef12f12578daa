"""Decoder blocks for generation, as functions of tensors that write their keys and values into a cache in place.

The cache of a layer is keys and values [rows x kv_heads x capacity, head_dim]; `places` int32 [n, 1] says where in it
the n new ones of a layer go. Every function has one result: a second would make the Python thread wait for each call.
"""

from functools import cache, partial
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend.contract import Precision
from msft.backend.mindspore import attention, block, experts, fused_attention, ops
from msft.backend.mindspore.parts import Numbers, Parts
from msft.models.spec import ModelSpec

# Layers in one compiled function: each call costs as much as a small product, each layer 0.1 s of compiling.
GROUP = 6


class CachedBlocks:
    """The compiled functions of a decoder's generation, and which layers share one."""

    def __init__(self, decoder, numbers: Numbers):
        spec = decoder.spec
        self.prompt = partial(_prompt, numbers, decoder.runtime.precision)
        self.tokens = partial(_tokens, numbers, decoder.runtime.precision)
        self.finish = finish_of(numbers.kernels.normed, spec.norm == "layer", spec.head_cap or 0.0)
        self.groups = _groups(spec)
        self.decoder, self.numbers = decoder, numbers
        self.nothing = decoder.tensor(np.zeros(1, np.int32))
        # Exchanges the features of a pair and negates one, as one product instead of four small operators.
        self.turn = decoder.tensor(_turn(spec))

    def routed(self, number: int, hidden: Tensor) -> Tensor:
        """Return hidden states behind a layer's experts, where it has some: the other functions end before these."""
        if not self.decoder.spec.has_experts(number):
            return hidden
        layout, names = self.decoder.layers[number]
        functions, tensors = block.functions(self.numbers, layout), [*map(self.decoder.parameter, names)]
        flat = hidden.reshape(-1, hidden.shape[-1])
        line = _Line(self.nothing, experts.Routing(len(flat), None))
        wide = functions.expand.forward(flat, line, tensors)
        return functions.contract.forward(wide, line, tensors, flat).reshape(hidden.shape)


class _Line(NamedTuple):
    """What experts take of `block.LineTensors`."""

    tokens: Tensor
    routing: experts.Routing


def _groups(spec: ModelSpec) -> list[list[int]]:
    """Layers that share a compiled function, one after another; those of a group have one window.

    A layer with experts ends its group.
    """
    numbers = np.arange(spec.num_hidden_layers)
    ends = np.array([spec.has_experts(number) for number in numbers[:-1]], bool)
    runs = np.flatnonzero(np.diff(spec.windows).astype(bool) | ends) + 1
    found = []
    for run in np.split(numbers, runs):
        found += [group.tolist() for group in np.array_split(run, -(-len(run) // GROUP))]
    return found


def _turn(spec: ModelSpec) -> np.ndarray:
    """What a head is multiplied by for the part of it that the sine is for, float32 [head_dim, head_dim]."""
    half, turned = spec.rotary_dim // 2, spec.rotary_dim
    turn = np.zeros((spec.head_dim, spec.head_dim), np.float32)
    pair = np.array([[0, -1], [1, 0]])
    first = np.kron(np.eye(half), pair) if spec.neighbours else np.kron(pair, np.eye(half))
    turn[:turned, :turned] = first
    if spec.prefix:
        turn[turned:, turned:] = first
    return turn


@cache
def _prompt(numbers: Numbers, precision: Precision, layout):
    """A block of a layout for whole prompts, compiled.

    (hidden [rows, length, hidden], cosine, sine [rows x length, 1, head_dim], turn, allowed [rows, length, length],
    places, keys, values, *tensors) -> hidden.
    """
    project, leave = _project(numbers, precision, layout), _leave(numbers, layout)
    put, attend, dim = operators.ScatterNdUpdate(), _of_prompts(numbers, precision), numbers.dim

    def by_head(heads, rows, length):
        return heads.reshape(rows, length, -1, dim).transpose(0, 2, 1, 3)

    def prompt(hidden, cosine, sine, turn, allowed, places, keys, values, *tensors):
        rows, length, features = hidden.shape
        flat = hidden.reshape(-1, features)
        query, key, value = project(flat, cosine, sine, turn, places, tensors)
        query, key, value = by_head(query, rows, length), by_head(key, rows, length), by_head(value, rows, length)
        keys = put(keys, places, key.reshape(-1, dim))
        values = put(values, places, value.reshape(-1, dim))
        mixed = operators.depend(attend(query, key, value, allowed), (keys, values))
        mixed = mixed.transpose(0, 2, 1, 3).reshape(rows * length, -1)
        return leave(flat, mixed, places, tensors).reshape(rows, length, features)

    return mindspore.jit(prompt)


@cache
def _tokens(numbers: Numbers, precision: Precision, layouts):
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
    put, attend = operators.ScatterNdUpdate(), _attention(numbers, precision)
    dim, groups = numbers.dim, numbers.kv_heads

    def token(hidden, cosine, sine, turn, bias, places, keys, values, *tensors):
        rows = hidden.shape[0]
        query, key, value = project(hidden, cosine, sine, turn, places, tensors)
        keys = put(keys, places, key.reshape(-1, dim))
        values = put(values, places, value.reshape(-1, dim))
        # Grouped heads share one product: the queries of a group stand below one another.
        query, keys, values = (tensor.reshape(rows * groups, -1, dim) for tensor in (query, keys, values))
        mixed = attend(query, keys, values, bias).reshape(rows, -1)
        return leave(hidden, mixed, places, tensors)

    return token


def _project(numbers, precision, layout):
    """(hidden [n, hidden], cosine, sine, turn, places, tensors) -> turned queries and keys, values [n, heads, dim].

    Each module has a product of its own here: to join the weights would read them twice.
    """
    parts, form, dim = Parts(numbers, layout), numbers.form.block, numbers.dim
    rotary = _rotary(precision) if numbers.is_turned else _as_it_is
    norm, linears = parts.norm(form.attention_norm), [parts.linear([module]) for module in form.project]
    ungrouped, normed_heads = parts.ungrouped(), parts.normed_heads()
    sizes = numbers.heads * dim, numbers.kv_heads * dim, numbers.kv_heads * dim
    is_fused, has_norms = len(linears) == 1, bool(form.head_norms)

    def heads_of(normed, places, tensors):
        if is_fused:
            heads = ungrouped(linears[0](normed, places, *tensors))
            heads = normed_heads(heads, *tensors) if has_norms else heads
            return operators.split(heads, sizes, 1)
        query = linears[0](normed, places, *tensors)
        key = linears[1](normed, places, *tensors)
        value = linears[2](normed, places, *tensors)
        if has_norms:
            return operators.split(normed_heads(operators.concat((query, key, value), 1), *tensors), sizes, 1)
        return query, key, value

    def project(hidden, cosine, sine, turn, places, tensors):
        count, normed = hidden.shape[0], norm(hidden, *tensors)
        query, key, value = heads_of(normed, places, tensors)
        query = rotary(query.reshape(count, -1, dim), cosine, sine, turn)
        key = rotary(key.reshape(count, -1, dim), cosine, sine, turn)
        return query, key, value

    return project


def _as_it_is(heads, cosine, sine, turn):
    return heads


def _leave(numbers, layout):
    """(hidden, mixed [n, ...], places, tensors) -> hidden states behind attention's output and the feed-forward.

    Experts are left to `CachedBlocks.routed`.
    """
    parts, form, kernels = Parts(numbers, layout), numbers.form.block, numbers.kernels
    output_of = parts.merge()
    if block.has_experts(numbers, layout):

        def leave_attention(hidden, mixed, places, tensors):
            return hidden + output_of(mixed, places, *tensors)

        return leave_attention
    norm = parts.norm(form.feed_norm)
    expanding, contract = [parts.linear([module]) for module in form.expand], parts.contract()
    down_of = parts.linear_normed([form.contract], form.contracted_norm)
    has_two, is_parallel, residual = len(expanding) == 2, form.is_parallel, form.residual
    first_norm = parts.norm(form.attention_norm)

    def leave(hidden, mixed, places, tensors):
        kept = first_norm(hidden, *tensors) * residual if residual else hidden
        middle = kept + output_of(mixed, places, *tensors)
        normed = norm(hidden if is_parallel else middle, *tensors)
        kept = normed * residual if residual else middle
        if has_two:
            gate, up = expanding[0](normed, places, *tensors), expanding[1](normed, places, *tensors)
            return kept + down_of(kernels.gated(gate, up), places, *tensors)
        return kept + contract(expanding[0](normed, places, *tensors), places, *tensors)

    return leave


def _rotary(precision):
    kind = ops.dtype(precision.rotary)

    def rotary(heads, cosine, sine, turn):
        wide = heads.astype(kind)
        turned = operators.dense(wide, turn.astype(kind))
        return (wide * cosine.astype(kind) + turned * sine.astype(kind)).astype(heads.dtype)

    return rotary


def _of_prompts(numbers, precision):
    """Attention of whole prompts, by the chosen kernels."""
    if numbers.kernels.is_attention_fused:
        return fused_attention.fused_dense(numbers.form.scores)
    return attention.dense(numbers.form.scores, precision)


def _attention(numbers, precision):
    kind, (scale, cap, slopes), groups = ops.dtype(precision.softmax), numbers.form.scores, numbers.kv_heads
    scores_of, mix = operators.BatchMatMul(transpose_b=True), operators.BatchMatMul()

    def attend(query, keys, values, bias):
        found = attention.capped(scores_of(query, keys).astype(kind) * scale, cap)
        if slopes:
            capacity = found.shape[2]
            added = Tensor(slopes, kind).reshape(1, groups, -1, 1) * operators.arange(capacity).astype(kind)
            found = (found.reshape(-1, groups, added.shape[2], capacity) + added).reshape(found.shape)
        found = found + bias.astype(kind)
        return mix(operators.softmax(found, -1).astype(values.dtype), values)

    return attend


@cache
def finish_of(normed, is_biased: bool, cap: float):
    """(hidden [rows, hidden], head, the norm's tensors) -> the logits, float32 [rows, vocabulary], compiled."""

    def finish(hidden, head, weight):
        return logits(normed(hidden, weight), head)

    def finish_biased(hidden, head, weight, bias):
        return logits(normed(hidden, weight, bias), head)

    def logits(hidden, head):
        return attention.capped(ops.linear(hidden.astype(head.dtype), head).astype(mindspore.float32), cap)

    return mindspore.jit(finish_biased if is_biased else finish)
