"""What takes the place of `forward` in transformers' modules: the mathematics of `block`, with less memory."""

import torch
from torch import nn

from msft.backend.torch import block, placed


def linear(part: nn.Module, compute: torch.dtype, hidden: torch.Tensor) -> torch.Tensor:
    """Return what a linear module gives for hidden states, in the compute dtype."""
    return block.linear(hidden, placed.local(part), block.bias(part), compute)


def _normed(norm: nn.Module, parts: block.Parts, hidden: torch.Tensor) -> torch.Tensor:
    return parts.rms_norm(hidden, placed.local(norm), norm.variance_epsilon)


def _fed_forward(mlp: nn.Module, parts: block.Parts, hidden: torch.Tensor) -> torch.Tensor:
    return parts.leave(mlp.down_proj(parts.swiglu(*parts.read(hidden, mlp.gate_proj, mlp.up_proj))))


def _mixed(mixer: nn.Module, parts: block.Parts, hidden_states: torch.Tensor, position_embeddings, attend, **_):
    projected = parts.read(hidden_states, mixer.q_proj, mixer.k_proj, mixer.v_proj)
    query, key, value = (heads.unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2) for heads in projected)
    query, key = parts.rotate(query, key, *position_embeddings)
    mixed = attend(mixer.layer_idx, query, key, value, mixer.scaling)
    return parts.leave(mixer.o_proj(mixed.transpose(1, 2).flatten(2))), None


# transformers' modules whose mathematics `block` does with less memory, and what takes the place of their `forward`.
FORWARDS = {"LlamaRMSNorm": _normed, "LlamaMLP": _fed_forward, "LlamaAttention": _mixed}
