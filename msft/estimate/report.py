"""What an estimate tells: a few lines, two tables, the answers; and all numbers as JSON."""

from pathlib import Path

from msft import console
from msft.config import derive
from msft.estimate.run import Estimate
from msft.estimate.search import Plan
from msft.files import write_json

GIGA = 1e9
MEMORY = {
    "frozen": "frozen weights",
    "tuned": "tuned weights, float32",
    "gradients": "gradients",
    "moments": "optimizer's moments",
    "activations": "activations",
    "logits": "logits",
    "working": "a block's way back, copies",
    "communication": "communication buffers",
    "framework": "framework",
}
TIME = {
    "products": "matrix products",
    "memory": "other operators",
    "optimizer": "optimizer",
    "bubble": "pipeline's bubble",
    "data": "gradients between devices",
    "tensor": "activations between devices",
    "context": "keys and values between devices",
    "pipeline": "pipeline's sends",
}
ASSUMED = (
    "assumed: every row is full and every token supervised; nothing is sent while products run. Memory was checked "
    "on CPU alone, speed against published figures (CONTRIBUTING.md tells how far off it is)."
)


def tell(result: Estimate) -> None:
    """Print an estimate."""
    for line in headline(result):
        console.say(line)
    console.show(_memory_table(result), _time_table(result))
    for line in answers(result):
        console.say(line)
    console.note(ASSUMED)


def headline(result: Estimate) -> list[str]:
    """Say what is estimated: model, tuning, step, device."""
    sizes, plan, device = result.sizes, result.asked, result.device
    work, layout, spec = plan.work, plan.layout, sizes.spec
    pet = derive.model_keys(result.recipe).pet_config
    kind = f"LoRA rank {pet.lora_rank}" if pet else "full"
    share = 100 * sizes.tuned / sizes.parameters
    rows = work.rows * layout.micro_batches * layout.data
    return [
        f"model: {spec.family}, {spec.num_hidden_layers} layers, hidden {spec.hidden_size}, "
        f"{sizes.parameters:,} parameters; tuned ({kind}): {sizes.tuned:,} ({share:.3g} %)",
        f"step: {work.rows} rows of {work.length:,} tokens x {layout.micro_batches} micro-batches x data "
        f"{layout.data} = {rows * work.length:,} tokens, products in {work.precision.compute}",
        f"layout: {layout}, {_devices(layout.devices, device.name)}",
        f"device: {device.source}; of this it reaches {device.efficiency:.0%} (fitted)",
    ]


def answers(result: Estimate) -> list[str]:
    """Say what fits and which layout is best."""
    rows, plan, best, device = result.rows, result.asked, result.best, result.device
    need, usable = plan.memory.total / GIGA, device.usable / GIGA
    fits = "fits into" if need <= usable else "does NOT fit into"
    lines = [
        f"memory: {need:.2f} GB {fits} {usable:.1f} GB (90 % of a device)",
        f"largest micro-batch that fits, in rows of {plan.work.length:,} tokens: {rows[False]}; with recompute "
        f"{rows[True]}",
    ]
    if best.plan is None:
        return [*lines, f"best layout for {_devices(plan.layout.devices, device.name)}: {best.reason}"]
    found = best.plan
    recompute = "recompute" if found.work.recompute else "no recompute"
    return [
        *lines,
        f"best layout for {_devices(plan.layout.devices, device.name)}: {found.layout}, {found.work.rows} rows x "
        f"{found.layout.micro_batches} micro-batches, {recompute}: {found.speed.tokens:,.0f} tokens/s a device, "
        f"{found.memory.total / GIGA:.2f} GB",
        f"  because: {best.reason}",
        *_own(result),
    ]


def _own(result: Estimate) -> list[str]:
    """Say what is best of the layouts that msft itself trains in, where the best one is none of them."""
    best, own = result.best.plan.layout, result.own
    if best.micro_batches >= best.pipeline:
        return []
    said = "without stages that have no micro-batch, which msft does not train with"
    if own.plan is None:
        return [f"  {said}: {own.reason}"]
    found, recompute = own.plan, "recompute" if own.plan.work.recompute else "no recompute"
    return [
        f"  {said}: {found.layout}, {found.work.rows} rows x {found.layout.micro_batches} micro-batches, {recompute}: "
        f"{found.speed.tokens:,.0f} tokens/s a device, {found.memory.total / GIGA:.2f} GB"
    ]


def _devices(count: int, name: str) -> str:
    return f"{count} {name}" if count > 1 else f"one {name}"


def _columns(result: Estimate) -> list[str]:
    asked = derive.recompute(result.recipe)
    words = {False: "no recompute", True: "recompute"}
    return [f"{words[value]}{' (the recipe)' if value == asked else ''}" for value in result.plans]


def _table(title: str, columns: list[str]):
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _memory_table(result: Estimate):
    table = _table("memory of one device, GB", _columns(result))
    found = [plan.memory for plan in result.plans.values()]
    for name, words in MEMORY.items():
        values = [getattr(memory, name) for memory in found]
        if any(values):
            table.add_row(words, *(f"{value / GIGA:.2f}" for value in values))
    table.add_section()
    table.add_row("together", *(f"{memory.total / GIGA:.2f}" for memory in found))
    table.add_row("most is held at", *(memory.moment for memory in found))
    return table


def _time_table(result: Estimate):
    table = _table("a step", _columns(result))
    found = [plan.speed for plan in result.plans.values()]
    for name, words in TIME.items():
        if any(getattr(speed, name) for speed in found):
            table.add_row(words, *(_seconds(plan, name) for plan in result.plans.values()))
    table.add_section()
    table.add_row("together", *(f"{speed.step:.3f} s" for speed in found))
    table.add_row("tokens/s a device", *(f"{speed.tokens:,.0f}" for speed in found))
    table.add_row("share of the peak (MFU)", *(f"{speed.utilisation:.1%}" for speed in found))
    return table


def _seconds(plan: Plan, name: str) -> str:
    sent = getattr(plan.speed.sent, name, None)
    volume = f"{sent / GIGA:.2f} GB, " if sent else ""
    return f"{volume}{getattr(plan.speed, name):.3f} s"


def write(path: Path, result: Estimate) -> None:
    """Write all numbers: bytes, seconds, bytes sent."""
    write_json(path, as_json(result))
    console.note(f"written: {path}")


def as_json(result: Estimate) -> dict:
    """Return an estimate as plain values."""
    sizes, best = result.sizes, result.best
    words = {False: "no_recompute", True: "recompute"}
    return {
        "device": result.device._asdict(),
        "parameters": sizes.parameters,
        "tuned_parameters": sizes.tuned,
        "recompute_in_recipe": derive.recompute(result.recipe),
        "plans": {words[value]: _plan(plan) for value, plan in result.plans.items()},
        "largest_rows": {words[value]: rows for value, rows in result.rows.items()},
        "best": _plan(best.plan) if best.plan else None,
        "reason": best.reason,
        "best_of_msft": _plan(result.own.plan) if result.own.plan else None,
        "layouts": {"valid": best.tried, "fitting": best.fitting},
    }


def _plan(plan: Plan) -> dict:
    speed = plan.speed._asdict() | {"step": plan.speed.step, "sent": plan.speed.sent._asdict()}
    return {
        "layout": plan.layout._asdict(),
        "rows": plan.work.rows,
        "length": plan.work.length,
        "recompute": plan.work.recompute,
        "memory": plan.memory._asdict() | {"total": plan.memory.total},
        "speed": speed,
    }
