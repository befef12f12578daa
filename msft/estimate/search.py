"""The largest micro-batch that fits, and the fastest layout for a number of devices, by trying all valid ones."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from msft.estimate.devices import Device
from msft.estimate.layout import Layout, divisors, tensor_sizes
from msft.estimate.memory import Memory, memory
from msft.estimate.sizes import Sizes, Work
from msft.estimate.speed import Speed, speed

MOST_ROWS = 1 << 16
# Speeds that differ by less are equal.
EQUAL = 0.005


class Plan(NamedTuple):
    """A layout with what runs in it, its memory and its speed."""

    layout: Layout
    work: Work
    memory: Memory
    speed: Speed


class Best(NamedTuple):
    """The fastest plan that fits, None when none does; `tried` valid ones, of which `fitting` fit; `least` memory."""

    plan: Plan | None
    tried: int
    fitting: int
    least: Plan
    plain: Plan
    reason: str


def largest_rows(sizes: Sizes, work: Work, layout: Layout, device: Device) -> int:
    """Return the most rows of a micro-batch that fit, 0 when not even one does."""

    def fits(rows: int) -> bool:
        return memory(sizes, work._replace(rows=rows), layout).total <= device.usable

    fitting, rows = 0, 1
    while rows <= MOST_ROWS and fits(rows):
        fitting, rows = rows, 2 * rows
    # Between the last that fits and the first that does not.
    while rows - fitting > 1:
        middle = (rows + fitting) // 2
        fitting, rows = (middle, rows) if fits(middle) else (fitting, middle)
    return fitting


def best_layout(sizes: Sizes, work: Work, layout: Layout, device: Device, own: bool = False) -> Best:
    """Try every layout of as many devices with the step's rows kept; the reason tells why the best one is best.

    `own` leaves out what msft itself does not train with: pipelines that have more stages than micro-batches.
    """
    plans = [plan_of(sizes, tried, split, device) for split, tried in candidates(sizes, work, layout, own)]
    fitting = [plan for plan in plans if plan.memory.total <= device.usable]
    best = _fastest(fitting)
    least = min(plans, key=lambda plan: plan.memory.total)
    simple = [plan for plan in plans if plan.layout.replicas == layout.devices and not plan.layout.optimizer_sharding]
    plain = min(simple or plans, key=lambda plan: plan.memory.total)
    return Best(best, len(plans), len(fitting), least, plain, _reason(best, fitting, least, plain, device))


def _fastest(plans: list[Plan]) -> Plan | None:
    """The fastest plan; of those that are as fast within `EQUAL`, the simplest, and then the one with least memory."""
    limit = (1 - EQUAL) * max((plan.speed.tokens for plan in plans), default=0.0)
    equal = [plan for plan in plans if plan.speed.tokens >= limit]
    return min(equal, key=lambda plan: (_splits(plan), plan.memory.total), default=None)


def _splits(plan: Plan) -> int:
    layout = plan.layout
    return (layout.tensor > 1) + (layout.pipeline > 1) + layout.optimizer_sharding + plan.work.recompute


def plan_of(sizes: Sizes, work: Work, layout: Layout, device: Device) -> Plan:
    """Return a layout's plan."""
    return Plan(layout, work, memory(sizes, work, layout), speed(sizes, work, layout, device))


def candidates(sizes: Sizes, work: Work, layout: Layout, own: bool = False) -> Iterator[tuple[Layout, Work]]:
    """Yield all valid layouts of as many devices, with recompute on and off, for the same rows in a step.

    The product of the sizes is the number of devices; heads and widths divide over a tensor group within a machine,
    blocks over stages, the step's rows over data-parallel shares and their micro-batches. As many devices share the
    tokens of a row as the layout says.
    """
    rows_of_step = work.rows * layout.micro_batches * layout.data
    for tensor in tensor_sizes(sizes.spec, layout.whole_embedding):
        for pipeline in divisors(sizes.spec.num_hidden_layers):
            data, left = divmod(layout.devices, tensor * pipeline * layout.context)
            if left or rows_of_step % data:
                continue
            if own and sizes.spec.encoder and tensor * pipeline > 1:
                continue
            for rows in divisors(rows_of_step // data):
                micro_batches = rows_of_step // data // rows
                if own and micro_batches < pipeline:
                    continue
                base = layout._replace(data=data, tensor=tensor, pipeline=pipeline, micro_batches=micro_batches)
                base = base._replace(weights_sharded=False, fully_sharded=False)
                shardings, sequences = ((False, True) if size > 1 else (False,) for size in (base.replicas, tensor))
                for sharding, sequence, recompute in product(shardings, sequences, (False, True)):
                    split = base._replace(optimizer_sharding=sharding, sequence_parallel=sequence)
                    yield split, work._replace(rows=rows, recompute=recompute)


def _reason(best: Plan | None, fitting: list[Plan], least: Plan, plain: Plan, device: Device) -> str:
    if best is None:
        return f"no layout fits: the least memory is {_need(least, device)} ({least.layout}, recompute)"
    others = [plan for plan in fitting if plan.layout[:3] != best.layout[:3]]
    second = _fastest(others)
    gain = f"; next comes {second.layout} with {second.speed.tokens:,.0f} tokens/s" if second else ""
    if plain.memory.total > device.usable:
        return f"the fastest that fits: unsplit, a device needs {_need(plain, device)} even with recompute{gain}"
    return f"the fastest; the whole model fits on one device, so splitting it only adds traffic{gain}"


def _need(plan: Plan, device: Device) -> str:
    return f"{plan.memory.total / 1e9:.1f} of {device.usable / 1e9:.1f} GB"
