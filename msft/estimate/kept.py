"""What the blocks and the head of each engine hold for a micro-batch, in bytes, as their code keeps it.

Torch: what the operators of backend/torch/block.py save. MindSpore: `Kept` and `Inner` of backend/mindspore/block.py.
"""

from msft.backend.line import TILE, rounded_up
from msft.estimate import state_kept
from msft.estimate.layout import Layout
from msft.estimate.sizes import BYTES, Sizes, Work

# backend/torch/attention.py's TILE, and KEPT of both engines; LOSS_CHUNK of both ops.py (a test compares them).
TORCH_TILE = 128
KEPT = 512
LOSS_CHUNK = {"torch": 160, "mindspore": 256}


def hidden_bytes(sizes: Sizes, work: Work) -> int:
    """Return the bytes of one feature of a hidden state, whose dtype is the embedding's."""
    return 4 if sizes.embedding.tuned else BYTES[work.precision.parameters]


def tokens_held(work: Work) -> int:
    """Return the tokens that are computed: MindSpore fills its line up."""
    return rounded_up(work.tokens, TILE) if work.backend == "mindspore" else work.tokens


def block_input(sizes: Sizes, work: Work, layout: Layout) -> float:
    """Return the bytes of a block's input, all that it keeps with recompute."""
    return tokens_held(work) * hidden_bytes(sizes, work) * sizes.spec.hidden_size / _hidden_parts(layout)


def block(sizes: Sizes, work: Work, layout: Layout) -> float:
    """Return the bytes that a block keeps of a micro-batch, its input included; the mean over blocks."""
    spec, tensor = sizes.spec, layout.tensor
    if spec.state_space:
        return state_kept.block(sizes, work, tokens_held(work), hidden_bytes(sizes, work))
    compute, hidden = BYTES[work.precision.compute], hidden_bytes(sizes, work)
    queries = spec.num_attention_heads * spec.head_dim / tensor
    keys = spec.num_key_value_heads * spec.head_dim / tensor
    wide = sizes.wide / tensor
    # The input, and what stands between attention and the feed-forward layer.
    states, split = 2.0, queries + 2 * keys + 2 * wide
    if spec.encoder:
        # A target asks, is answered and stands behind the answer, of a source each layer of the decoder reads a key and
        # a value: about as much, and so half of the tokens each.
        states, split = states + 0.5, split + (2 * queries + 2 * keys) / 2
    masks = sizes.dropped / spec.num_hidden_layers / tensor
    if work.backend == "torch":
        states += sizes.keeps_normed + sizes.keeps_wide_normed + sizes.routed * _routed_rows(sizes)
        is_output_kept = fused_attention(work) or is_left_to_torch(work)
        split += queries * (1 if is_output_kept else sizes.keeps_mixed)
        split += wide * sizes.keeps_gated + sizes.ranks / spec.num_hidden_layers
    else:
        split, masks = split + queries, 0
        # The norm that experts read.
        states += sizes.routed
    a_token = states * hidden * spec.hidden_size / _hidden_parts(layout) + split * compute + masks
    return tokens_held(work) * a_token + attention_weights(sizes, work) / tensor


def _routed_rows(sizes: Sizes) -> float:
    """Rows of a token that torch keeps in a block with experts: each one's output, and its input beside the norm."""
    chosen = sizes.spec.experts.chosen if sizes.spec.experts else 0
    return chosen + sizes.keeps_wide_normed * (chosen - 1)


def attention_weights(sizes: Sizes, work: Work) -> float:
    """Return the bytes of attention's weights that a block keeps: of short segments, without a fused kernel."""
    heads, reads_both_ways = sizes.spec.num_attention_heads, bool(sizes.spec.prefix)
    if fused_attention(work) and not (reads_both_ways and work.backend == "mindspore"):
        return 4 * heads * work.tokens
    if work.backend == "mindspore":
        softmax = BYTES[work.precision.softmax]
        found = mindspore_tiles(work, reads_both_ways)
        return softmax * heads * sum(tiles * TILE * keys for keys, tiles in found if keys <= KEPT)
    if work.length > KEPT:
        return 4 * heads * work.tokens if is_left_to_torch(work) else 0
    count = -(-work.length // TORCH_TILE)
    ends = [work.length * (number + 1) // count for number in range(count)]
    seen = [work.length] * count if reads_both_ways else ends
    pairs = sum((end - start) * keys for start, end, keys in zip([0, *ends], ends, seen, strict=False))
    return BYTES[work.precision.compute] * heads * work.rows * pairs / work.parts


def is_left_to_torch(work: Work) -> bool:
    """Whether attention on CPU is torch's own kernel, which keeps its output and a number a query."""
    return work.length > KEPT and work.precision.compute == "float32" and work.parts == 1


def fused_attention(work: Work) -> bool:
    """Whether attention is one kernel that keeps its output and a number a query."""
    return work.kind != "cpu"


def mindspore_tiles(work: Work, reads_both_ways: bool = False) -> list[tuple[int, int]]:
    """Return (keys, how many tiles of queries are computed with so many) of MindSpore's attention on CPU.

    Of `parts` devices each has as many wide and narrow ones. At most all tiles see all keys, in a context that is read
    in both directions.
    """
    counts: dict[int, int] = {}
    last = -(-work.length // TILE)
    for number in range(work.parts, last + 1, work.parts):
        number = last if reads_both_ways else number
        width = min(2 ** (number - 1).bit_length(), -(-number // 8) * 8)
        counts[width * TILE] = counts.get(width * TILE, 0) + work.rows
    return [(keys, rounded_up(count, 1, 4)) for keys, count in counts.items()]


def _hidden_parts(layout: Layout) -> int:
    return layout.tensor if layout.sequence_parallel else 1
