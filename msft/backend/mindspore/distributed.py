"""The process group of msrun: sums over ranks, by collectives that every target has (AllReduce SUM, AllGather)."""

import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from types import SimpleNamespace

import mindspore
import numpy as np
from mindspore import Tensor, communication, ops

from msft.backend import slices
from msft.backend.buckets import BUCKET, buckets
from msft.backend.mesh import Mesh
from msft.backend.mindspore.device import TARGETS

# How long a rank waits for the others, for instance while the first one writes a checkpoint (MindSpore: 30 s on CPU).
WAIT_SECONDS = 1800
LAST_WORDS_SECONDS = 1.0

# The mesh of this process, and the sums over its groups of ranks.
_joined = SimpleNamespace(
    mesh=Mesh(), replicas=None, tensor=None, context=None, pipeline=None, ends=None, ahead=None, behind=None
)


def initialize(
    device: str,
    tensor: int = 1,
    context: int = 1,
    pipeline: int = 1,
    sequence: bool = False,
    vocabulary: bool = False,
) -> tuple[int, int]:
    """Join the group that msrun's environment describes; return (rank, world size).

    Of `pipeline` stages of a model, each is held by `tensor` ranks, and `context` ranks share the tokens of its rows;
    together they divide the world size. `sequence` and `vocabulary` are the mesh's.

    Sets MindSpore's device, which cannot be done any more afterwards. In msrun's scheduler process this does not
    return: it serves the group and ends the process.
    """
    if "MS_ROLE" in os.environ:
        os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", str(WAIT_SECONDS))
        mindspore.set_device(TARGETS[device])
        communication.init()
        _join(tensor, context, pipeline, sequence, vocabulary)
    return rank_and_world()


def _join(tensor: int, context: int, pipeline: int, sequence: bool, vocabulary: bool) -> None:
    rank, world = rank_and_world()
    data = world // (tensor * context * pipeline)
    _joined.mesh = mesh = Mesh(data, tensor, rank, context, pipeline, sequence, vocabulary)
    _joined.replicas = ops.AllReduce() if mesh.replicas == world else _own("replica", mesh.replica_groups, rank)
    for kind, size in (("tensor", tensor), ("context", context), ("pipeline", pipeline)):
        if size > 1:
            setattr(_joined, kind, _own(kind, getattr(mesh, f"{kind}_groups"), rank))
    if pipeline > 1:
        _join_stages(mesh)


def _join_stages(mesh: Mesh) -> None:
    """The sums of a stage with its neighbours, and of the first stage with the last."""
    if mesh.stage > 0:
        _joined.behind = _own(f"stage-{mesh.stage - 1}", mesh.neighbour_groups(mesh.stage - 1), mesh.rank)
    if not mesh.is_last_stage:
        _joined.ahead = _own(f"stage-{mesh.stage}", mesh.neighbour_groups(mesh.stage), mesh.rank)
    if mesh.stage == 0 or mesh.is_last_stage:
        _joined.ends = _own("ends", mesh.end_groups, mesh.rank)


def _own(kind: str, groups: list[list[int]], rank: int) -> ops.AllReduce:
    """The sum over the group that has this rank; every rank makes its own alone."""
    number, ranks = next((number, ranks) for number, ranks in enumerate(groups) if rank in ranks)
    name = f"{kind}-{number}"
    communication.create_group(name, ranks)
    return ops.AllReduce(group=name)


def mesh() -> Mesh:
    """Return which ranks work together."""
    return _joined.mesh


def rank_and_world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) outside a group."""
    return (communication.get_rank(), communication.get_group_size()) if _grouped() else (0, 1)


def sum_numbers(numbers: Sequence[float]) -> list[float]:
    """Return the numbers summed over replicas, in float64 and in the order of the ranks."""
    return _joined.mesh.sum_over_replicas(_gathered(numbers)).tolist()


def sum_over_parts(numbers: Sequence[float]) -> list[float]:
    """Return the numbers summed over the ranks that hold parts of one model, in float64."""
    return _joined.mesh.sum_over_parts(_gathered(numbers)).tolist()


def _gathered(numbers: Sequence[float]) -> np.ndarray:
    """The numbers of all ranks, float64 [ranks, n]."""
    if not _grouped():
        return np.array([numbers], dtype=np.float64)
    # As pairs of int32, because no target sums float64 and not every one carries it.
    bits = np.array(numbers, dtype=np.float64).view(np.int32)
    gathered = ops.AllGather()(Tensor(bits)).asnumpy()
    return gathered.view(np.float64).reshape(-1, len(numbers))


def sum_gradients(gradients: dict[str, Tensor], partial: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the gradients summed over replicas; `partial` ones over the ranks of a model's stage as well."""
    if not _grouped():
        return gradients
    if _joined.mesh.tensor > 1:
        shares = {name: gradient for name, gradient in gradients.items() if name in partial}
        gradients = gradients | _summed(shares, _joined.tensor)
    return _summed(gradients, _joined.replicas)


def reduce(values: Tensor) -> Tensor:
    """Return the values summed over the ranks that hold slices of one model's stage."""
    return _joined.tensor(values)


def gather_parts(part: Tensor) -> Tensor:
    """Return the parts [length, n] of the ranks that share rows, one after another, [ranks x length, n]."""
    ranks, rank = _joined.mesh.context, _joined.mesh.context_rank
    around = ops.zeros_like(part)
    whole = ops.concat([part if other == rank else around for other in range(ranks)])
    return _all_reduce(whole.reshape(-1), _joined.context).reshape(whole.shape)


def sum_parts(whole: Tensor) -> Tensor:
    """Return the sum over the ranks that share rows, of [ranks x length, n] this one's part [length, n]."""
    length, rank = len(whole) // _joined.mesh.context, _joined.mesh.context_rank
    return _all_reduce(whole.reshape(-1), _joined.context).reshape(whole.shape)[rank * length : (rank + 1) * length]


