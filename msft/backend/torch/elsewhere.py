"""What of transformers' network is another stage's of a pipeline."""

import torch
from torch import nn

from msft.backend import names, stages
from msft.backend.mesh import Mesh
from msft.models.spec import ModelSpec


class Elsewhere(nn.Module):
    """A part of the model that another stage has: hidden states pass by."""

    def forward(self, hidden: torch.Tensor, **_) -> torch.Tensor:
        """Return the hidden states as they are."""
        return hidden


def leave_out(network: nn.Module, spec: ModelSpec, mesh: Mesh) -> None:
    """Take what other stages have out of a network; names and numbers of the rest stay."""
    own = stages.layers(spec, mesh)
    for number in set(range(spec.num_hidden_layers)) - set(own):
        network.model.layers[number] = Elsewhere()
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        # A tied head is tied to its embedding on both stages.
        is_tied = name == "lm_head" and spec.tie_word_embeddings
        if not stages.is_own(names.EMBEDDING if is_tied else f"{name}.weight", spec, mesh):
            network.set_submodule(name, Elsewhere())
