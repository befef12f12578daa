"""What a device holds beside weights, moments and what blocks keep: gradients of states, intermediates, copies.

On CPU these are numbers fitted on measured peaks (tests/estimate/test_peaks.py): each is how many times a thing is held
beyond what the code names. On accelerators nothing was measured, and what the code names counts alone.
"""

from typing import NamedTuple

from msft.backend.line import TILE
from msft.estimate import kept, state_kept
from msft.estimate.layout import Layout
from msft.estimate.sizes import BYTES, Sizes, Work


class Held(NamedTuple):
    """How often a block's way back holds hidden states, heads (q, k, v), feed-forward states, and recomputed blocks."""

    states: float
    heads: float
    wide: float
    recomputed: float


HELD = {
    # The gradients of a block's feed-forward half, the largest that live at a time.
    "accelerator": Held(states=2, heads=0, wide=3, recomputed=1),
    # Pages of freed tensors that later ones do not fit into come on top.
    "torch": Held(states=3, heads=2, wide=5, recomputed=3),
    # Each compiled function keeps the memory of its intermediates, all blocks share the functions.
    "mindspore": Held(states=102, heads=5, wide=4, recomputed=1),
}
# Of MindSpore's attention on CPU, whose functions are compiled for each number of keys: softmax weights, gathered keys.
WEIGHTS, GATHERED = 12, 4.5
# Keys and values of all devices that share rows: as they come and in the order of the line, with their gradients.
# Torch's attention on CPU then takes tiles of scores, each longer than the one before, whose pages stay.
GATHERED_WHOLE = 4
TILES_LEFT = 10
# Its dropout: random bits, masks and what they leave, of each feature under a mask, in the functions of all ways.
DROPPED = 37
# Its joined q, k, v and gate, up matrices, for the way there and back.
JOINED = 2
# Chunks of logits: them and their gradient; what MindSpore's compiled loss holds.
CHUNKS = {"torch": 2, "mindspore": 6}
# Sets of gradients that MindSpore holds on top of one: joined ones of a function, and what its updates make anew. The
# functions for the embedding and the head hold so many matrices of their size.
UPDATES, TABLES = 3, 12.5


def of_block(sizes: Sizes, work: Work, layout: Layout) -> float:
    """Return the bytes that the way back through a block holds for a while."""
    spec, tensor = sizes.spec, layout.tensor
    held = HELD[work.backend if work.kind == "cpu" else "accelerator"]
    compute = BYTES[work.precision.compute]
    heads = (spec.num_attention_heads + 2 * spec.num_key_value_heads) * spec.head_dim
    split = (held.heads * heads + held.wide * sizes.wide) / tensor
    found = held.states * kept.block_input(sizes, work, layout) + kept.tokens_held(work) * split * compute
    if spec.state_space:
        found += state_kept.working(sizes, work, kept.tokens_held(work))
    if work.parts > 1:
        keys = 2 * spec.num_key_value_heads * spec.head_dim / tensor
        found += GATHERED_WHOLE * work.tokens * work.parts * keys * compute
        if work.kind == "cpu" and work.backend == "torch":
            found += TILES_LEFT * spec.num_attention_heads / tensor * kept.TORCH_TILE * work.length * compute
    if layout.sequence_parallel:
        # What modules read of all tokens, and its gradient.
        found += 2 * kept.tokens_held(work) * spec.hidden_size * compute
    if work.recompute:
        found += held.recomputed * kept.block(sizes, work, layout)
    if work.kind == "cpu" and work.backend == "mindspore":
        dropped = kept.tokens_held(work) * sizes.dropped / spec.num_hidden_layers * compute
        return found + _tiled_attention(sizes, work) + JOINED * _joined(sizes, work) + DROPPED * dropped
    return found + _copies(sizes, work, layout)


def of_loss(sizes: Sizes, work: Work, layout: Layout) -> float:
    """Return the bytes of a chunk of logits and what is made of them, and of the head's copies.

    The head is copied where it is held in another dtype, by oneDNN, which rearranges its right factor (torch's float32
    on CPU), and as a chunk's share of its gradient.
    """
    chunk = kept.LOSS_CHUNK[work.backend]
    chunk = min(chunk, work.tokens) if work.backend == "torch" else chunk
    held = 4 if sizes.head_tuned else BYTES[work.precision.parameters]
    compute = BYTES[work.precision.compute]
    is_copied = held != compute and (work.backend == "mindspore" or sizes.head_tuned)
    is_rearranged = work.backend == "torch" and work.kind == "cpu" and compute == 4
    copies = is_copied + is_rearranged + (work.backend == "torch" and sizes.head_tuned)
    chunks = chunk * sizes.spec.vocab_size * 4 * CHUNKS[work.backend]
    return (chunks + copies * sizes.embedding.all * compute) / layout.vocabulary_parts


def of_update(sizes: Sizes, work: Work, gradients: float) -> float:
    """Return the bytes that a step of AdamW holds beside gradients: torch's works in place, MindSpore's makes anew."""
    if work.backend == "torch":
        return 0.0
    if work.kind == "cpu":
        return UPDATES * gradients + (TABLES * 4 * sizes.embedding.all if sizes.head_tuned else 0.0)
    largest = max(sizes.embedding.tuned, min(sizes.linears.tuned, sizes.largest))
    return 3.0 * 4 * largest


def _tiled_attention(sizes: Sizes, work: Work) -> float:
    spec = sizes.spec
    keys = sum(keys * tiles for keys, tiles in kept.mindspore_tiles(work, bool(sizes.spec.prefix)))
    weights = keys * TILE * spec.num_attention_heads * BYTES[work.precision.softmax]
    gathered = keys * spec.num_key_value_heads * spec.head_dim * BYTES[work.precision.compute]
    return WEIGHTS * weights + GATHERED * gathered


def _joined(sizes: Sizes, work: Work) -> float:
    spec = sizes.spec
    heads = (spec.num_attention_heads + 2 * spec.num_key_value_heads) * spec.head_dim
    return (heads + 2 * spec.intermediate_size) * spec.hidden_size * BYTES[work.precision.compute]


def _copies(sizes: Sizes, work: Work, layout: Layout) -> float:
    """Matrices that are held in another dtype than products take are copied for each product."""
    held = 4 if sizes.linears.tuned or work.backend == "mindspore" else 0
    if work.backend == "mindspore" and not sizes.linears.tuned:
        held = BYTES[work.precision.parameters]
    compute = BYTES[work.precision.compute]
    largest = 2 * sizes.spec.hidden_size * sizes.spec.intermediate_size / layout.tensor
    return largest * compute if held not in (0, compute) else 0.0
