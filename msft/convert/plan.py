"""Which tensors a conversion writes, under which names, and from which parts."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from msft.convert.dtypes import Cast
from msft.convert.source import TensorInfo, TensorSource
from msft.convert.stored import StoredTensors
from msft.errors import InputError
from msft.models.families import family
from msft.models.family import Family, Rows
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec


class Output(NamedTuple):
    """A tensor to write: its name in the new file, its shape and dtype there, and the source's rows it joins.

    They are rows of the source's tensors as these are, or where it `is_transposed`, transposed.
    """

    name: str
    info: TensorInfo
    parts: tuple[Rows, ...]
    is_transposed: bool = False


def plan(
    spec: ModelSpec, source: TensorSource, cast: Cast, mindformers: bool, qkv_concat: bool = False
) -> list[Output]:
    """Return what to write for a checked source: every tensor the model needs, in the model's order.

    `mindformers` gives MindFormers' names instead of those of the family's files; with `qkv_concat`, query, key and
    value are one tensor and gate and up another, along axis 0. What the source holds beyond the model is not written.
    """
    model = family(spec.family)
    if not mindformers:
        return [_output(name, parts, source, cast) for name, parts in model.files.tensors(spec).items()]
    if model.mindformers.layout:
        found = model.mindformers.layout(spec)
        return [_output(name, held.parts, source, cast, held.is_transposed) for name, held in found.items()]
    groups = _groups(model, spec, qkv_concat)
    if model.mindformers.repeats_head and spec.tie_word_embeddings:
        groups.append((spec.head, (Rows(spec.embedding, 0, spec.vocab_size),)))
    return [_output(model.mindformers.write(name), parts, source, cast) for name, parts in groups]


def pieces(output: Output, source: TensorSource, cast: Cast) -> Iterator[np.ndarray]:
    """Yield an output's content as uint8 arrays, each valid until the next; at most one tensor is in memory."""
    if output.is_transposed or not all(_is_whole(part, source) for part in output.parts):
        yield from cast.pieces(output.name, _assembled(output, source))
        return
    for part in output.parts:
        for array in _arrays(source, part.tensor):
            yield from cast.pieces(part.tensor, array)
            del array


def _is_whole(part: Rows, source: TensorSource) -> bool:
    return (part.start, part.stop) == (0, source.tensors[part.tensor].shape[0])


def _assembled(output: Output, source: TensorSource) -> np.ndarray:
    """A tensor that holds rows of others in turns."""
    whole, at = None, {}
    for part in output.parts:
        at.setdefault(part.tensor, []).append(part)
    places, row = {}, 0
    for part in output.parts:
        places[part] = row
        row += part.stop - part.start
    for tensor, parts in at.items():
        array = source.read(tensor).T if output.is_transposed else source.read(tensor)
        whole = np.empty((row, *array.shape[1:]), array.dtype) if whole is None else whole
        for part in parts:
            whole[places[part] : places[part] + part.stop - part.start] = array[part.start : part.stop]
    return whole


def _arrays(source: TensorSource, name: str) -> Iterator[np.ndarray]:
    if isinstance(source, StoredTensors):
        yield from source.parts(name)
    else:
        yield source.read(name)


def _groups(model: Family, spec: ModelSpec, concatenated: bool) -> list[tuple[str, tuple[Rows, ...]]]:
    groups: dict[str, tuple[Rows, ...]] = {}
    for name, shape in tensor_shapes(spec).items():
        joined = name
        for cell, modules in model.mindformers.concatenated.items() if concatenated else ():
            for module in modules:
                joined = joined.replace(f".{module}.", f".{cell}.")
        groups[joined] = (*groups.get(joined, ()), Rows(name, 0, shape[0]))
    return list(groups.items())


def _output(
    name: str, parts: tuple[Rows, ...], source: TensorSource, cast: Cast, is_transposed: bool = False
) -> Output:
    infos = [cast.result(source.tensors[part.tensor]) for part in parts]
    dtypes = sorted({info.dtype for info in infos})
    if len(dtypes) > 1:
        names = ", ".join(dict.fromkeys(part.tensor for part in parts))
        raise InputError(f"{names}: cannot be joined, they are {' and '.join(dtypes)}; give --dtype")
    rows = sum(part.stop - part.start for part in parts)
    others = infos[0].shape[:1] if is_transposed else infos[0].shape[1:]
    return Output(name, TensorInfo((rows, *others), infos[0].dtype), parts, is_transposed)
