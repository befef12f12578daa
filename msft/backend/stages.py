"""How a pipeline deals a model out: each stage has as many layers, the first one the embedding, the last norm and head.

A head that is the embedding's tensor lives on both.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from msft.backend.contract import Tuning
from msft.backend.mesh import Mesh
from msft.backend.names import EMBEDDING
from msft.errors import RunError
from msft.models.adapters import peft_names
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def layers(spec: ModelSpec, mesh: Mesh) -> range:
    """Return the numbers of the layers of this rank's stage."""
    count = spec.num_hidden_layers // mesh.pipeline
    return range(mesh.stage * count, (mesh.stage + 1) * count)


def is_own(name: str, spec: ModelSpec, mesh: Mesh) -> bool:
    """Whether this rank's stage has a tensor or a module of a layer, by its canonical name."""
    layer = _LAYER.search(name)
    if layer:
        return int(layer[1]) in layers(spec, mesh)
    is_first_needed = name == EMBEDDING and mesh.stage == 0
    is_last_needed = name != EMBEDDING or spec.tie_word_embeddings
    return is_first_needed or (mesh.is_last_stage and is_last_needed)


def own(names: Iterable[str], spec: ModelSpec, mesh: Mesh) -> tuple[str, ...]:
    """Return the names of what this rank's stage has."""
    return tuple(name for name in names if is_own(name, spec, mesh))


def own_tuning(tuning: Tuning, spec: ModelSpec, mesh: Mesh) -> Tuning:
    """Return what is trained of this rank's stage."""
    modules = own(tuning.lora.modules, spec, mesh) if tuning.lora else ()
    return Tuning(own(tuning.parameters, spec, mesh), replace(tuning.lora, modules=modules) if modules else None)


def tuned_shapes(spec: ModelSpec, tuning: Tuning) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tuned tensors of a model, of all its stages."""
    shapes = tensor_shapes(spec)
    found = {name: shapes[name] for name in tuning.parameters}
    for module in tuning.lora.modules if tuning.lora else ():
        outputs, inputs = shapes[f"{module}.weight"]
        found |= zip(peft_names(module), ((tuning.lora.rank, inputs), (outputs, tuning.lora.rank)), strict=True)
    return found


def check(spec: ModelSpec, mesh: Mesh) -> None:
    """Raise RunError when layers cannot be dealt to so many stages."""
    if spec.num_hidden_layers % mesh.pipeline:
        raise RunError(f"pipeline_stage {mesh.pipeline} does not divide num_hidden_layers ({spec.num_hidden_layers})")
