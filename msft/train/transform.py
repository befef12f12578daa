"""A checkpoint rewritten for another layout of processes, one tensor in memory at a time."""

import shutil
from contextlib import ExitStack
from pathlib import Path

from msft.backend import slices
from msft.backend.mesh import Mesh
from msft.convert.adapter import CONFIG, WEIGHTS
from msft.errors import InputError
from msft.files import atomic_path
from msft.train import checkpoint, manifest, outputs, sliced
from msft.train.weights import read_tuned

# What a checkpoint has beside its tensors; a PEFT adapter stays whole for others to read.
KEPT = (checkpoint.STATE, outputs.RECIPE, outputs.VERSIONS, CONFIG, WEIGHTS)
# Systems let a process have 256 or 1024 open; each tensor is read once for so many files.
FILES_AT_ONCE = 128


def transform(source: Path, target: Path, data: int, tensor: int, vocabulary: bool = False) -> int:
    """Write a whole checkpoint as the parts of `data` x `tensor` processes; returns the bytes of the parts.

    With `vocabulary` embedding and head are cut over those of `tensor` too. Raises InputError for a damaged checkpoint,
    tensors that cannot be cut so, and a target that is there.
    """
    problems = manifest.problems(source)
    if problems:
        raise InputError(*(f"--src: {problem}" for problem in problems))
    if target.exists():
        raise InputError(f"--dst: {target} exists")
    state = checkpoint.read_state(source)
    first, second = checkpoint.read_moments(source)
    kinds = dict(zip(sliced.KINDS, (read_tuned(source, state.tuned), first, second), strict=True))
    meshes = [Mesh(data, tensor, rank, vocabulary=vocabulary) for rank in range(data * tensor)]
    _check(kinds["weights"].shapes, meshes[0], source)
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for name in KEPT:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        size = _write(temporary, kinds, meshes)
        manifest.write(temporary, sliced.wait(temporary, len(meshes)))
    return size


def _check(shapes: dict[str, tuple[int, ...]], mesh: Mesh, source: Path) -> None:
    cut = {name: shape[along] for name, shape in shapes.items() if (along := slices.axis(name, mesh)) is not None}
    uneven = [name for name, size in cut.items() if size % mesh.tensor]
    if uneven:
        raise InputError(f"--dst_layout: {mesh.tensor} does not divide {uneven[0]!r} {shapes[uneven[0]]} of {source}")


def _write(folder: Path, kinds: dict, meshes: list[Mesh]) -> int:
    """Write the files of all parts, and return their bytes."""
    starts = range(0, len(meshes), FILES_AT_ONCE)
    return sum(_write_some(folder, kinds, meshes[start : start + FILES_AT_ONCE]) for start in starts)


def _write_some(folder: Path, kinds: dict, meshes: list[Mesh]) -> int:
    shapes = kinds["weights"].shapes
    with ExitStack() as stack:
        files = [
            stack.enter_context(sliced.PartFile(folder, mesh.rank, slices.places(shapes, mesh))) for mesh in meshes
        ]
        for kind, tensors in kinds.items():
            for name in shapes:
                whole = tensors[name]
                for file in files:
                    if name in file.places:
                        file.add(kind, name, file.places[name].of(whole))
    return sum(file.path.stat().st_size for file in files)
