"""What FSDP2 holds whole of the weights that it deals out: a few blocks for a while, embedding and head for longer."""

from msft.estimate.layout import Layout
from msft.estimate.sizes import BYTES, Share, Sizes, Work

# The block that is computed, the next one as it comes and as it stays; gradients, and what they leave in.
BLOCKS, GRADIENTS = 3, 2


def frozen_bytes(work: Work) -> tuple[int, int]:
    """Return the bytes of a frozen number of matrices, and of other tensors."""
    precision = work.precision
    compute, stored = BYTES[precision.compute], BYTES[precision.parameters]
    if precision.compute == "float32":
        stored = 4 if work.backend == "torch" else stored
    return compute if work.backend == "torch" else stored, stored


def whole(sizes: Sizes, work: Work, layout: Layout) -> tuple[float, float, float]:
    """Return the bytes of whole weights and gradients at the loss, on the last block's way back, and at its end."""
    matrices, stored = frozen_bytes(work)
    blocks, adapters = sizes.spec.num_hidden_layers, 4 * _adapters(sizes, layout)
    of_blocks = _bytes(sizes.linears, matrices) / layout.tensor + _bytes(sizes.others, stored) + adapters
    tuned = 4 * (sizes.linears.tuned / layout.tensor + sizes.others.tuned) + adapters
    ends = _bytes(sizes.embedding, stored) + _bytes(sizes.head, matrices)
    at_loss = ends / layout.vocabulary_parts + _bytes(sizes.last_norm, stored)
    on_way = at_loss + (BLOCKS * of_blocks + GRADIENTS * tuned) / blocks
    return at_loss, on_way, on_way + 4 * (sizes.embedding.tuned + sizes.head.tuned) / layout.vocabulary_parts


def _adapters(sizes: Sizes, layout: Layout) -> float:
    return sizes.split_adapters / layout.tensor + sizes.adapters - sizes.split_adapters


def _bytes(share: Share, frozen: int) -> int:
    return 4 * share.tuned + frozen * (share.all - share.tuned)
