"""An embedding and a head of which each rank has its rows of the vocabulary (Megatron-LM, arXiv 1909.08053)."""

from collections.abc import Callable

import torch
from torch.nn import functional

from msft.backend.mesh import Mesh
from msft.backend.torch import distributed
from msft.backend.torch.ops import sum_in_blocks
from msft.models.spec import ModelSpec


def own(spec: ModelSpec, mesh: Mesh) -> "Vocabulary | None":
    """Return this rank's part of the vocabulary, None where it is not cut."""
    if not mesh.is_vocabulary_cut:
        return None
    return Vocabulary(spec.vocab_size // mesh.tensor * mesh.tensor_rank, distributed.largest, distributed.reduce)


class Vocabulary:
    """A rank's rows of the vocabulary, which begin with the token `first`.

    `largest` and `reduce` give the maximum and the sum of a tensor's values over the ranks that have the others.
    """

    def __init__(self, first: int, largest: Callable, reduce: Callable):
        self.first, self.largest, self.reduce = first, largest, reduce

    def embed(self, table: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the states [..., hidden] of tokens int32 [...], 0 for those of other ranks: summed over ranks, all."""
        places, own = self._own(input_ids, len(table))
        return functional.embedding(places, table).masked_fill(~own.unsqueeze(-1), 0)

    def token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of each position, float32 [n], on every rank.

        logits float32 [n, rows] are this rank's, and used up; labels [n].
        """
        return self._losses_and_exponentials(logits, labels)[0]

    def token_losses_and_gradient(
        self, logits: torch.Tensor, labels: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `token_losses` and the gradient of `scale` x their sum for the logits, in the place of the logits."""
        losses, exponentials, totals = self._losses_and_exponentials(logits, labels)
        gradient = exponentials.mul_((scale / totals).unsqueeze(-1))
        places, own = self._own(labels, logits.shape[1])
        gradient.scatter_add_(-1, places.unsqueeze(-1), own.to(gradient.dtype).mul_(-scale).unsqueeze(-1))
        return losses, gradient

    def _losses_and_exponentials(self, logits, labels):
        """The losses [n], exp(logits - the largest) in the place of the logits, and its sums over all ranks [n]."""
        places, own = self._own(labels, logits.shape[1])
        top = self.largest(logits.amax(-1))
        chosen = (logits.gather(-1, places.unsqueeze(-1)).squeeze(-1) - top).masked_fill(~own, 0)
        exponentials = logits.sub_(top.unsqueeze(-1)).exp_()
        totals, chosen = self.reduce(torch.stack((sum_in_blocks(exponentials), chosen)))
        return torch.log1p(totals - 1) - chosen, exponentials, totals

    def _own(self, tokens: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of tokens, int64 (0 for those of other ranks), and which are this rank's."""
        places = tokens.long() - self.first
        own = (places >= 0) & (places < rows)
        return places.masked_fill(~own, 0), own
