"""Time of a step from a roofline: products at the device's peak, the rest at its memory's bandwidth, and its links."""

from typing import NamedTuple

from msft.estimate import kept, traffic
from msft.estimate.devices import Device
from msft.estimate.layout import Layout
from msft.estimate.memory import stage_weights
from msft.estimate.sizes import Sizes, Work, passed

# How often a byte that a block keeps is moved: written, read by the next operator, read again on the way back, and its
# gradient written, read and added up.
MOVES = 6
# A tuned number's float32 weight, gradient and two moments are read, all but the gradient are written.
OPTIMIZER_BYTES = 28


class Speed(NamedTuple):
    """A step's seconds by what they go to, and what comes of them.

    `bubble` is what the stages of a pipeline wait for each other. `tokens` are a device's each second, `utilisation`
    (MFU) its share of the peak in FLOPs that the model needs (recompute counts nothing).
    """

    products: float
    memory: float
    optimizer: float
    bubble: float
    data: float
    tensor: float
    context: float
    pipeline: float
    tokens: float
    utilisation: float
    sent: traffic.Traffic

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self[:8])


class Flops(NamedTuple):
    """FLOPs of one token through the whole model: blocks' way there, all ways back, the head's both ways."""

    forward: float
    backward: float
    head: float

    @property
    def needed(self) -> float:
        """FLOPs that the model needs for a token."""
        return sum(self)


def flops(sizes: Sizes, work: Work) -> Flops:
    """Return what a token costs: 2 FLOPs a parameter that it meets and product; frozen matrices have no gradient.

    Attention is causal: a token meets half of its row on average.
    """
    spec = sizes.spec
    space = spec.state_space
    # Of each state: a decay, what is added, and what is read.
    states = 6 * spec.num_hidden_layers * space.state_size * space.intermediate_size if space else 0
    attention = states + 2 * 2 * spec.num_hidden_layers * spec.num_attention_heads * spec.head_dim * work.length / 2
    linear = 2 * (sizes.linears.all - sizes.idle.all + sizes.adapters) * passed(spec)
    head = 2 * spec.vocab_size * spec.hidden_size
    own = 2 * (sizes.linears.tuned - sizes.idle.tuned + sizes.adapters) * passed(spec)
    return Flops(linear + attention, linear + own + 2 * attention, (3 if sizes.head_tuned else 2) * head)


def speed(sizes: Sizes, work: Work, layout: Layout, device: Device) -> Speed:
    """Return the time of a step of a layout on a device."""
    cost = flops(sizes, work)
    tokens = work.tokens * layout.micro_batches
    computed = cost.needed + (cost.forward if work.recompute else 0.0)
    model_parts = layout.tensor * layout.pipeline
    peak = device.peak[work.precision.compute]
    products = tokens * computed / model_parts / peak / device.efficiency
    memory = _moved(sizes, work, layout) / device.bandwidth / device.efficiency
    tuned = stage_weights(sizes, work, layout, 0).tuned / 4 / layout.moment_parts
    sent = traffic.traffic(sizes, work, layout)
    data, tensor, context, pipeline = traffic.seconds(sent, layout, device)
    bubble = (products + memory + tensor + context) * (layout.pipeline - 1) / layout.micro_batches
    optimizer = tuned * OPTIMIZER_BYTES / device.bandwidth / device.efficiency
    parts = (products, memory, optimizer, bubble, data, tensor, context, pipeline)
    rate = tokens / model_parts / sum(parts)
    return Speed(*parts, rate, rate * cost.needed / peak, sent)


def _moved(sizes: Sizes, work: Work, layout: Layout) -> float:
    """Bytes that the blocks of a stage move beside their products, in all micro-batches of a step."""
    moves = MOVES + 2 if work.recompute else MOVES
    blocks = sizes.spec.num_hidden_layers / layout.pipeline
    return moves * blocks * kept.block(sizes, work, layout) * layout.micro_batches
