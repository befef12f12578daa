"""msft's own decoder: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, LoRA, one compiled block a layer.

A block is a pure function of tensors, compiled once and called with each layer's weights, so that compiling takes
seconds whatever the depth (a graph of all 30 layers of a 135M model: 50 s to compile, 1.6 x the time a step, 2 x the
memory). MindSpore differentiates through the compiled blocks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import names, random
from msft.backend.contract import Lora, Runtime, Tuning
from msft.backend.mindspore import block, ops
from msft.backend.mindspore.cached_block import CachedBlocks
from msft.models import rope
from msft.models.adapters import peft_names
from msft.models.families import family
from msft.models.spec import ModelSpec


class Decoder:
    """Weights on the device and the way through them; tuned ones in float32 under canonical names in `tuned`."""

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime, kernels: ops.Kernels):
        rope.check(spec)
        self.spec = spec
        self.runtime = runtime
        self.kernels = kernels
        self.scaling = tuning.lora.alpha / tuning.lora.rank if tuning.lora else 0.0
        self.dropout = tuning.lora.dropout if tuning.lora else 0.0
        # Plain tensors, because MindSpore compiles a function anew for every Parameter it is called with.
        self.tuned: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}
        self.tuned_names: dict[str, str] = {}
        tuned = set(tuning.parameters)
        for name in family(spec.family).tensor_shapes(spec):
            self._place(name, source.read(name), name if name in tuned else None)
        if tuning.lora:
            names.check_modules(tuning.lora.modules, spec)
            self._add_lora(tuning.lora)
        self.layers = [self._layer(number) for number in range(spec.num_hidden_layers)]
        self.block = cache(self._block)
        self.cached_blocks = CachedBlocks(self)
        self.embed = mindspore.jit(_embed)
        self.norm = mindspore.jit(_norm(kernels, spec.rms_norm_eps))
        self.project = mindspore.jit(_project)
        self.dropout_tokens: Tensor | None = None
        self.adapter = True

    @contextmanager
    def mode(self, dropout_keys: np.ndarray | None, adapter: bool):
        """Set what holds inside: dropout by token keys (int32 [rows, length]; None = none), adapters on or off."""
        wanted = dropout_keys is not None and self.dropout > 0
        self.dropout_tokens = self.tensor(dropout_keys) if wanted else None
        self.adapter = adapter
        try:
            yield
        finally:
            self.dropout_tokens, self.adapter = None, True

    def hidden(self, input_ids: np.ndarray, position_ids: np.ndarray, segment_ids: np.ndarray) -> Tensor:
        """Return the final hidden states [rows, length, hidden] of int32 [rows, length] arrays, 0 on padding.

        Attention is causal and stays within a segment.
        """
        *_, (_, hidden) = self.states(input_ids, position_ids, segment_ids)
        return operators.where(self.tensor(segment_ids != 0).expand_dims(-1), hidden, operators.zeros_like(hidden))

    def states(
        self, input_ids: np.ndarray, position_ids: np.ndarray, segment_ids: np.ndarray
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the output of the embedding, of each block and of the last norm."""
        length = input_ids.shape[1]
        causal = np.tril(np.ones((length, length), dtype=bool))
        allowed = self.tensor(causal & (segment_ids[:, :, None] == segment_ids[:, None, :]))
        cosine, sine = self._rotary(position_ids)
        tokens = self.tensor(np.zeros((1, 1), np.int32)) if self.dropout_tokens is None else self.dropout_tokens
        hidden = self.embed(self.parameter("model.embed_tokens.weight"), self.tensor(input_ids))
        yield "model.embed_tokens", hidden
        for number, (layout, names_of_layer) in enumerate(self.layers):
            apply = self.block(layout, self.dropout_tokens is not None, self.adapter)
            hidden = apply(hidden, cosine, sine, allowed, tokens, *map(self.parameter, names_of_layer))
            yield f"model.layers.{number}", hidden
        yield "model.norm", self.norm(hidden, self.parameter("model.norm.weight"))

    def head_weight(self) -> Tensor:
        """Return the matrix that `head` takes, [vocabulary, hidden] in the compute dtype: one copy for many calls."""
        return self.parameter(names.HEAD).astype(ops.dtype(self.runtime.precision.compute))

    def head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return the logits, float32 [..., vocabulary]."""
        return self.project(hidden, weight)

    def parameter(self, name: str) -> Tensor:
        """Return a tensor by its name in the model, tuned or frozen; a tied head is the embedding."""
        if name == names.HEAD and self.spec.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        return self.tuned[self.tuned_names[name]] if name in self.tuned_names else self.frozen[name]

    def is_head_tied(self) -> bool:
        """Whether head and embedding are one tensor."""
        return self.parameter(names.HEAD) is self.parameter("model.embed_tokens.weight")

    def rotate(self, hidden: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """Apply the rotary embedding to float32 [rows, heads, length, head_dim] at int32 [rows, length]."""
        return ops.to_numpy(self.kernels.rotary(self.tensor(hidden), *self._rotary(position_ids)))

    def tensor(self, array: np.ndarray) -> Tensor:
        """Return an array on the device, dtype kept."""
        return Tensor(np.ascontiguousarray(array))

    def _rotary(self, position_ids: np.ndarray) -> tuple[Tensor, Tensor]:
        cosine, sine = rope.tables(self.spec, position_ids)
        return self.tensor(cosine[:, None]), self.tensor(sine[:, None])

    def _place(self, name: str, array: np.ndarray, tuned_as: str | None) -> None:
        if tuned_as:
            self.tuned_names[name] = tuned_as
            self.tuned[tuned_as] = ops.from_numpy(array, self.runtime.device, "float32")
        else:
            self.frozen[name] = ops.from_numpy(array, self.runtime.device, self.runtime.precision.parameters)

    def _add_lora(self, lora: Lora) -> None:
        for module in lora.modules:
            rows, columns = self.parameter(f"{module}.weight").shape
            name_a, name_b = peft_names(module)
            self._place(f"{module}.lora_A.weight", random.lora_a(self.runtime.seed, module, lora.rank, columns), name_a)
            self._place(f"{module}.lora_B.weight", np.zeros((rows, lora.rank), dtype=np.float32), name_b)
            self.frozen[f"{module}.features"] = self.tensor(random.feature_keys(module, columns))

    def _layer(self, number: int) -> tuple[tuple[tuple[str, bool], ...], list[str]]:
        """A layer's layout, (name within the layer, tuned or not) for each tensor, and the tensors' whole names."""
        prefix = f"model.layers.{number}."
        own = [name for name in (*self.frozen, *self.tuned_names) if name.startswith(prefix)]
        return tuple((name.removeprefix(prefix), name in self.tuned_names) for name in own), own

    def _block(self, layout, dropout: bool, adapter: bool):
        """The compiled block of layers of one layout, recomputed in the backward pass where the runtime asks."""
        function = block.whole(self, layout, self.dropout if dropout else 0.0, adapter)
        if not self.runtime.recompute:
            return mindspore.jit(function)
        # Arguments before a layer's own tensors: hidden, cosine, sine, allowed, tokens.
        tuned = tuple(5 + position for position, (_, is_tuned) in enumerate(layout) if is_tuned)
        return ops.recomputed(function, (0, *tuned))


def _embed(table, input_ids):
    return operators.gather(table, input_ids, 0)


def _norm(kernels: ops.Kernels, eps: float):
    def norm(hidden, weight):
        return kernels.rms_norm(hidden, weight, eps)

    return norm


def _project(hidden, weight):
    return ops.linear(hidden.astype(weight.dtype), weight).astype(mindspore.float32)
