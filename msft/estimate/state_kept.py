"""What a block with a state space holds of a micro-batch, in bytes, as each engine's `state_block.py` keeps it."""

from msft.estimate.sizes import BYTES, Sizes, Work

# STRIP of both engines' state_space.py (a test compares them).
STRIP = 64
# What the way back through a strip makes of each of its numbers: decays, what is added, states; their gradients.
# MindSpore's compiled functions keep all of it on CPU.
MADE, MADE_ON_CPU = 6, 45
# Of what a token is for a block, as often as MindSpore's functions for whole lines hold it on CPU (fitted on 4 peaks).
FUNCTIONS = 20


def block(sizes: Sizes, work: Work, tokens: int, hidden: int) -> float:
    """Return the bytes that a block keeps of so many tokens, its input included; `hidden` are a feature's bytes."""
    spec, space = sizes.spec, sizes.spec.state_space
    compute, inner = BYTES[work.precision.compute], space.intermediate_size
    hidden = 4 if space.residual_in_fp32 else hidden
    # The states before strips, and outputs with what the gate makes of them, are float32.
    products, wide = space.projected + space.packed, space.state_size * inner / STRIP
    if work.backend == "mindspore":
        return tokens * (hidden * spec.hidden_size + compute * products + 4 * (3 * inner + wide))
    whole = sizes.others.tuned / sizes.others.all if sizes.others.all else 0.0
    states = 1 + sizes.keeps_normed + whole
    products += space.convolved * (1 + (space.conv_kernel - 1) * whole)
    if not space.num_heads:
        products += space.convolved + (space.time_step_rank + 2 * space.state_size) * whole
    wide += inner * (2 + whole + (1 + whole if space.num_heads else 0))
    masks = (sizes.dropped + compute * sizes.ranks) / spec.num_hidden_layers
    return tokens * (states * hidden * spec.hidden_size + compute * products + 4 * wide + masks)


def working(sizes: Sizes, work: Work, tokens: int) -> float:
    """Return the bytes that the way back through a block holds for a while beside what any block does."""
    space, is_compiled = sizes.spec.state_space, (work.backend, work.kind) == ("mindspore", "cpu")
    widths = space.projected + space.packed + space.convolved + 2 * space.intermediate_size
    functions = FUNCTIONS * tokens * widths * BYTES[work.precision.compute] if is_compiled else 0.0
    return functions + _strip(sizes) * (MADE_ON_CPU if is_compiled else MADE)


def _strip(sizes: Sizes) -> float:
    space = sizes.spec.state_space
    states = space.state_size * space.intermediate_size
    numbers = space.num_heads * STRIP * STRIP + 2 * states if space.num_heads else STRIP * states
    return 4.0 * numbers
