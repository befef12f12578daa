"""What msft knows of a model family; each is one small file in this folder, and an entry in `families.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from msft.models.experts import row_count, split_rows
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec

# For families whose prompts FastChat does not know.
DEFAULT_TEMPLATE = "vicuna_v1.1"


class Rows(NamedTuple):
    """Rows of a tensor, all its axes but the last counted as one."""

    tensor: str
    start: int
    stop: int


class CkptTensor(NamedTuple):
    """What a CKPT's tensor holds: rows of canonical tensors one below another, of each transposed first if so said."""

    parts: tuple[Rows, ...]
    is_transposed: bool = False


@dataclass(frozen=True)
class MindFormersNames:
    """MindFormers' names of a family's parameters and cells; without any they are Hugging Face's.

    `renames` are replaced in this order, and back in the same. `leaves` maps Hugging Face's leaf modules to cells, for
    the modules LoRA can tune; `concatenated` the cells of `qkv_concat: True` to the modules they hold, along axis 0.
    Where a CKPT's tensors are split, joined or transposed, `layout` tells all of them; `aliases` are then (name in old
    CKPTs, name in new ones), replaced in this order. Where MindFormers' model `repeats_head`, a head that is the
    embedding is in a CKPT a second time. `stacked` are the tensors of a layer's experts as `split_rows` takes them.
    """

    renames: tuple[tuple[str, str], ...] = ()
    leaves: Mapping[str, str] = field(default_factory=dict)
    concatenated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    repeats_head: bool = False
    layout: Callable[[ModelSpec], dict[str, CkptTensor]] | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    stacked: tuple[str, str, str] | None = None

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
class FileNames:
    """How a family's files name and join tensors, where these are not canonical.

    `renames` are (canonical, in files), replaced in this order; `prefixes` may be missing in files. A module of `fused`
    (by its name in files, within the layer) holds the canonical modules one after another, or where it `is_grouped` by
    key head (the queries that share it, the key, the value). `expert` are the tensors of an expert as `split_rows`
    takes them. `copies` are (name, of which tensor) that files may hold.
    """

    renames: tuple[tuple[str, str], ...] = ()
    prefixes: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_grouped: bool = False
    expert: tuple[str, str, str] | None = None
    copies: tuple[tuple[str, str], ...] = ()

    def tensors(self, spec: ModelSpec) -> dict[str, tuple[Rows, ...]]:
        """Return for each tensor of a file, in the model's order, which rows of canonical ones it holds."""
        found: dict[str, list[Rows]] = {}
        for name, shape in tensor_shapes(spec).items():
            for theirs, rows in in_files(name, shape, spec, self.expert, self._in_file):
                found.setdefault(theirs, []).append(rows)
        return {name: self._grouped(rows, spec) for name, rows in found.items()}

    def _in_file(self, name: str) -> str:
        for module, parts in self.fused.items():
            for part in parts:
                name = name.replace(f".{part}.", f".{module}.")
        for canonical, theirs in self.renames:
            name = name.replace(canonical, theirs)
        return name

    def _grouped(self, parts: list[Rows], spec: ModelSpec) -> tuple[Rows, ...]:
        if len(parts) != 3 or not self.is_grouped:
            return tuple(parts)
        heads, groups = spec.num_attention_heads // spec.num_key_value_heads, spec.num_key_value_heads
        sizes = heads * spec.head_dim, spec.head_dim, spec.head_dim
        return tuple(
            Rows(part.tensor, group * size, (group + 1) * size)
            for group in range(groups)
            for part, size in zip(parts, sizes, strict=True)
        )


def in_files(
    name: str, shape: tuple[int, ...], spec: ModelSpec, experts: tuple[str, str, str] | None, renamed: Callable
) -> list[tuple[str, Rows]]:
    """Return which tensors of a file hold which rows of a tensor: those of `experts`, or the one that is `renamed`."""
    if experts and len(shape) == 3:
        return [(theirs, Rows(name, *ends)) for theirs, *ends in split_rows(name, shape, spec.experts, experts)]
    return [(renamed(name), Rows(name, 0, row_count(shape)))]


@dataclass(frozen=True)
class Family:
    """A model family: `spec_from_hf` reads a config.json (and says where it stands in errors).

    `model_type` and `architecture` are those of its config.json. `lora_targets` are the modules that get adapters
    where a recipe names none. `native` gives the config.json of the transformers class that computes a model of this
    family on PyTorch, where it is another family's. `is_walked` says that this class hands nothing on to its attention,
    so that its layers are gone through by their description; so are those of a family that `is_ported`, which has no
    class there. `template` is FastChat's name for the prompts of its chat releases, for a tokenizer without a chat
    template of its own. An `is_encoder_decoder` learns answers from sources.
    """

    model_type: str
    architecture: str
    spec_from_hf: Callable[[dict, str], ModelSpec]
    lora_targets: tuple[str, ...]
    mindformers: MindFormersNames = field(default_factory=MindFormersNames)
    files: FileNames = field(default_factory=FileNames)
    native: Callable[[ModelSpec], dict] | None = None
    is_walked: bool = False
    is_ported: bool = False
    template: str = DEFAULT_TEMPLATE
    is_encoder_decoder: bool = False
