"""What takes the place of `forward` in transformers' modules: the mathematics of `block`, with less memory."""

import functools
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

from msft.backend.torch import block, placed
from msft.models.spec import ModelSpec

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def linear(part: nn.Module, compute: torch.dtype, hidden: torch.Tensor) -> torch.Tensor:
    """Return what a linear module gives for hidden states, in the compute dtype."""
    return block.linear(hidden, weight(part), block.bias(part), compute)


def weight(part: nn.Module) -> torch.Tensor:
    """Return a linear module's weight as [outputs, inputs]."""
    found = placed.local(part)
    return found.t() if part.is_transposed else found


def _normed(norm: nn.Module, parts: block.Parts, hidden: torch.Tensor) -> torch.Tensor:
    return parts.rms_norm(hidden, placed.local(norm), norm.variance_epsilon)


def _fed_forward(mlp: nn.Module, parts: block.Parts, hidden: torch.Tensor) -> torch.Tensor:
    return parts.leave(mlp.down_proj(parts.swiglu(*parts.read(hidden, mlp.gate_proj, mlp.up_proj))))


def _mixed(mixer: nn.Module, parts: block.Parts, hidden_states: torch.Tensor, position_embeddings, attend, **_):
    projected = parts.read(hidden_states, mixer.q_proj, mixer.k_proj, mixer.v_proj)
    query, key, value = (heads.unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2) for heads in projected)
    if hasattr(mixer, "q_norm"):
        query, key = mixer.q_norm(query), mixer.k_norm(key)
    query, key = parts.rotate(query, key, *position_embeddings)
    mixed = attend(mixer.layer_idx, query, key, value, mixer.scaling)
    return parts.leave(mixer.o_proj(mixed.transpose(1, 2).flatten(2))), None


# transformers' modules whose mathematics `block` does with less memory, and what takes the place of their `forward`.
LIKE_LLAMA = ("Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral", "Qwen2Moe", "Qwen3Moe")
FORWARDS = {
    f"{family}{part}": forward
    for family in LIKE_LLAMA
    for part, forward in (("RMSNorm", _normed), ("MLP", _fed_forward), ("Attention", _mixed))
}


def takes_parts(network: nn.Module) -> bool:
    """Whether a network's modules compute with `block.Parts`; those of other families are transformers' own."""
    return any(type(module).__name__ in FORWARDS for module in network.modules())


def walk(network: nn.Module, spec: ModelSpec) -> None:
    """Let this module go the way from tokens to the last norm in place of transformers' body and layers."""
    for number in range(spec.num_hidden_layers):
        layer = network.get_submodule(spec.layer(number).removesuffix("."))
        layer.forward = functools.partial(_through_layer, layer, spec, number)
    network.base_model.forward = functools.partial(_through_body, network, spec)


def _through_body(network, spec, input_ids, inputs_embeds, position_ids, attend, **_):
    around = spec.outside
    hidden = network.get_submodule(around.embedding)(input_ids) if inputs_embeds is None else inputs_embeds
    if around.embedding_norm:
        hidden = network.get_submodule(around.embedding_norm)(hidden)
    rotation = network.base_model.rotary_emb(hidden, position_ids) if spec.rotary_dim else None
    for number in range(spec.num_hidden_layers):
        layer = network.get_submodule(spec.layer(number).removesuffix("."))
        hidden = layer(hidden, rotation=rotation, attend=attend)
    return SimpleNamespace(last_hidden_state=network.get_submodule(around.norm)(hidden))


def _through_layer(layer, spec, number, hidden, rotation, attend):
    form = spec.block
    normed = layer.get_submodule(form.attention_norm)(hidden)
    query, key, value = (heads.transpose(1, 2) for heads in projected(layer, spec, normed))
    if rotation is not None:
        query, key = _rotated(query, key, rotation, spec)
    mixed = attend(number, query, key, value, spec.attention_scale).transpose(1, 2).flatten(2)
    middle = (normed * form.residual if form.residual else hidden) + layer.get_submodule(form.merge)(mixed)
    normed = layer.get_submodule(form.feed_norm)(hidden if form.is_parallel else middle)
    kept = normed * form.residual if form.residual else middle
    return kept + layer.get_submodule(form.contract)(widened(layer, spec, normed))


def _rotated(query, key, rotation, spec):
    """Queries and keys [rows, heads, length, head_dim], of which the first `rotary_dim` features are turned."""
    if spec.prefix:
        return block.rotate(query, key, *rotation, parts=2)
    if spec.rotary_dim == spec.head_dim:
        return block.rotate(query, key, *rotation)
    turned = block.rotate(query[..., : spec.rotary_dim], key[..., : spec.rotary_dim], *rotation)
    rest = query[..., spec.rotary_dim :], key[..., spec.rotary_dim :]
    return tuple(torch.cat(parts, -1) for parts in zip(turned, rest, strict=True))


def projected(layer: nn.Module, spec: ModelSpec, normed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values of a layer, [..., heads, head_dim], not normed and not turned."""
    parts = [layer.get_submodule(name)(normed) for name in spec.block.project]
    if len(parts) == 1 and spec.block.is_grouped:
        grouped = parts[0].unflatten(-1, (spec.num_key_value_heads, -1, spec.head_dim))
        return grouped[..., :-2, :].flatten(-3, -2), grouped[..., -2, :], grouped[..., -1, :]
    if len(parts) == 1:
        queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        parts = parts[0].split((queries, keys, keys), -1)
    return tuple(part.unflatten(-1, (-1, spec.head_dim)) for part in parts)


def widened(layer: nn.Module, spec: ModelSpec, normed: torch.Tensor) -> torch.Tensor:
    """Return what a layer's feed-forward gives to its last module."""
    parts = [layer.get_submodule(name)(normed) for name in spec.block.expand]
    activate = ACTIVATIONS[spec.block.activation]
    if not spec.block.is_gated:
        return activate(parts[0])
    gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
    return activate(gate) * up
