"""Learning-rate schedules as functions of the optimizer step.

Steps count from 0: the first update of a run uses the value at 0, as in MindFormers 1.3.2 and transformers.
Skipped steps do not count, so the rate does not move on an overflow (both toolkits again).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

Schedule = Callable[[int], float]


class Resolved(NamedTuple):
    """A schedule with every number known: `kind` is cosine, linear or constant, lengths are in optimizer steps."""

    kind: str
    peak: float
    total_steps: int
    warmup_steps: int
    warmup_start: float
    lr_end: float
    num_cycles: float

    def __str__(self) -> str:
        return f"{self.kind}, peak {self.peak:g}, warm-up {self.warmup_steps} of {self.total_steps} steps"


def build(resolved: Resolved) -> Schedule:
    """Return the learning rate as a function of the step."""
    kind, peak, total, warmup, start, end, cycles = resolved
    after = {
        "cosine": lambda: cosine(peak, total, warmup, end, cycles),
        "linear": lambda: linear(peak, total, warmup),
        "constant": lambda: constant(peak),
    }[kind]()
    return with_warmup(after, peak, warmup, start)


def warmup_length(total_steps: int, ratio: float | None, steps: int | None, round_up: bool = False) -> int:
    """Return the number of warm-up steps; a ratio wins over a count and is rounded down, as in MindFormers, or up."""
    if ratio is not None:
        return math.ceil(total_steps * ratio) if round_up else int(total_steps * ratio)
    return steps or 0


def with_warmup(after: Schedule, peak: float, warmup_steps: int, start: float = 0.0) -> Schedule:
    """Return a schedule that rises linearly from `start` to `peak` in `warmup_steps`, then follows `after`."""

    def rate(step: int) -> float:
        if step < warmup_steps:
            return start + (peak - start) * step / warmup_steps
        return after(step)

    return rate


def constant(peak: float) -> Schedule:
    """Return `peak` at every step (MindFormers' ConstantWarmUpLR after its warm-up)."""
    return lambda step: peak


def linear(peak: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Fall linearly from `peak` at the end of the warm-up to 0 at `total_steps` (LinearWithWarmUpLR)."""
    length = max(1, total_steps - warmup_steps)
    return lambda step: peak * max(0.0, (total_steps - step) / length)


def cosine(peak: float, total_steps: int, warmup_steps: int = 0, end: float = 0.0, num_cycles: float = 0.5) -> Schedule:
    """Fall from `peak` to `end` along `num_cycles` cosine waves; `end` from `total_steps` on (CosineWithWarmUpLR)."""
    length = max(1, total_steps - warmup_steps)

    def rate(step: int) -> float:
        if step >= max(1, total_steps):
            return end
        wave = 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * (step - warmup_steps) / length))
        return end + (peak - end) * max(0.0, wave)

    return rate
