"""A transformers decoder with peft's LoRA, filled from any weight source."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from msft.backend import names, random
from msft.backend.contract import Lora, Runtime, Tuning
from msft.backend.torch import ops
from msft.models import rope
from msft.models.adapters import peft_names
from msft.models.families import family
from msft.models.spec import ModelSpec


class CounterDropout(nn.Module):
    """Dropout whose mask is a function of counters; `tokens` (int32 [rows, length]) is set for each batch."""

    def __init__(self, module: str, features: int, probability: float):
        super().__init__()
        self.probability = probability
        self.tokens: torch.Tensor | None = None
        self.features = nn.Buffer(torch.from_numpy(random.feature_keys(module, features)), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.tokens is None:
            return hidden
        return ops.dropout(hidden, self.tokens, self.features, self.probability)


class Decoder:
    """Weights on the device and the way through them; tuned ones in float32 under canonical names in `tuned`."""

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime, kernels: ops.Kernels):
        self.spec = spec
        self.runtime = runtime
        self.network = _load(spec, source, tuning, runtime, kernels)
        self.frequencies: np.ndarray | None = None
        self.tuned: dict[str, nn.Parameter] = {
            name: self.network.get_parameter(name).requires_grad_() for name in tuning.parameters
        }
        self.adapted = None
        if tuning.lora:
            names.check_modules(tuning.lora.modules, spec)
            self.adapted = _add_lora(self.network, tuning.lora, runtime)
            for module in tuning.lora.modules:
                layer = self.network.get_submodule(module)
                for name, factor in zip(peft_names(module), (layer.lora_A, layer.lora_B), strict=True):
                    self.tuned[name] = factor["default"].weight
        self.dropouts = [part for part in self.network.modules() if isinstance(part, CounterDropout)]
        if runtime.recompute:
            self.network.activation_checkpointing_enable({"use_reentrant": False})

    @contextmanager
    def mode(self, dropout_keys: np.ndarray | None, adapter: bool):
        """Set what holds inside: dropout by token keys (int32 [rows, length]; None = none), adapters on or off."""
        keys = None if dropout_keys is None else self.tensor(dropout_keys)
        for dropout in self.dropouts:
            dropout.tokens = keys
        # transformers recomputes in training mode only, where it also drops a key-value cache.
        self.network.train(self.runtime.recompute and torch.is_grad_enabled())
        try:
            with nullcontext() if adapter else self.adapted.disable_adapter():
                yield
        finally:
            for dropout in self.dropouts:
                dropout.tokens = None

    def hidden(self, input_ids: np.ndarray, position_ids: np.ndarray, segment_ids: np.ndarray) -> torch.Tensor:
        """Return the final hidden states [rows, length, hidden] of int32 [rows, length] arrays.

        Attention is causal and stays within a segment; padding (segment 0) sees padding.
        """
        self._set_frequencies(position_ids)
        segments = self.tensor(segment_ids)
        length = segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        allowed = causal & (segments[:, :, None] == segments[:, None, :])
        with self._autocast():
            return self.network.model(
                input_ids=self.tensor(input_ids),
                position_ids=self.tensor(position_ids),
                attention_mask=allowed.unsqueeze(1),
                use_cache=False,
            ).last_hidden_state

    def states(
        self, input_ids: np.ndarray, position_ids: np.ndarray, segment_ids: np.ndarray
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the output of the embedding, of each block and of the last norm."""
        model, seen = self.network.model, {}
        parts = {"model.embed_tokens": model.embed_tokens, "model.norm": model.norm}
        parts |= {f"model.layers.{number}": layer for number, layer in enumerate(model.layers)}
        hooks = [
            part.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
            for name, part in parts.items()
        ]
        try:
            self.hidden(input_ids, position_ids, segment_ids)
        finally:
            for hook in hooks:
                hook.remove()
        for name, output in seen.items():
            yield name, output[0] if isinstance(output, tuple) else output

    def cached_hidden(self, input_ids: np.ndarray, position_ids: np.ndarray, real: torch.Tensor, cache) -> torch.Tensor:
        """Return the last position's hidden states [rows, hidden], the keys and values before it being in `cache`.

        `real` int64 [rows, keys] is 0 on left padding.
        """
        self._set_frequencies(position_ids)
        with self._autocast():
            return self.network.model(
                input_ids=self.tensor(input_ids),
                position_ids=self.tensor(position_ids),
                attention_mask=real,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]

    def head_weight(self) -> torch.Tensor:
        """Return the matrix that `head` takes, [vocabulary, hidden] in the compute dtype: one copy for many calls."""
        return self.network.lm_head.weight.to(ops.dtype(self.runtime.precision.compute))

    def head(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 [..., vocabulary]."""
        return functional.linear(hidden.to(weight.dtype), weight).float()

    def parameter(self, name: str) -> torch.Tensor:
        """Return a tensor by its name in the model, tuned or frozen; a tied head is the embedding."""
        return self.network.get_parameter(name)

    def is_head_tied(self) -> bool:
        """Whether head and embedding are one tensor."""
        return self.network.lm_head.weight is self.network.model.embed_tokens.weight

    @torch.no_grad()
    def rotate(self, hidden: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """Apply the rotary embedding to float32 [rows, heads, length, head_dim] at int32 [rows, length]."""
        self._set_frequencies(position_ids)
        tensor = self.tensor(hidden)
        cosine, sine = self.network.model.rotary_emb(tensor, self.tensor(position_ids))
        # The function of the family's own module, which is what the network calls.
        turn = sys.modules[type(self.network).__module__].apply_rotary_pos_emb
        return ops.to_numpy(turn(tensor, tensor, cosine, sine)[0])

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Return an array on the device, dtype kept."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.runtime.device)

    def _set_frequencies(self, position_ids: np.ndarray) -> None:
        """Make the rotary frequencies those of this batch, whatever batches were before (the dynamic kind's vary)."""
        inverse, _ = rope.frequencies(self.spec, int(position_ids.max()) + 1)
        if not np.array_equal(inverse, self.frequencies):
            self.network.model.rotary_emb.inv_freq.copy_(torch.from_numpy(inverse))
            self.frequencies = inverse

    def _autocast(self):
        compute = self.runtime.precision.compute
        return torch.autocast(self.runtime.device, ops.dtype(compute), enabled=compute != "float32")


def _load(spec: ModelSpec, source, tuning: Tuning, runtime: Runtime, kernels: ops.Kernels) -> nn.Module:
    rope.check(spec)
    # Dropout is the adapters' own alone.
    config = AutoConfig.for_model(**{**spec.hf_config, "attention_dropout": 0.0, "return_dict": True})
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, attn_implementation=kernels.attention)
    tuned, precision = set(tuning.parameters), runtime.precision
    for name in family(spec.family).tensor_shapes(spec):
        kind = "float32" if name in tuned else precision.parameters
        tensor = ops.from_numpy(source.read(name), runtime.device, kind)
        # autocast does not widen, and keeps a copy of each weight that it narrows until the backward pass.
        tensor = tensor.to(ops.dtype(names.computed_dtype(name, name in tuned, precision)))
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    network.tie_weights()
    _rebuild_rotary(network, config, runtime.device)
    # transformers zeroes the gradient of the padding row, which is a real token where pad = eos.
    network.model.embed_tokens.padding_idx = None
    return network


def _rebuild_rotary(network: nn.Module, config, device: str) -> None:
    """Buffers built under the meta device hold no numbers; each batch sets the frequencies of `models/rope.py`."""
    rotary = type(network.model.rotary_emb)(config).to(device)
    rotary.rope_type = "default"
    network.model.rotary_emb = rotary


def _add_lora(network: nn.Module, lora: Lora, runtime: Runtime):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.modules),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    tuned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    adapted = get_peft_model(network, config)
    for parameter in tuned:
        parameter.requires_grad_()
    for module in lora.modules:
        layer = network.get_submodule(module)
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        drawn = random.lora_a(runtime.seed, module, lora.rank, layer.in_features)
        a.weight = nn.Parameter(torch.from_numpy(drawn).to(runtime.device))
        b.weight = nn.Parameter(torch.zeros(layer.out_features, lora.rank, device=runtime.device))
        if lora.dropout:
            dropout = CounterDropout(module, layer.in_features, lora.dropout)
            layer.lora_dropout["default"] = dropout.to(runtime.device)
    return adapted
