"""How tensor parallelism cuts a model: what each rank holds of every tensor, as Megatron-LM (arXiv 1909.08053) cuts it.

Modules that read the hidden states (q, k, v, gate, up) are cut by their outputs, those that write them (o, down) by
their inputs; norms, embedding and head are whole on every rank.
"""

import numpy as np

from msft.backend.contract import Place
from msft.backend.mesh import Mesh
from msft.backend.names import EMBEDDING
from msft.errors import RunError
from msft.models.spec import ModelSpec

BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")


def module_axis(module: str) -> int | None:
    """Return the axis along which the weight [outputs, inputs] of a module is cut: 0, 1, or None."""
    leaf = module.rpartition(".")[2]
    return 0 if leaf in BY_OUTPUTS else 1 if leaf in BY_INPUTS else None


def axis(name: str) -> int | None:
    """Return the axis along which a tensor is cut, by its canonical name; None = whole on every rank."""
    module, leaf = _module_and_leaf(name)
    cut = module_axis(module)
    whole = {("bias", 1), ("lora_A", 0), ("lora_B", 1)}
    return None if cut is None or (leaf, cut) in whole else cut


def is_partial(name: str) -> bool:
    """Whether a tensor is whole on every rank, yet its gradient there is that rank's share alone."""
    module, _ = _module_and_leaf(name)
    return module_axis(module) is not None and axis(name) is None


def _module_and_leaf(name: str) -> tuple[str, str]:
    """'...q_proj.lora_A.weight' -> ('...q_proj', 'lora_A'); '...q_proj.bias' -> ('...q_proj', 'bias')."""
    module, _, leaf = name.rpartition(".")
    if module.endswith((".lora_A", ".lora_B")):
        module, _, leaf = module.rpartition(".")
    return module, leaf


def cut(array: np.ndarray, along: int | None, mesh: Mesh) -> np.ndarray:
    """Return this rank's slice of a whole array."""
    return array if along is None else np.split(array, mesh.tensor, along)[mesh.tensor_rank]


def placed(array: np.ndarray, along: int, mesh: Mesh) -> np.ndarray:
    """Return a whole array with this rank's slice in its place and zeros elsewhere: summed over ranks, the whole."""
    shape = list(array.shape)
    shape[along] *= mesh.tensor
    whole = np.zeros(shape, array.dtype)
    np.split(whole, mesh.tensor, along)[mesh.tensor_rank][...] = array
    return whole


def whole_shape(name: str, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
    """Return the shape of the whole tensor of which `shape` is this rank's part."""
    along = axis(name)
    return tuple(size * mesh.tensor if place == along else size for place, size in enumerate(shape))


def places(shapes: dict[str, tuple[int, ...]], mesh: Mesh) -> dict[str, Place]:
    """Return what this rank gives of whole tensors of these shapes, so that all ranks give each number once.

    That is its rows (`Mesh.rows`) of its slice, where this rank `counts`.
    """
    found = {name: _place(shape, axis(name), mesh) for name, shape in shapes.items()}
    return {name: place for name, place in found.items() if counts(name, mesh) and place.shape[0]}


def counts(name: str, mesh: Mesh) -> bool:
    """Whether this rank stands for those of its model that hold the same of a tensor, for what is counted once.

    What is not cut is the first rank's of a stage; an embedding that is the head of the last stage too, the first's.
    """
    is_head_alone = name == EMBEDDING and mesh.stage > 0
    return not is_head_alone and (axis(name) is not None or mesh.tensor_rank == 0)


def _place(whole: tuple[int, ...], along: int | None, mesh: Mesh) -> Place:
    start, shape = [0] * len(whole), list(whole)
    if along is not None:
        shape[along] //= mesh.tensor
        start[along] = mesh.tensor_rank * shape[along]
    rows = mesh.rows(shape[0])
    start[0] += rows.start
    shape[0] = rows.stop - rows.start
    return Place(whole, tuple(start), tuple(shape))


class SlicedSource:
    """A weight source that gives this rank's slices."""

    def __init__(self, source, mesh: Mesh):
        self.source, self.mesh = source, mesh

    def read(self, name: str) -> np.ndarray:
        """Return this rank's slice of a tensor."""
        return cut(self.source.read(name), axis(name), self.mesh)


def check(spec: ModelSpec, mesh: Mesh) -> None:
    """Raise RunError when a model cannot be cut into so many parts."""
    problems = [f"{count} {what}" for what, count in cut_counts(spec).items() if count % mesh.tensor]
    if problems:
        raise RunError(f"model_parallel {mesh.tensor} does not divide {', '.join(problems)}")


def cut_counts(spec: ModelSpec) -> dict[str, int]:
    """Return what is dealt to the ranks of a model, by its name in config.json."""
    return {
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "intermediate_size": spec.intermediate_size,
    }
