"""msft's own decoder: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, LoRA, one compiled block a layer.

A block's functions are compiled once and called with each layer's weights, so that compiling takes seconds whatever
the depth (a graph of all 30 layers of a 135M model takes 50 s). Real tokens alone are computed, as a line.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import context, line, names, positions, prefix, slices, stages
from msft.backend.contract import Lora, Runtime, Tuning
from msft.backend.mindspore import (
    attention,
    block,
    deep_norm,
    distributed,
    experts,
    ops,
    outside,
    sequence,
    state_block,
    state_space,
    vocabulary,
)
from msft.backend.mindspore.cached_block import CachedBlocks
from msft.backend.mindspore.cached_state import CachedStates
from msft.backend.mindspore.parts import Form, Numbers
from msft.backend.routing import Balance
from msft.models import rope
from msft.models.adapters import peft_names
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec


class Trace(NamedTuple):
    """A line's way through the decoder: what each block kept, the last block's output, and the hidden states' norm.

    `tensors` are what the blocks of a window take. `last` is of this rank's tokens where each has its part of them.
    """

    line: line.Line
    tensors: dict[int, block.LineTensors]
    kept: list[block.Kept]
    last: Tensor
    hidden: Tensor


class Decoder:
    """Weights on the device and the way through them; tuned ones in float32 under canonical names in `tuned`."""

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime, kernels: ops.Kernels):
        rope.check(spec)
        self.spec = spec
        self.mesh = distributed.mesh()
        self.own = _own(spec, self.mesh.tensor)
        self.vocabulary = vocabulary.own(spec, self.mesh)
        self.reduce = distributed.reduce if self.mesh.tensor > 1 else None
        # What all ranks of a model give of one tensor of tokens, and this rank's tokens of all.
        is_cut = self.mesh.is_sequence_cut
        self.leave = distributed.scatter if is_cut else self.reduce or _as_it_is
        self.enter = distributed.gather if is_cut else _as_it_is
        self.runtime = runtime
        self.kernels = kernels
        self.scaling = tuning.lora.alpha / tuning.lora.rank if tuning.lora else 0.0
        self.dropout = tuning.lora.dropout if tuning.lora else 0.0
        # Plain tensors, because MindSpore compiles a function anew for every Parameter it is called with.
        self.tuned: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}
        self.tuned_names: dict[str, str] = {}
        names.check_modules(tuning.lora.modules if tuning.lora else (), spec)
        self.hidden_dtype = ops.dtype(names.hidden_dtype(spec.embedding in tuning.parameters, runtime.precision))
        tuning = stages.own_tuning(tuning, spec, self.mesh)
        tuned, source = set(tuning.parameters), slices.SlicedSource(source, self.mesh)
        for name in stages.own(tensor_shapes(spec), spec, self.mesh):
            self._place(name, source.read(name), name if name in tuned else None)
        if tuning.lora:
            self._add_lora(tuning.lora)
        self.layers = [self._layer(number) for number in stages.layers(spec, self.mesh)]
        self.windows = [spec.windows[number] for number in stages.layers(spec, self.mesh)]
        self.entrance, self.norm = outside.Entrance(self), outside.Norm(self, spec.outside.norm)
        self.cached_blocks = (CachedStates if spec.state_space else CachedBlocks)(self, self._numbers(0.0, True))
        self.dropout_keys: np.ndarray | None = None
        self.adapter = True
        self.balance: Balance | None = None

    @contextmanager
    def counting(self, balance: Balance):
        """Let layers with experts count for a balance loss, and take its slope on their way back, inside."""
        self.balance = balance
        try:
            yield balance
        finally:
            self.balance = None

    @contextmanager
    def mode(self, dropout_keys: np.ndarray | None, adapter: bool):
        """Set what holds inside: dropout by token keys (int32 [rows, length]; None = none), adapters on or off."""
        self.dropout_keys = dropout_keys if self.dropout > 0 else None
        self.adapter = adapter
        try:
            yield
        finally:
            self.dropout_keys, self.adapter = None, True

    def forward(
        self,
        input_ids: np.ndarray,
        position_ids: np.ndarray,
        segment_ids: np.ndarray,
        keep: bool = False,
        is_shared: bool = False,
        taken: Tensor | None = None,
    ) -> Trace:
        """Take the tokens of int32 [rows, length] arrays through all blocks; `keep` what `backward` needs.

        Attention is causal and stays within a segment. Of rows that are shared this rank computes its part. A later
        stage of a pipeline goes on with the hidden states that it has `taken`.
        """
        found, tensors = self._line(input_ids, position_ids, segment_ids, is_shared=is_shared)
        hidden, all_kept = self.entrance.forward(found) if taken is None else taken, []
        for apply, names_of_layer, window in self.blocks():
            hidden, kept = apply.forward(hidden, tensors[window], [*map(self.parameter, names_of_layer)])
            if keep:
                all_kept.append(kept)
        if not self.mesh.is_last_stage:
            return Trace(found, tensors, all_kept, hidden, hidden)
        return Trace(found, tensors, all_kept, hidden, self.enter(self.norm.forward(hidden)))

    def backward(self, gradient: Tensor, trace: Trace) -> tuple[dict[str, Tensor], Tensor]:
        """Return the gradients of the tuned tensors but the head, by canonical name, for that of `trace.hidden`.

        With them goes that of the hidden states before the first block. Of a model that is cut, each rank gives its
        share of the last ones' gradient. It empties `trace.kept`, whose tensors are large, on its way.
        """
        found, flats = {}, []
        if self.mesh.is_last_stage:
            gradient, found = self.norm.backward(self.leave(gradient), trace.last)
        for apply, names_of_layer, window in reversed([*self.blocks()]):
            tensors = [*map(self.parameter, names_of_layer)]
            gradient, parts = apply.backward(gradient, trace.kept.pop(), trace.tensors[window], tensors)
            flats += [(flat, [self.tuned_names[names_of_layer[at]] for at in places]) for places, flat in parts]
        if self.mesh.stage == 0:
            found |= self.entrance.backward(gradient, trace.line)
        # At the end, because these operators do not wait for what is computed before them.
        while flats:
            for name, part in self._parts_of(*flats.pop()).items():
                found[name] = found[name] + part if name in found else part
        return found, gradient

    def hidden_shape(self, segment_ids: np.ndarray, is_shared: bool) -> tuple[int, ...]:
        """Return the shape of the hidden states of this rank's tokens between two layers."""
        most = context.part(segment_ids, self.mesh.context if is_shared else 1).most
        own = self.mesh.own_tokens(line.length(most, self.mesh.tensor if self.mesh.is_sequence_cut else 1))
        return own.stop - own.start, self.spec.hidden_size

    def states(
        self, input_ids: np.ndarray, position_ids: np.ndarray, segment_ids: np.ndarray
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the output of the embedding, of each block and of the last norm, as `by_position`."""
        found, tensors = self._line(input_ids, position_ids, segment_ids)
        hidden, around = self.entrance.forward(found), self.spec.outside
        yield around.embedding, by_position(self.enter(hidden), found, segment_ids)
        for number, (apply, names_of_layer, window) in enumerate(self.blocks()):
            hidden, _ = apply.forward(hidden, tensors[window], [*map(self.parameter, names_of_layer)])
            yield self.spec.layer(number).removesuffix("."), by_position(self.enter(hidden), found, segment_ids)
        yield around.norm, by_position(self.enter(self.norm.forward(hidden)), found, segment_ids)

    def head_weight(self) -> Tensor:
        """Return the matrix that `head` takes, [vocabulary, hidden] in the compute dtype: one copy for many calls."""
        weight = self.parameter(self.spec.head)
        if self.spec.is_head_normed:
            weight = _normed_rows(weight)
        return weight.astype(ops.dtype(self.runtime.precision.compute))

    def head_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the head's tensor for that of what `head` takes."""
        return _rows_gradient(self.parameter(self.spec.head), gradient) if self.spec.is_head_normed else gradient

    def head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return the logits, float32 [..., vocabulary], or this rank's of them."""
        return _project(hidden, weight, self.spec.head_cap or 0.0)

    def parameter(self, name: str) -> Tensor:
        """Return a tensor by its name in the model, tuned or frozen; a tied head is the embedding."""
        if name == self.spec.head and self.spec.tie_word_embeddings:
            name = self.spec.embedding
        return self.tuned[self.tuned_names[name]] if name in self.tuned_names else self.frozen[name]

    def is_head_tied(self) -> bool:
        """Whether head and embedding are one tensor, which this rank has."""
        is_here = self.spec.embedding in self.frozen or self.spec.embedding in self.tuned_names
        is_tied = self.spec.tie_word_embeddings and is_here
        return is_tied and self.parameter(self.spec.head) is self.parameter(self.spec.embedding)

    def rotate(self, hidden: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """Apply the rotary embedding to float32 [rows, heads, length, head_dim] at int32 [rows, length]."""
        rows, heads, length, dim = hidden.shape
        tables = (np.tile(table, (1, heads, 1)).reshape(-1, dim) for table in rope.tables(self.spec, position_ids))
        cosine, sine = ops.rotary_tables(self.spec, *tables)
        features = cosine.shape[1]
        turned = np.tile(hidden.reshape(-1, dim), (1, features // dim))
        turned = ops.to_numpy(self.kernels.rotary(self.tensor(turned), cosine, sine))
        return turned[:, :dim].reshape(hidden.shape)

    def tensor(self, array: np.ndarray) -> Tensor:
        """Return an array on the device, dtype kept."""
        return Tensor(np.ascontiguousarray(array))

    def _line(self, *arrays: np.ndarray, is_shared: bool = False) -> tuple[line.Line, dict[int, block.LineTensors]]:
        """A line, and what the blocks of each window take of it."""
        positions.check(self.spec, arrays[1])
        ranks = (self.mesh.context, self.mesh.context_rank) if is_shared else (1, 0)
        parts = self.mesh.tensor if self.mesh.is_sequence_cut else 1
        contexts = prefix.contexts(self.spec, arrays[0], arrays[2])
        found = line.line(*arrays, *ranks, parts, contexts)
        keys = np.zeros(1, np.int32) if self.dropout_keys is None else found.fill(self.dropout_keys)
        turned = prefix.positions(self.spec, *arrays)
        own = np.stack([found.fill(each) for each in turned]) if self.spec.prefix else found.position_ids
        shared = *self._rotary(own, *arrays[1:]), self.tensor(keys)
        routing = experts.Routing(len(found.places), self.balance)
        longest, tensors = max(found.pieces[:, 3] - found.pieces[:, 2], default=0), {}
        for window in sorted(set(self.windows)):
            # What no example is longer than is no window.
            needed = window if window < longest else 0
            if needed != window and needed in tensors:
                tensors[window] = tensors[needed]
                continue
            if self.spec.state_space:
                mixer = state_space.Scan(self.spec.state_space)
            else:
                mixer = ops.line_attention(self.own, self.runtime, is_shared, needed)
            tensors[window] = block.LineTensors(*shared, mixer, mixer.plan(found), routing)
        return found, tensors

    def _parts_of(self, flat: Tensor, tuned: list[str]) -> dict[str, Tensor]:
        """A flat tensor of gradients as tensors of the tuned tensors' shapes."""
        if len(tuned) == 1:
            return {tuned[0]: flat.reshape(self.tuned[tuned[0]].shape)}
        ends = np.cumsum([self.tuned[name].size for name in tuned]).tolist()
        shapes = {name: self.tuned[name].shape for name in tuned}
        parts = [flat[end - self.tuned[name].size : end] for name, end in zip(tuned, ends, strict=True)]
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def blocks(self):
        """Yield each layer's compiled block, the names of its tensors, and its window."""
        for (layout, names_of_layer), window in zip(self.layers, self.windows, strict=True):
            yield self._block(layout), names_of_layer, window

    def _rotary(self, own: np.ndarray, position_ids: np.ndarray, segment_ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """The rotary tables for a line's positions [tokens], as long as the batch's longest example wants them."""
        if self.spec.state_space:
            return (self.tensor(np.zeros(1, np.float32)),) * 2
        longest = int(position_ids.max(initial=0, where=segment_ids != 0)) + 1
        cosine, sine = rope.tables(self.spec, own[..., None, :], longest)
        return ops.rotary_tables(self.own, cosine[0], sine[0])

    def _place(self, name: str, array: np.ndarray, tuned_as: str | None) -> None:
        if tuned_as:
            self.tuned_names[name] = tuned_as
            self.tuned[tuned_as] = ops.from_numpy(array, self.runtime.device, "float32")
        else:
            self.frozen[name] = ops.from_numpy(array, self.runtime.device, self.runtime.precision.parameters)

    def _add_lora(self, lora: Lora) -> None:
        for module in lora.modules:
            rows, columns = self.parameter(f"{module}.weight").shape[:: -1 if self.spec.block.is_transposed else 1]
            name_a, name_b = peft_names(module)
            first, keys = slices.adapter_start(module, columns, lora, self.runtime.seed, self.mesh)
            self._place(f"{module}.lora_A.weight", first, name_a)
            self._place(f"{module}.lora_B.weight", np.zeros((rows, lora.rank), dtype=np.float32), name_b)
            self.frozen[f"{module}.features"] = self.tensor(keys)

    def _layer(self, number: int) -> tuple[tuple[tuple[str, bool], ...], list[str]]:
        """A layer's layout, (name within the layer, tuned or not) for each tensor, and the tensors' whole names."""
        return self._layout(self.spec.layer(number))

    def _layout(self, prefix: str) -> tuple[tuple[tuple[str, bool], ...], list[str]]:
        own = [name for name in (*self.frozen, *self.tuned_names) if name.startswith(prefix)]
        return tuple((name.removeprefix(prefix), name in self.tuned_names) for name in own), own

    def _block(self, layout) -> block.Block:
        numbers = self._numbers(self.dropout if self.dropout_keys is not None else 0.0, self.adapter)
        if self.spec.state_space:
            return state_block.StateBlock(state_block.functions(numbers, layout), self.runtime.recompute)
        kind, read = (sequence.SequenceBlock, sequence) if self.mesh.is_sequence_cut else (block.Block, block)
        if self.spec.block.residual:
            functions = sequence.functions(numbers, layout)
            return deep_norm.DeepNormBlock(functions, self.runtime.recompute, self.spec.block.residual)
        return kind(read.functions(numbers, layout), self.runtime.recompute, self.reduce)

    def _numbers(self, dropout: float, adapter: bool) -> Numbers:
        own, compute, adds_bias = self.own, self.runtime.precision.compute, self.mesh.tensor_rank == 0
        heads = own.num_attention_heads, own.num_key_value_heads, own.head_dim
        form = Form(own.block, attention.Scores.of(own), own.experts)
        if own.state_space:
            form = state_block.Form(own.block, own.state_space, own.norm_eps)
        turned = bool(own.rotary_dim)
        return Numbers(self.kernels, form, *heads, compute, self.scaling, dropout, adapter, turned, adds_bias)


def _own(spec: ModelSpec, tensor: int) -> ModelSpec:
    """What one of the ranks of a model has of its heads."""
    heads, kv_heads = spec.num_attention_heads // tensor, spec.num_key_value_heads // tensor
    return replace(spec, num_attention_heads=heads, num_key_value_heads=kv_heads)


def by_position(values: Tensor, found: line.Line, segment_ids: np.ndarray) -> np.ndarray:
    """Return a line's values [length, n] where its tokens are in the batch, float32 [rows, length, n], else 0."""
    placed = np.zeros((segment_ids.size, values.shape[1]), np.float32)
    placed[found.places] = ops.to_numpy(values)[: len(found.places)]
    return placed.reshape(*segment_ids.shape, -1)


def _as_it_is(values: Tensor) -> Tensor:
    return values


@mindspore.jit
def _normed_rows(weight):
    return weight / _lengths(weight)


@mindspore.jit
def _rows_gradient(weight, gradient):
    normed = weight / _lengths(weight)
    return (gradient - normed * (gradient * normed).sum(-1, keepdims=True)) / _lengths(weight)


def _lengths(weight):
    return operators.sqrt(operators.square(weight).sum(-1, keepdims=True))


@mindspore.jit
def _project(hidden, weight, cap):
    return attention.capped(ops.linear(hidden.astype(weight.dtype), weight).astype(mindspore.float32), cap)
