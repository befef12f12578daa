"""What msft knows of a model family; each is one small file in this folder, and an entry in `families.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from msft.models.spec import ModelSpec


@dataclass(frozen=True)
class MindFormersNames:
    """MindFormers' names of a family's parameters and cells; without any they are Hugging Face's.

    `renames` are replaced in this order, and back in the same. `leaves` maps Hugging Face's leaf modules to cells, for
    the modules LoRA can tune; `concatenated` the cells of `qkv_concat: True` to the modules they hold, along axis 0.
    """

    renames: tuple[tuple[str, str], ...] = ()
    leaves: Mapping[str, str] = field(default_factory=dict)
    concatenated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def write(self, name: str) -> str:
        """Return MindFormers' parameter (or cell) name for a Hugging Face one."""
        for hugging_face, mindformers in self.renames:
            name = name.replace(hugging_face, mindformers)
        return name

    def read(self, name: str) -> str:
        """Return Hugging Face's parameter (or module) name for a MindFormers one."""
        for hugging_face, mindformers in self.renames:
            name = name.replace(mindformers, hugging_face)
        return name


@dataclass(frozen=True)
class Family:
    """A model family: `spec_from_hf` reads a config.json (and says where it stands in errors).

    `model_type` and `architecture` are those of its config.json. `lora_targets` are the modules that get adapters
    where a recipe names none.
    """

    model_type: str
    architecture: str
    spec_from_hf: Callable[[dict, str], ModelSpec]
    lora_targets: tuple[str, ...]
    mindformers: MindFormersNames = field(default_factory=MindFormersNames)
