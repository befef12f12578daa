"""From a recipe to its estimate."""

from typing import NamedTuple

from msft.config import derive
from msft.config.checks import check_device
from msft.config.schema import Recipe
from msft.errors import InputError
from msft.estimate.devices import Device, device_named
from msft.estimate.layout import layout_of, on_devices
from msft.estimate.search import Best, Plan, best_layout, largest_rows, plan_of
from msft.estimate.sizes import Sizes, sizes_of, work_of

# What a recipe runs on when nobody says which device: its engine's first aim.
DEFAULTS = {"npu": "ascend910b", "cuda": "a100", "cpu": "cpu"}
FIRST_AIM = {"mindspore": "npu", "torch": "cuda"}


class Estimate(NamedTuple):
    """A recipe's estimate: `plans` and `rows` (the largest micro-batch that fits) without and with recompute.

    `best` is of all layouts, `own` of those that msft itself trains in.
    """

    recipe: Recipe
    device: Device
    sizes: Sizes
    plans: dict[bool, Plan]
    rows: dict[bool, int]
    best: Best
    own: Best

    @property
    def asked(self) -> Plan:
        """The plan with recompute as the recipe has it."""
        return self.plans[derive.recompute(self.recipe)]


def estimate(recipe: Recipe, device_name: str | None = None, devices: int | None = None) -> Estimate:
    """Return a recipe's estimate on so many devices of a name (None: as the recipe says).

    Raises InputError with all problems of device and layout.
    """
    problems: list[str] = []
    device = spec = None
    try:
        device = device_named(device_name or _default(recipe))
        check_device(recipe, device.kind)
    except InputError as error:
        problems += error.problems
    try:
        spec = derive.model_spec(recipe)
        layout = on_devices(recipe, layout_of(recipe), devices, spec)
        sizes = sizes_of(spec, derive.tuning(recipe, spec))
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(*problems)
    work = work_of(recipe, device.kind)._replace(parts=layout.context)
    works = {value: work._replace(recompute=value) for value in (False, True)}
    return Estimate(
        recipe=recipe,
        device=device,
        sizes=sizes,
        plans={value: plan_of(sizes, work, layout, device) for value, work in works.items()},
        rows={value: largest_rows(sizes, work, layout, device) for value, work in works.items()},
        best=best_layout(sizes, works[False], layout, device),
        own=best_layout(sizes, works[False], layout, device, own=True),
    )


def _default(recipe: Recipe) -> str:
    kind = derive.device(recipe)
    return DEFAULTS[FIRST_AIM[recipe.backend] if kind == "auto" else kind]
