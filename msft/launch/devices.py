"""How many accelerators a machine has, seen without a framework."""

import os
from pathlib import Path

from msft.config import derive
from msft.config.schema import Recipe

# Device -> the variable that limits what is visible, and the device files.
_ACCELERATORS = {"npu": ("ASCEND_RT_VISIBLE_DEVICES", "davinci"), "cuda": ("CUDA_VISIBLE_DEVICES", "nvidia")}


def count(recipe: Recipe, folder: Path = Path("/dev")) -> int:
    """Return the number of accelerators that a recipe's device can use here, 1 when there is none or it is cpu."""
    asked = derive.device(recipe)
    kinds = _ACCELERATORS if asked == "auto" else {asked} & set(_ACCELERATORS)
    return max([1, *(_visible(*_ACCELERATORS[kind], folder) for kind in kinds)])


def _visible(variable: str, prefix: str, folder: Path) -> int:
    if variable in os.environ:
        return len([number for number in os.environ[variable].split(",") if number.strip()])
    return sum(path.name.removeprefix(prefix).isdigit() for path in folder.glob(f"{prefix}*"))
