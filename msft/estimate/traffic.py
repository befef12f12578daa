"""What a device sends in a step, by layout, in bytes; rings and trees send 2 (n - 1) / n of what they add up."""

from typing import NamedTuple

from msft.estimate.devices import Device
from msft.estimate.layout import MACHINE, Layout
from msft.estimate.memory import stage_weights
from msft.estimate.sizes import BYTES, Sizes, Work


class Traffic(NamedTuple):
    """Bytes that one device sends in a step: gradients (and gathered weights), activations, keys and values, stages."""

    data: float
    tensor: float
    context: float
    pipeline: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def traffic(sizes: Sizes, work: Work, layout: Layout) -> Traffic:
    """Return what a device of the first pipeline stage sends in a step.

    Data: the tuned weights' float32 gradients are added up (all-reduce), and with optimizer sharding the new weights
    gathered; sharded weights are gathered in the compute dtype, and their gradients added up in shares; fully sharded
    ones are gathered, frozen or tuned, for each micro-batch's way forward and back. Tensor: the hidden states are added
    up as often as `_sums` says. Context: keys and values of each block are gathered each way, their gradients added up
    in shares (MindSpore does both by all-reduce, which sends twice as much). Pipeline: each micro-batch's hidden states
    go to the next stage, their gradient back.
    """
    weights = stage_weights(sizes, work, layout, 0)
    spec, share = sizes.spec, (layout.replicas - 1) / layout.replicas
    data = share * (3 if layout.optimizer_sharding else 2) * weights.tuned
    if layout.weights_sharded:
        data = share * (weights.tuned + weights.gathered)
    if layout.fully_sharded:
        data = share * (3 * weights.tuned + 2 * weights.frozen) * layout.micro_batches
    states = work.tokens * spec.hidden_size * BYTES[work.precision.compute] * layout.micro_batches
    ring = 2 * (layout.tensor - 1) / layout.tensor
    blocks = spec.num_hidden_layers / layout.pipeline
    sums = _sums(sizes, work, layout) * blocks
    # Before the head, and behind an embedding that is split.
    sums += (1 if layout.whole_embedding else 2) * _sums_at_once(work, layout)
    pairs = 2 * spec.num_key_value_heads * spec.head_dim / layout.tensor * BYTES[work.precision.compute]
    gathers = (6 if work.backend == "mindspore" else 3) * blocks * (layout.context - 1) / layout.context
    gathered = gathers * pairs * work.tokens * work.parts * layout.micro_batches
    ways = 2 if layout.pipeline > 1 else 0
    parts = layout.tensor if layout.sequence_parallel else 1
    return Traffic(data, ring * sums * states, gathered, ways * states / parts)


def _sums(sizes: Sizes, work: Work, layout: Layout) -> float:
    """How often a block's hidden states are added up: twice each way, and twice more with recompute.

    Sequence parallelism sends as much, as reduce-scatter and all-gather; msft's gathers again what tuned modules read.
    """
    sums = 6.0 if work.recompute else 4.0
    if not layout.sequence_parallel or layout.reduce_scatters:
        return sums
    reads = (sizes.keeps_normed + sizes.keeps_wide_normed) / 2
    again = reads if work.backend == "mindspore" or not work.recompute else 0.0
    return (sums + again) * _sums_at_once(work, layout)


def _sums_at_once(work: Work, layout: Layout) -> int:
    """How many sums stand for a reduce-scatter and an all-gather: msft's MindSpore engine has nothing but sums."""
    only_sums = work.backend == "mindspore" and not layout.reduce_scatters
    return 2 if layout.sequence_parallel and only_sums else 1


def seconds(sent: Traffic, layout: Layout, device: Device) -> tuple[float, float, float, float]:
    """Return how long each kind takes: by the link where its group fits into a machine, else by the network.

    Tensor groups lie innermost, then context, data, pipeline (MindFormers' order of ranks). Nothing hides behind
    products: the engines add gradients up when all are there.
    """
    near = device.link if layout.tensor * layout.context <= MACHINE else device.network
    inner = device.link if layout.tensor * layout.replicas <= MACHINE else device.network
    outer = device.link if layout.devices <= MACHINE else device.network
    return sent.data / inner, sent.tensor / device.link, sent.context / near, sent.pipeline / outer
