"""What MindSpore's semi-automatic mode is told for a plan, and which part of a tensor a process then holds."""

import numpy as np

from msft.backend.contract import Place
from msft.backend.names import EMBEDDING
from msft.backend.plan import Plan
from msft.convert.layouts import from_mindspore

# Where each process writes how MindSpore cut its parameters; `src_strategy_path_or_dir` reads these files.
STRATEGY_FILE = "./output/strategy/ckpt_strategy_rank_{rank}.ckpt"


def context(plan: Plan, rank: int = 0) -> dict:
    """Return the arguments of `mindspore.set_auto_parallel_context` for a plan.

    Every process feeds the whole batch, and gradients are sums: the loss is divided by all tokens before.
    """
    found = {
        "parallel_mode": "semi_auto_parallel",
        "pipeline_stages": plan.pipeline,
        "full_batch": True,
        "gradients_mean": False,
        "enable_parallel_optimizer": plan.shard_optimizer,
        "strategy_ckpt_config": {"save_file": STRATEGY_FILE.format(rank=rank)},
    }
    return found


def given(plan: Plan, rank: int, name: str, cut: tuple) -> Place | None:
    """Return the part of a tensor that a process gives, or None where a lower one of its stage gives it.

    `cut` is MindSpore's description of the parameter (`Cell.parameter_layout_dict`): the device matrix, which of its
    dimensions cut each axis, and at its end the whole shape, the slice's, and how the optimizer cuts on.
    """
    place, stage = rank % plan.stage_devices, rank // plan.stage_devices
    # A tied head is on the last stage too.
    if name == EMBEDDING and stage > 0 and plan.pipeline > 1:
        return None
    whole, (step, size) = tuple(cut[6]), cut[-2:]
    axes = [[axis] if isinstance(axis, int) else axis for axis in cut[1]]
    layout = from_mindspore(cut[0], axes, step, size)
    own = layout.place(place)
    if any(layout.place(other) == own for other in range(place)):
        return None
    shape = tuple(length // parts for length, parts in zip(whole, layout.counts(), strict=True))
    return Place(whole, tuple(number * length for number, length in zip(own, shape, strict=True)), shape)


def placed(array: np.ndarray, place: Place | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return a whole float32 array with a part in its place and zeros elsewhere; without a place, zeros alone."""
    whole = np.zeros(shape, np.float32)
    if place is not None:
        place.of(whole)[...] = array
    return whole
