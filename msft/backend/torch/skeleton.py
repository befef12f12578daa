"""A network of torch's own modules, made of a model's description: for families that transformers has no class for.

`replaced.walk` goes the way through it: LayerNorm or RMSNorm, one or several projections, attention and a feed-forward.
"""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from msft.backend.torch import block
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Skeleton(nn.Module):
    """Modules with the canonical names of a description, whose parameters have no values yet."""

    def __init__(self, spec: ModelSpec, device: str):
        super().__init__()
        self.spec = spec
        around = spec.outside
        norms = {around.norm, around.embedding_norm}
        shapes = tensor_shapes(spec)
        with torch.device("meta"):
            for name, shape in shapes.items():
                path, _, leaf = name.rpartition(".")
                if leaf == "bias":
                    continue
                if path in norms or path.endswith(spec.block.norms):
                    part = NORMS[spec.norm](shape, eps=spec.norm_eps)
                elif path in (around.embedding, around.positions):
                    part = nn.Embedding(*shape)
                else:
                    part = nn.Linear(*reversed(shape), bias=f"{path}.bias" in shapes)
                self._put(path, part)
            if spec.tie_word_embeddings:
                self._put(around.head, nn.Linear(spec.hidden_size, spec.vocab_size, bias=False))
        self.base_model.rotary_emb = Rotary(spec, device)

    @property
    def base_model(self) -> nn.Module:
        """The part from tokens to the last norm."""
        return self.get_submodule(self.spec.outside.layers.partition(".")[0])

    def tie_weights(self) -> None:
        """Make the head the embedding where it is tied."""
        if self.spec.tie_word_embeddings:
            self.get_submodule(self.spec.outside.head).weight = self.get_submodule(self.spec.outside.embedding).weight

    def activation_checkpointing_enable(self, settings: dict) -> None:
        """Compute each layer again on its way back, in training."""
        for layer in self.get_submodule(self.spec.outside.layers).children():
            layer.forward = functools.partial(_recomputed, layer, layer.forward, settings)

    def _put(self, path: str, part: nn.Module) -> None:
        owner, place = self, path.split(".")
        for step in place[:-1]:
            if not hasattr(owner, step):
                owner.add_module(step, nn.Module())
            owner = getattr(owner, step)
        owner.add_module(place[-1], part)


def _recomputed(layer, forward, settings, *arguments, **named):
    if not layer.training:
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, **settings, **named)


class Rotary(nn.Module):
    """Cosine and sine [rows, tokens, features] of positions; `inv_freq` is filled for each batch."""

    def __init__(self, spec: ModelSpec, device: str):
        super().__init__()
        self.has_two = bool(spec.prefix)
        self.register_buffer("inv_freq", torch.zeros(spec.rotary_dim // 2, device=device), persistent=False)

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tables for int [rows, tokens], or [2, rows, tokens] for the halves of a head each."""
        angles = position_ids.float().unsqueeze(-1) * self.inv_freq
        angles = torch.cat((angles, angles), -1)
        if self.has_two:
            first, second = angles if angles.dim() == 4 else (angles, angles)
            angles = torch.cat((first, second), -1)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


def apply_rotary_pos_emb(query, key, cosine, sine) -> tuple[torch.Tensor, torch.Tensor]:
    """Return query and key [rows, heads, tokens, dim] turned, each half of a head by itself.

    It has transformers' name, by which the decoder finds what turns a family's heads.
    """
    return block.rotate(query, key, cosine, sine, parts=2)