def largest(values: Tensor) -> Tensor:
    """Return the largest values [n] over the ranks that hold slices of one model's stage.

    No target but Ascend has maxima, so that all ranks' values are gathered.
    """
    return ops.ReduceMax()(gather(values.reshape(1, -1)), 0)


def gather(part: Tensor) -> Tensor:
    """Return the tokens of all ranks that hold slices of one model's stage, in their order; part [own, features].

    A sum of parts with zeros around them, which sends twice of what an AllGather sends.
    """
    return _joined.tensor(placed(part))


def placed(part: Tensor) -> Tensor:
    """Return this rank's tokens [own, features] in their place, with zeros for those of the others."""
    return _placing(_joined.mesh)(part)


def scatter(values: Tensor) -> Tensor:
    """Return this rank's tokens of the sum over the ranks of one model's stage; values [tokens, features].

    Its rows of the whole sum, which sends twice of what a ReduceScatter sends.
    """
    return _taking(_joined.mesh)(_joined.tensor(values))


@cache
def _placing(mesh: Mesh):
    def place(part):
        parts = ()
        for rank in range(mesh.tensor):
            parts = parts + (part if rank == mesh.tensor_rank else ops.zeros_like(part),)
        return ops.concat(parts)

    return mindspore.jit(place)


@cache
def _taking(mesh: Mesh):
    def take(values):
        size = values.shape[0] // mesh.tensor
        return values[size * mesh.tensor_rank : size * (mesh.tensor_rank + 1)]

    return mindspore.jit(take)


def sum_ends(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients summed over the first and the last stage, which alone call this."""
    return _summed(gradients, _joined.ends)


def exchange(given: Tensor | None, shape: tuple[int, ...] | None, dtype: mindspore.dtype, ahead: bool) -> Tensor | None:
    """Give values to the next stage (`ahead`) or the one before, and return what it gives, of a shape and dtype.

    None: nothing is given, or taken. Both stages call it at once. CPU has no messages but sums over a group, so each
    adds zeros where the other gives; what the earlier stage gives stands first.
    """
    own = [] if given is None else [given.reshape(-1)]
    other = [] if shape is None else [ops.zeros(math.prod(shape), dtype)]
    parts = own + other if ahead else other + own
    both = _all_reduce(parts[0] if len(parts) == 1 else ops.concat(parts), _joined.ahead if ahead else _joined.behind)
    if shape is None:
        return None
    taken = both[-math.prod(shape) :] if ahead else both[: math.prod(shape)]
    return taken.reshape(shape)


def join_stages(arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return arrays of all stages, float32 of these shapes, of which each rank has some; each is summed over stages."""
    found = {}
    for name, shape in shapes.items():
        own = np.ascontiguousarray(arrays[name]) if name in arrays else np.zeros(shape, np.float32)
        found[name] = _all_reduce(Tensor(own.reshape(-1)), _joined.pipeline).asnumpy().reshape(shape)
    return found


def join(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return whole arrays for this rank's slices of tensors, by canonical name; every rank of a model calls it."""
    found = dict(arrays)
    for name, along in ((name, slices.axis(name, _joined.mesh)) for name in arrays):
        if _joined.mesh.tensor > 1 and along is not None:
            found[name] = join_along(arrays[name], along)
    return found


def join_along(array: np.ndarray, along: int) -> np.ndarray:
    """Return the whole array of which each rank of a model's stage has its slice along an axis."""
    whole = slices.placed(array, along, _joined.mesh)
    return _all_reduce(Tensor(whole.reshape(-1)), _joined.tensor).asnumpy().reshape(whole.shape)


def gather_rows(parts: dict[str, Tensor], like: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and float32 tensor of the shapes of `like`; each rank with different rows has `parts` of its rows.

    A bucket at a time, so that what is yielded need not all be in memory.
    """
    shapes = {name: tensor.shape for name, tensor in like.items()}
    for names in buckets({name: tensor.size for name, tensor in like.items()}):
        yield from _summed({name: _padded(parts.get(name), shapes[name]) for name in names}, _joined.replicas).items()


def _padded(part: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """This rank's rows in their place and zeros around them."""
    rows = _joined.mesh.rows(shape[0])
    around = [(count, *shape[1:]) for count in (rows.start, shape[0] - rows.stop)]
    before, behind = ([ops.zeros(size, mindspore.float32)] if size[0] else [] for size in around)
    return ops.concat([*before, *([] if part is None else [part]), *behind])


def _summed(gradients: dict[str, Tensor], add: ops.AllReduce) -> dict[str, Tensor]:
    summed = {}
    for names in buckets({name: gradient.size for name, gradient in gradients.items()}):
        flat = _all_reduce(ops.concat([gradients[name].reshape(-1) for name in names]), add)
        start = 0
        for name in names:
            end = start + gradients[name].size
            summed[name] = flat[start:end].reshape(gradients[name].shape)
            start = end
    return summed


def shutdown() -> None:
    """Leave the group; after an error without waiting for the others."""
    if not _grouped():
        return
    if sys.exception() is None:
        # A rank that ends before the others have heard its last message makes them wait for it until they time out.
        sum_numbers([0.0])
        time.sleep(LAST_WORDS_SECONDS)
    communication.release()


def _grouped() -> bool:
    return os.environ.get("MS_ROLE") == "MS_WORKER" and communication.GlobalComm.INITED


def _all_reduce(flat: Tensor, add: ops.AllReduce) -> Tensor:
    parts = [add(flat[start : start + BUCKET]) for start in range(0, flat.size, BUCKET)]
    return parts[0] if len(parts) == 1 else ops.concat(parts)
