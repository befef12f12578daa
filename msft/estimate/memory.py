"""Memory of one device, part by part, at the moment of a step when most is held."""

from typing import NamedTuple

from msft.backend.buckets import BUCKET
from msft.estimate import gathered, kept, working
from msft.estimate.layout import Layout
from msft.estimate.sizes import BYTES, Sizes, Work

MEGA = 10**6
# What a process holds before it has a model. On CPU measured here (interpreter, framework, compiled functions); on
# accelerators what their makers' contexts and libraries are known to take, not measured by this project.
FRAMEWORK = {
    ("torch", "cpu"): 500 * MEGA,
    ("mindspore", "cpu"): 610 * MEGA,
    ("torch", "cuda"): 1000 * MEGA,
    ("torch", "npu"): 1500 * MEGA,
    ("mindspore", "npu"): 1500 * MEGA,
    ("mindspore", "cuda"): 1500 * MEGA,
}
# Buffers of one group of devices: HCCL_BUFFSIZE is 200 MB each way; NCCL's channels take about as much; gloo's copy.
GROUP_BUFFERS = {"npu": 400 * MEGA, "cuda": 300 * MEGA, "cpu": 2 * 4 * BUCKET}


class Memory(NamedTuple):
    """Bytes of one device at its peak, which is during `moment`; the parts add up to `total`."""

    frozen: float
    tuned: float
    gradients: float
    moments: float
    activations: float
    logits: float
    working: float
    communication: float
    framework: float
    moment: str

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self[:-1])


class Weights(NamedTuple):
    """Bytes of a pipeline stage's weights: frozen ones, tuned ones in float32, these in the compute dtype."""

    frozen: float
    tuned: float
    gathered: float
    head_gradient: float


def memory(sizes: Sizes, work: Work, layout: Layout) -> Memory:
    """Return the memory of the device that needs most: one of the first or of the last pipeline stage."""
    stages = {0, layout.pipeline - 1}
    return max((_stage(sizes, work, layout, stage) for stage in stages), key=lambda found: found.total)


def _stage(sizes: Sizes, work: Work, layout: Layout, stage: int) -> Memory:
    weights = stage_weights(sizes, work, layout, stage)
    moments = _moments(sizes, work, layout, stage, weights)
    moment = max(moments, key=lambda name: sum(moments[name]))
    gradients, activations, logits, held = moments[moment]
    dealt = layout.replicas if layout.fully_sharded else 1
    return Memory(
        frozen=weights.frozen / dealt,
        tuned=weights.tuned / layout.replicas + weights.gathered if layout.weights_sharded else weights.tuned / dealt,
        gradients=gradients,
        moments=2 * weights.tuned / layout.moment_parts,
        activations=activations,
        logits=logits,
        working=held,
        communication=_buffers(work, layout),
        framework=float(FRAMEWORK[work.backend, work.kind]),
        moment=moment,
    )


def _moments(sizes: Sizes, work: Work, layout: Layout, stage: int, weights: Weights) -> dict[str, tuple]:
    """What comes and goes in a step (gradients, activations, logits, what is held for a while), by moment."""
    is_last, accumulates = stage == layout.pipeline - 1, layout.micro_batches > 1
    # Sharded gradients are shared out as they are made, accumulated ones at the end (MindFormers' default).
    is_dealt = layout.fully_sharded or layout.weights_sharded and not accumulates
    shards = layout.replicas if is_dealt else 1
    # FSDP2 sums the head's gradient up with the last ones.
    of_head = 1 if layout.fully_sharded else shards
    gradients, head = weights.tuned / shards, weights.head_gradient / of_head if is_last else 0.0
    kept_states = _activations(sizes, work, layout, stage)
    logits = working.of_loss(sizes, work, layout) if is_last else 0.0
    block, update = working.of_block(sizes, work, layout), working.of_update(sizes, work, gradients)
    # With accumulated gradients a new set is made beside the old one.
    before = gradients if accumulates else 0.0
    if (work.backend, work.kind) == ("mindspore", "cpu"):
        # Compiled functions keep their memory, so that what a step holds at any time adds up.
        return {"any step": (before + gradients, kept_states, logits, block + update)}
    # The head reads the hidden states of all tokens.
    states = 4 * kept.block_input(sizes, work, layout._replace(sequence_parallel=False)) if is_last else 0.0
    at_loss, on_way, at_end = gathered.whole(sizes, work, layout) if layout.fully_sharded else (0.0, 0.0, 0.0)
    left = kept_states / _blocks(sizes, layout)
    return {
        "the loss": (before + head, kept_states + states, logits, at_loss),
        "the last block's way back": (before + head, kept_states + states, 0.0, block + on_way),
        "the first block's way back": (before + gradients, left, 0.0, block + at_end),
        "the optimizer": (gradients * _sets_of_gradients(work, layout), 0.0, 0.0, update),
    }


def stage_weights(sizes: Sizes, work: Work, layout: Layout, stage: int) -> Weights:
    """Return the bytes of the weights of one device of a pipeline stage, before optimizer sharding."""
    tensor, blocks = layout.tensor, 1 / layout.pipeline
    is_last, compute = stage == layout.pipeline - 1, BYTES[work.precision.compute]
    matrices, stored = gathered.frozen_bytes(work)
    vocabulary = 1 / layout.vocabulary_parts
    parts = [(sizes.linears, blocks / tensor, matrices), (sizes.others, blocks, stored)]
    if stage == 0:
        parts.append((sizes.embedding, vocabulary, stored))
    if is_last:
        parts += [(sizes.head, vocabulary, matrices), (sizes.last_norm, 1, stored)]
    if is_last and stage and sizes.spec.tie_word_embeddings:
        parts.append((sizes.embedding, vocabulary, stored))
    adapters = (sizes.split_adapters / tensor + sizes.adapters - sizes.split_adapters) * blocks
    tuned = adapters + sum(share.tuned * part for share, part, _ in parts)
    frozen = sum((share.all - share.tuned) * part * size for share, part, size in parts)
    head = sizes.embedding.all * vocabulary if sizes.head_tuned else 0.0
    return Weights(frozen, 4 * tuned, compute * tuned, 4 * head)


def _activations(sizes: Sizes, work: Work, layout: Layout, stage: int) -> float:
    """What all blocks of a stage keep, for the micro-batches that a pipeline has on their way (1F1B)."""
    one = kept.block_input if work.recompute else kept.block
    under_way = min(layout.pipeline - stage, layout.micro_batches)
    return _blocks(sizes, layout) * one(sizes, work, layout) * under_way


def _blocks(sizes: Sizes, layout: Layout) -> float:
    return sizes.spec.num_hidden_layers / layout.pipeline


def _sets_of_gradients(work: Work, layout: Layout) -> int:
    """Sets of gradients while they are added up: over micro-batches in MindSpore, over ranks in both engines."""
    over_batches = 3 if work.backend == "mindspore" and layout.micro_batches > 1 else 1
    is_dealt = layout.weights_sharded or layout.fully_sharded
    return max(over_batches, 2 if layout.replicas > 1 and not is_dealt else 1)


def _buffers(work: Work, layout: Layout) -> float:
    groups = sum(size > 1 for size in (*layout[:3], layout.context))
    return float(groups * GROUP_BUFFERS[work.kind])
