"""An embedding and a head of which each rank has its rows of the vocabulary (Megatron-LM, arXiv 1909.08053)."""

from collections.abc import Callable

import mindspore
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend.mesh import Mesh
from msft.backend.mindspore import distributed
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

    def embed(self, table: Tensor, input_ids: Tensor) -> Tensor:
        """Return the states [..., hidden] of tokens int32 [...], 0 for those of other ranks: summed over ranks, all."""
        return _embed(table, input_ids - self.first)

    def embed_backward(self, gradient: Tensor, input_ids: Tensor, table: Tensor) -> Tensor:
        """Return the gradient of this rank's rows for that of the states [tokens, hidden] of all of its tokens."""
        return _embed_backward(gradient, input_ids - self.first, table)

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each position, float32 [n], on every rank.

        logits float32 [n, rows] are this rank's; labels int32 [n].
        """
        _, sums = self._top_and_sums(logits, labels - self.first)
        return _losses(sums)

    def token_losses_and_gradient(self, logits: Tensor, labels: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Return `token_losses` and the gradient of their sum, each times its scale [n], for this rank's logits."""
        places = labels - self.first
        top, sums = self._top_and_sums(logits, places)
        return _losses(sums), _by_logits(logits, places, top, sums, scales)

    def _top_and_sums(self, logits, places):
        """The largest logit of all ranks [n]; the sums of exp(logits - it), and the labels' logits less it [2, n]."""
        top = self.largest(_top(logits))
        return top, self.reduce(_sums(logits, places, top))


def _rows(places, count):
    """The rows of tokens, 0 for those of other ranks, and 1 for those that are this rank's, else 0."""
    is_own = operators.logical_and(places >= 0, places < count)
    return operators.where(is_own, places, operators.zeros_like(places)), is_own


@mindspore.jit
def _embed(table, places):
    rows, is_own = _rows(places, table.shape[0])
    return operators.gather(table, rows, 0) * is_own.expand_dims(-1).astype(table.dtype)


@mindspore.jit
def _embed_backward(gradient, places, table):
    rows, is_own = _rows(places, table.shape[0])
    gradient = gradient.astype(table.dtype) * is_own.expand_dims(-1).astype(table.dtype)
    return operators.unsorted_segment_sum(gradient, rows, table.shape[0])


@mindspore.jit
def _top(logits):
    return operators.ReduceMax()(logits, -1)


@mindspore.jit
def _sums(logits, places, top):
    # A product with ones, because one long float32 sum loses the many small values.
    exponentials = operators.exp(logits - top.expand_dims(-1))
    total = operators.matmul(exponentials, operators.ones((logits.shape[1], 1), exponentials.dtype)).squeeze(-1)
    rows, is_own = _rows(places, logits.shape[1])
    chosen = operators.gather_elements(logits, 1, rows.expand_dims(-1)).squeeze(-1)
    return operators.stack((total, (chosen - top) * is_own.astype(top.dtype)))


@mindspore.jit
def _losses(sums):
    # log1p loses nothing where the sum is little more than 1, which it is at least.
    return operators.log1p(sums[0] - 1) - sums[1]


@mindspore.jit
def _by_logits(logits, places, top, sums, scales):
    shares = operators.exp(logits - top.expand_dims(-1)) * (scales / sums[0]).expand_dims(-1)
    rows, is_own = _rows(places, logits.shape[1])
    taken = (-scales * is_own.astype(scales.dtype)).expand_dims(-1)
    return operators.tensor_scatter_elements(shares, rows.expand_dims(-1), taken, 1, "add")
