"""How tensor parallelism cuts a model: what each rank holds of every tensor, as Megatron-LM (arXiv 1909.08053) cuts it.

Modules that read the hidden states (q, k, v, gate, up) are cut by their outputs, those that write them (o, down) by
their inputs; embedding and head are cut by the vocabulary where the mesh says so; norms are whole on every rank.
"""

from collections.abc import Container, Iterator, Mapping

import numpy as np

from msft.backend import names, random
from msft.backend.contract import Lora, Place
from msft.backend.mesh import Mesh
from msft.models.spec import ModelSpec

BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")
# What norms each head of those that a rank has.
BY_HEAD = ("q_norm", "k_norm")


def module_axis(module: str) -> int | None:
    """Return the axis along which the weight [outputs, inputs] of a module is cut: 0, 1, or None."""
    leaf = module.rpartition(".")[2]
    return 0 if leaf in BY_OUTPUTS else 1 if leaf in BY_INPUTS else None


def axis(name: str, mesh: Mesh) -> int | None:
    """Return the axis along which a tensor is cut, by its canonical name; None = whole on every rank of a model."""
    if name in (names.EMBEDDING, names.HEAD):
        return 0 if mesh.is_vocabulary_cut else None
    module, leaf = _module_and_leaf(name)
    cut = module_axis(module)
    whole = {("bias", 1), ("lora_A", 0), ("lora_B", 1)}
    return None if cut is None or (leaf, cut) in whole else cut


def is_partial(name: str, mesh: Mesh) -> bool:
    """Whether a tensor is whole on every rank of a model, yet its gradient there is that rank's share alone.

    So are those of modules that are cut, that of a head for each rank's share of the positions, and where each rank
    has its part of the tokens, all.
    """
    if axis(name, mesh) is not None:
        return False
    module = _module_and_leaf(name)[0]
    of_cut = module_axis(module) is not None or module.endswith(BY_HEAD)
    return of_cut or mesh.is_sequence_cut or (name == names.HEAD and mesh.shares_losses)


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
    along = axis(name, mesh)
    return tuple(size * mesh.tensor if place == along else size for place, size in enumerate(shape))


def own_shape(name: str, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
    """Return the shape of this rank's part of a whole tensor."""
    along = axis(name, mesh)
    return tuple(size // mesh.tensor if place == along else size for place, size in enumerate(shape))


def places(shapes: dict[str, tuple[int, ...]], mesh: Mesh) -> dict[str, Place]:
    """Return what this rank gives of whole tensors of these shapes, so that all ranks give each number once.

    That is its rows (`Mesh.rows`) of its slice, where this rank `counts`.
    """
    found = {name: _place(shape, axis(name, mesh), mesh) for name, shape in shapes.items()}
    return {name: place for name, place in found.items() if counts(name, mesh) and place.shape[0]}


def counts(name: str, mesh: Mesh) -> bool:
    """Whether this rank stands for those of its model that hold the same of a tensor, for what is counted once.

    What is not cut is the first rank's of a stage; an embedding that is the head of the last stage too, the first's.
    """
    is_head_alone = name == names.EMBEDDING and mesh.stage > 0
    return not is_head_alone and (axis(name, mesh) is not None or mesh.tensor_rank == 0)


def _place(whole: tuple[int, ...], along: int | None, mesh: Mesh) -> Place:
    start, shape = [0] * len(whole), list(whole)
    if along is not None:
        shape[along] //= mesh.tensor
        start[along] = mesh.tensor_rank * shape[along]
    rows = mesh.rows(shape[0])
    start[0] += rows.start
    shape[0] = rows.stop - rows.start
    return Place(whole, tuple(start), tuple(shape))


class SlicedArrays(Mapping[str, np.ndarray]):
    """This rank's slices of those whole arrays that it holds, each read and cut when it is asked for."""

    def __init__(self, arrays: Mapping[str, np.ndarray], mesh: Mesh, held: Container[str]):
        self.arrays, self.mesh = arrays, mesh
        self.names = [name for name in arrays if name in held]

    def __getitem__(self, name: str) -> np.ndarray:
        return cut(self.arrays[name], axis(name, self.mesh), self.mesh)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class SlicedSource:
    """A weight source that gives this rank's slices."""

    def __init__(self, source, mesh: Mesh):
        self.source, self.mesh = source, mesh

    def read(self, name: str) -> np.ndarray:
        """Return this rank's slice of a tensor."""
        return cut(self.source.read(name), axis(name, self.mesh), self.mesh)


def adapter_start(module: str, inputs: int, lora: Lora, seed: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Return this rank's slices of an adapter's first A, float32 [rank, inputs], and of dropout's keys, int32 [inputs].

    `inputs` are those that the module has on this rank; all ranks of a model together draw what one process draws.
    """
    by_inputs = module_axis(module) == 1
    whole = inputs * mesh.tensor if by_inputs else inputs
    drawn, keys = random.lora_a(seed, module, lora.rank, whole), random.feature_keys(module, whole)
    return (cut(drawn, 1, mesh), cut(keys, 0, mesh)) if by_inputs else (drawn, keys)


def undivided(spec: ModelSpec, tensor: int, vocabulary: bool) -> list[str]:
    """Return what of a model cannot be dealt to so many ranks, as in 'num_attention_heads (9)'.

    `vocabulary` says that embedding and head are dealt too. Layers that are not Llama's are not dealt.
    """
    if tensor > 1 and not spec.is_like_llama:
        return [f"the layers of {spec.family}"]
    counts = {
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "intermediate_size": spec.intermediate_size,
    }
    if vocabulary:
        counts["vocab_size"] = spec.vocab_size
    return [f"{name} ({count})" for name, count in counts.items() if count % tensor]
