"""A transformers decoder with peft's LoRA, and the way through it."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from msft.backend import context, names, positions, prefix, slices, stages
from msft.backend.contract import Runtime, Tuning
from msft.backend.mesh import Mesh
from msft.backend.routing import Balance
from msft.backend.segments import places
from msft.backend.torch import (
    attention,
    block,
    distributed,
    experts,
    lora,
    network,
    ops,
    placed,
    replaced,
    sequence,
    sharding,
    vocabulary,
    warm_up,
    zero_parts,
)
from msft.models import alibi, rope
from msft.models.adapters import peft_names
from msft.models.shapes import linear_modules, tensor_shapes
from msft.models.spec import ModelSpec


class Decoder:
    """Weights on the device and the way through them; tuned ones in float32 under canonical names in `tuned`."""

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime, kernels: ops.Kernels):
        self.spec = spec
        self.runtime = runtime
        self.mesh = distributed.mesh()
        self.vocabulary = vocabulary.own(spec, self.mesh)
        self.parts = sequence.cut_parts(kernels.parts, self.mesh, runtime.recompute)
        self.is_sharded = self.mesh.shards(runtime.strategy)
        self.is_fsdp = self.is_sharded and runtime.strategy == "fsdp"
        whole, source = source, slices.SlicedSource(source, self.mesh)
        names.check_modules(tuning.lora.modules if tuning.lora else (), spec)
        self.hidden_dtype = ops.dtype(names.hidden_dtype(spec.embedding in tuning.parameters, runtime.precision))
        tuning = stages.own_tuning(tuning, spec, self.mesh)
        # What makes a frozen parameter of a whole tensor that was read; FSDP's are read when all is shared out.
        keep = None if self.is_fsdp else functools.partial(nn.Parameter, requires_grad=False)
        if self.is_sharded and zero_parts.partitions_weights(runtime):
            keep = zero_parts.Partitioner(runtime)
        self.network = network.load(spec, source, tuning, runtime, self.parts, keep)
        # The part from tokens to the last norm, and what is called for it.
        self.trunk = self.body = self.network.base_model
        self.embedding = self.network.get_submodule(spec.outside.embedding)
        if self.mesh.tensor > 1 or spec.embedding_scale != 1:
            self.embedding.forward = self._embedded
        slopes = alibi.slopes(spec.num_attention_heads) if spec.has_alibi else ()
        self.scores = attention.Scores(spec.attention_cap or 0.0, slopes)
        self._fit_modules()
        self.frequencies: np.ndarray | None = None
        for name in tuning.parameters:
            self.network.get_parameter(name).requires_grad_()
        self.attention = kernels.attention
        self.adapted = None
        self.adapted_layers: list[nn.Module] = []
        if tuning.lora:
            self.adapted = lora.add(self.network, tuning.lora, runtime, self.mesh, keep)
            self.adapted_layers = [self.network.get_submodule(module) for module in tuning.lora.modules]
        if self.is_fsdp:
            self.trunk = sharding.shard(self.network, self.network.get_submodule(spec.outside.layers), runtime.device)
            self._fill(whole, tuning)
        self.tuned: dict[str, nn.Parameter] = {name: self.network.get_parameter(name) for name in tuning.parameters}
        for module, layer in zip(tuning.lora.modules if tuning.lora else (), self.adapted_layers, strict=True):
            for name, factor in zip(peft_names(module), (layer.lora_A, layer.lora_B), strict=True):
                self.tuned[name] = factor["default"].weight
        self.dropout_keys: np.ndarray | None = None
        self.takes_parts = replaced.takes_parts(self.network)
        self.compile_seconds = warm_up.compile_parts(self) if runtime.compile and self.takes_parts else 0.0
        if runtime.recompute:
            self.network.activation_checkpointing_enable({"use_reentrant": False})

    def _fill(self, source, tuning: Tuning) -> None:
        """Read the weights of a model that FSDP shares out, one whole tensor at a time."""
        for name in tensor_shapes(self.spec):
            whole = network.read(self.spec, source, name, name in tuning.parameters, self.runtime)
            sharding.keep(self.network.get_parameter(name), whole)
        for module, layer in zip(tuning.lora.modules if tuning.lora else (), self.adapted_layers, strict=True):
            parts = [factor["default"].weight for factor in (layer.lora_A, layer.lora_B)]
            sizes = parts[0].shape[1], parts[1].shape[0]
            factors = lora.first_values(module, *sizes, tuning.lora, self.runtime, Mesh())
            for part, factor in zip(parts, factors, strict=True):
                sharding.keep(part, factor)

    def _fit_modules(self) -> None:
        """Tell the linear modules what they are cut to, and which rank adds a bias that all of a model's have."""
        for module in stages.own(linear_modules(self.spec), self.spec, self.mesh):
            part = self.network.get_submodule(module)
            part.is_transposed = self.spec.block.is_transposed
            sizes = zero_parts.whole_shape(part.weight)
            part.out_features, part.in_features = sizes[::-1] if part.is_transposed else sizes
            part.adds_bias = slices.module_axis(module) == 0 or self.mesh.tensor_rank == 0

    @contextmanager
    def counting(self, balance: Balance):
        """Let layers with experts count for a balance loss, and take its slope on their way back, inside."""
        experts.count(self.network, self.spec, balance)
        try:
            yield balance
        finally:
            experts.count(self.network, self.spec, None)

    @contextmanager
    def mode(self, dropout_keys: np.ndarray | None, adapter: bool):
        """Set what holds inside: dropout by token keys (int32 [rows, length]; None = none), adapters on or off."""
        self.dropout_keys = dropout_keys
        # transformers recomputes in training mode only, where it also drops a key-value cache.
        training = self.runtime.recompute and torch.is_grad_enabled()
        if self.network.training != training:
            self.network.train(training)
        try:
            with nullcontext() if adapter or self.adapted is None else self.adapted.disable_adapter():
                yield
        finally:
            self.dropout_keys = None
            self._set_dropout(None)
            if self.is_fsdp:
                sharding.free(self.network)

    def hidden(
        self,
        input_ids: np.ndarray,
        position_ids: np.ndarray,
        segment_ids: np.ndarray,
        is_shared: bool = False,
        taken: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the final hidden states [rows, length, hidden] of int32 [rows, length] arrays, 0 on padding.

        Real tokens alone are computed, in one line of tokens; attention is causal and stays within a segment. Of rows
        that are shared those of other ranks are 0 too. On the ranks of a model that is cut, gradients of them are
        shares. The last stage of a pipeline goes on with what it has `taken` of the one before.
        """
        part = self._part(segment_ids, is_shared)
        if len(part.places):
            self._set_frequencies(position_ids, segment_ids)
            states = self.parts.enter(self._line(input_ids, position_ids, part, is_shared, taken))
            return self._padded(states, part.places, segment_ids.shape)
        if not (self.is_sharded or is_shared):
            return torch.zeros(*segment_ids.shape, self.spec.hidden_size, device=self.runtime.device)
        states = self.parts.enter(self.through(input_ids, position_ids, segment_ids, is_shared, taken))
        return (states[:, :1] * 0).expand(*segment_ids.shape, -1)

    def through(
        self,
        input_ids: np.ndarray,
        position_ids: np.ndarray,
        segment_ids: np.ndarray,
        is_shared: bool,
        taken: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the hidden states [1, tokens, hidden] behind the layers of this rank's stage, without padding.

        `taken` are those before them (None: the embeddings).
        """
        part = self._part(segment_ids, is_shared)
        self._set_frequencies(position_ids, segment_ids)
        if len(part.places):
            return self._line(input_ids, position_ids, part, is_shared, taken)
        # The other ranks have tokens, and need this one to gather the weights, or keys and values.
        return self._line(input_ids * 0, position_ids, part.stand_in(), is_shared and part.most > 0, taken)

    def hidden_shape(self, segment_ids: np.ndarray, is_shared: bool) -> tuple[int, ...]:
        """Return the shape of the hidden states of this rank's tokens between two layers."""
        return self.shape_of(int(self._computed(segment_ids, is_shared).pieces[-1, 1]))

    def set_dropout(self, segment_ids: np.ndarray, is_shared: bool) -> None:
        """Count dropout as on a batch's way forward, for blocks that are computed again when others have been."""
        self._count_dropout(self._computed(segment_ids, is_shared))

    def shape_of(self, tokens: int) -> tuple[int, ...]:
        """Return the shape of this rank's hidden states of a line of tokens."""
        own = self.mesh.own_tokens(tokens)
        return 1, own.stop - own.start, self.spec.hidden_size

    def _computed(self, segment_ids: np.ndarray, is_shared: bool) -> context.Part:
        part = self._part(segment_ids, is_shared)
        return self._filled(part if len(part.places) else part.stand_in(), is_shared)

    def _part(self, segment_ids: np.ndarray, is_shared: bool) -> context.Part:
        """What this rank computes of a batch."""
        ranks = (self.mesh.context, self.mesh.context_rank) if is_shared else (1, 0)
        return context.part(segment_ids, *ranks)

    def _filled(self, part: context.Part, is_shared: bool) -> context.Part:
        """A part as long as a multiple of the ranks that have their own."""
        return part.filled(self.mesh.tensor if self.mesh.is_sequence_cut else 1, is_shared)

    def _line(self, input_ids, position_ids, part: context.Part, is_shared=False, taken=None) -> torch.Tensor:
        """The final hidden states [1, tokens, hidden] of a part, this rank's alone where each has its own."""
        positions.check(self.spec, position_ids)
        part = self._filled(part, is_shared)
        own_ids, own_positions = part.take(input_ids), part.take(position_ids)
        if self.spec.state_space:
            self._count_dropout(part)
            found = self.tensor(places(part.pieces, int(part.pieces[-1, 1])))
            return self.run(own_ids, own_positions, found, taken)
        texts = np.repeat(np.arange(len(part.pieces)) + 1, np.diff(part.pieces[:, :2]).ravel())[None]
        contexts = prefix.contexts(self.spec, own_ids, texts)[0, part.pieces[:, 0]]
        segments, attention_of = self._segments(part, contexts), self.attention
        if is_shared:
            # What a block keeps is not kept where it is computed again.
            attention_of = attention.Shared(attention_of, part, not self.runtime.recompute, self.runtime.device)
        self._count_dropout(part)

        def attend(layer, query, key, value, scale):
            return attention_of(query, key, value, segments[self.spec.windows[layer]], scale)

        return self.run(own_ids, prefix.positions(self.spec, own_ids, own_positions, texts), attend, taken)

    def _segments(self, part: context.Part, contexts: np.ndarray) -> dict[int, attention.Segments]:
        """Who sees whom in the layers of each window."""
        return {
            window: attention.Segments(part.pieces, self.runtime.device, self.scores._replace(window=window), contexts)
            for window in set(self.spec.windows)
        }

    def _count_dropout(self, part: context.Part) -> None:
        if self.dropout_keys is not None:
            self._set_dropout(self.tensor(part.take(self.dropout_keys)))

    def _embedded(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The embedding of this rank's tokens among int32 [1, tokens]."""
        table = placed.local(self.embedding)
        if self.vocabulary:
            return self.parts.leave(self.vocabulary.embed(table, input_ids))
        hidden = functional.embedding(input_ids[:, self.mesh.own_tokens(input_ids.shape[1])], table)
        return hidden * self.spec.embedding_scale if self.spec.embedding_scale != 1 else hidden

    def entered(self, input_ids: np.ndarray, position_ids: np.ndarray) -> torch.Tensor:
        """Return the hidden states before the first layer [rows, length, hidden], of a model that is not cut."""
        around = self.spec.outside
        hidden = self.embedding(self.tensor(input_ids))
        if around.positions:
            rows = self.tensor(position_ids + around.first_position)
            hidden = hidden + functional.embedding(rows, self.network.get_submodule(around.positions).weight)
        return self.network.get_submodule(around.embedding_norm)(hidden) if around.embedding_norm else hidden

    def run(self, input_ids: np.ndarray, position_ids: np.ndarray, attend: Callable, taken=None) -> torch.Tensor:
        """Return the hidden states behind the layers [1, tokens, hidden] of a line, int32 [1, tokens]."""
        with self.autocast():
            return self.trunk(
                input_ids=self.tensor(input_ids) if taken is None else None,
                inputs_embeds=taken,
                position_ids=self.tensor(position_ids),
                use_cache=False,
                attend=attend,
            ).last_hidden_state

    def _padded(self, states: torch.Tensor, real: np.ndarray, shape: tuple[int, int]) -> torch.Tensor:
        """States [1, tokens, hidden] in their places, [rows, length, hidden], without what fills the line up."""
        states = states[:, : len(real)]
        if len(real) < shape[0] * shape[1]:
            flat = states.new_zeros(shape[0] * shape[1], states.shape[-1])
            states = flat.index_copy(0, self.tensor(real), states.squeeze(0))
        return states.reshape(*shape, -1)

    def states(
        self, input_ids: np.ndarray, position_ids: np.ndarray, segment_ids: np.ndarray
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the output of the embedding, of each block and of the last norm."""
        seen, part, around = {}, context.part(segment_ids), self.spec.outside
        layers = [self.spec.layer(number).removesuffix(".") for number in range(self.spec.num_hidden_layers)]
        hooks = [
            self.network.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: seen.update({name: output})
            )
            for name in (*layers, around.norm)
        ]
        # Whatever is added to the embedding, the first layer takes it.
        first = self.network.get_submodule(layers[0])
        hooks.append(first.register_forward_pre_hook(lambda _, taken: seen.update({around.embedding: taken[0]})))
        self._set_frequencies(position_ids, segment_ids)
        try:
            self._line(input_ids, position_ids, part)
        finally:
            for hook in hooks:
                hook.remove()
        for name, output in seen.items():
            output = output[0] if isinstance(output, tuple) else output
            whole = distributed.gather(output) if self.mesh.is_sequence_cut else output
            yield name, self._padded(whole, part.places, segment_ids.shape)

    def head_weight(self) -> torch.Tensor:
        """Return the matrix that `head` takes, [vocabulary, hidden] in the compute dtype: one copy for many calls."""
        if self.is_fsdp:
            sharding.gather_head(self.network)
        weight = placed.local(self.network.get_submodule(self.spec.outside.head))
        if self.spec.is_head_normed:
            weight = functional.normalize(weight)
        return weight.to(ops.dtype(self.runtime.precision.compute))

    @torch.no_grad()
    def head_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the head's tensor for that of what `head` takes."""
        if not self.spec.is_head_normed:
            return gradient
        return torch.func.vjp(functional.normalize, self.network.get_parameter(self.spec.head))[1](gradient)[0]

    def head(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 [..., vocabulary], or this rank's of them."""
        rows = hidden.to(weight.dtype).flatten(0, -2)
        logits, cap = block.product(rows, weight).unflatten(0, hidden.shape[:-1]).float(), self.spec.head_cap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def parameter(self, name: str) -> torch.Tensor:
        """Return a tensor by its name in the model, tuned or frozen; a tied head is the embedding.

        With FSDP it is a DTensor, but for the head between `head_weight` and the end of `mode`.
        """
        return self.network.get_parameter(name)

    def is_head_tied(self) -> bool:
        """Whether head and embedding are one tensor."""
        if not stages.is_own(self.spec.embedding, self.spec, self.mesh):
            return self.spec.tie_word_embeddings
        head = self.network.get_submodule(self.spec.outside.head)
        return getattr(head, "weight", None) is self.embedding.weight

    @torch.no_grad()
    def rotate(self, hidden: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """Apply the rotary embedding to float32 [rows, heads, length, head_dim] at int32 [rows, length]."""
        if not self.spec.rotary_dim:
            return hidden
        self._set_frequencies(position_ids, np.ones_like(position_ids))
        tensor = self.tensor(hidden)
        cosine, sine = self.body.rotary_emb(tensor, self.tensor(position_ids))
        # The function of the family's own module, which is what the network calls.
        turn = sys.modules[type(self.body.rotary_emb).__module__].apply_rotary_pos_emb
        return ops.to_numpy(turn(tensor, tensor, cosine, sine)[0])

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Return an array on the device, dtype kept."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.runtime.device)

    def _set_frequencies(self, position_ids: np.ndarray, segment_ids: np.ndarray) -> None:
        """Make the rotary frequencies those of this batch's longest text, whatever batches were before."""
        if not self.spec.rotary_dim:
            return
        inverse, _ = rope.frequencies(self.spec, int(position_ids.max(initial=0, where=segment_ids != 0)) + 1)
        if not np.array_equal(inverse, self.frequencies):
            self.body.rotary_emb.inv_freq.copy_(torch.from_numpy(inverse))
            self.frequencies = inverse

    def _set_dropout(self, keys: torch.Tensor | None) -> None:
        """Set the token keys, int32 [1, tokens], that the adapters' dropout is counted by; None = no dropout."""
        for layer in self.adapted_layers:
            layer.dropout_tokens = keys

    def autocast(self):
        """Return the context in which products are computed in the compute dtype."""
        compute = self.runtime.precision.compute
        return torch.autocast(self.runtime.device, ops.dtype(compute), enabled=compute != "float32")
