"""Which tensors a conversion writes, under which names, and from which parts."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from msft.convert.dtypes import Cast
from msft.convert.source import TensorInfo, TensorSource
from msft.convert.stored import StoredTensors
from msft.errors import InputError
from msft.models.families import family
from msft.models.family import Family
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec


class Output(NamedTuple):
    """A tensor to write: its name in the new file, its shape and dtype there, and the source's tensors it joins."""

    name: str
    info: TensorInfo
    parts: tuple[str, ...]


def plan(
    spec: ModelSpec, source: TensorSource, cast: Cast, mindformers: bool, qkv_concat: bool = False
) -> list[Output]:
    """Return what to write for a checked source: every tensor the model needs, in the model's order.

    `mindformers` gives MindFormers' names instead of Hugging Face's; with `qkv_concat`, query, key and value are
    one tensor and gate and up another, along axis 0. What the source holds beyond the model is not written.
    """
    model = family(spec.family)
    groups = _groups(model, spec, mindformers and qkv_concat)
    return [
        _output(name if not mindformers else model.mindformers.write(name), parts, source, cast) for name, parts in groups
    ]


def pieces(output: Output, source: TensorSource, cast: Cast) -> Iterator[np.ndarray]:
    """Yield an output's content as uint8 arrays, each valid until the next; at most one tensor is in memory."""
    for part in output.parts:
        for array in _arrays(source, part):
            yield from cast.pieces(part, array)
            del array


def _arrays(source: TensorSource, name: str) -> Iterator[np.ndarray]:
    if isinstance(source, StoredTensors):
        yield from source.parts(name)
    else:
        yield source.read(name)


def _groups(model: Family, spec: ModelSpec, concatenated: bool) -> list[tuple[str, tuple[str, ...]]]:
    names = list(tensor_shapes(spec))
    if not concatenated:
        return [(name, (name,)) for name in names]
    groups: dict[str, tuple[str, ...]] = {}
    for name in names:
        joined = name
        for cell, modules in model.mindformers.concatenated.items():
            for module in modules:
                joined = joined.replace(f".{module}.", f".{cell}.")
        groups[joined] = (*groups.get(joined, ()), name)
    return list(groups.items())


def _output(name: str, parts: tuple[str, ...], source: TensorSource, cast: Cast) -> Output:
    infos = [cast.result(source.tensors[part]) for part in parts]
    dtypes = sorted({info.dtype for info in infos})
    if len(dtypes) > 1:
        raise InputError(f"{', '.join(parts)}: cannot be joined, they are {' and '.join(dtypes)}; give --dtype")
    rows = sum(info.shape[0] for info in infos)
    return Output(name, TensorInfo((rows, *infos[0].shape[1:]), infos[0].dtype), parts)
