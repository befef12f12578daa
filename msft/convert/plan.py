"""Which tensors a conversion writes, under which names, and from which parts."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from msft.convert import file_names, stored
from msft.convert.dtypes import Cast
from msft.convert.joined import JoinedTensors
from msft.convert.source import TensorInfo, TensorSource
from msft.convert.stored import StoredTensors
from msft.errors import InputError
from msft.models.experts import row_count
from msft.models.families import family
from msft.models.family import Family, Rows, in_files
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


class Reader:
    """Reads parts of a source's tensors: of stored ones nothing else, of others the last whole one is kept for more."""

    def __init__(self, source: TensorSource):
        self.source = source
        self._name, self._last = "", None

    def arrays(self, part: Rows) -> Iterator[np.ndarray]:
        """Yield a part's content as arrays, each valid until the next."""
        name, source = part.tensor, self.source
        if part.stop - part.start < row_count(source.tensors[name].shape):
            yield self._rows(part)
        elif isinstance(source, StoredTensors | JoinedTensors):
            yield from source.parts(name)
        else:
            yield source.read(name)

    def _rows(self, part: Rows) -> np.ndarray:
        name, source = part.tensor, self.source
        entry = (getattr(source, "stored", None) or getattr(source, "entries", {})).get(name)
        if isinstance(entry, stored.Stored) and entry.strides is None:
            rows = stored.rows(file_names.flat(entry, name), part.start, part.stop)
            return StoredTensors({name: rows}).read(name)
        if name != self._name:
            self._name, self._last = name, None
            self._last = _matrix(source.read(name))
        return self._last[part.start : part.stop]


def pieces(output: Output, reader: Reader, cast: Cast) -> Iterator[np.ndarray]:
    """Yield an output's content as uint8 arrays, each valid until the next; at most one tensor is in memory."""
    # Rows of several tensors in turns; those of a single one are read one after another.
    if output.is_transposed or 1 < len({part.tensor for part in output.parts}) < len(output.parts):
        yield from cast.pieces(output.name, _assembled(output, reader.source))
        return
    for part in output.parts:
        for array in reader.arrays(part):
            yield from cast.pieces(part.tensor, array)
            del array


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
        array = source.read(tensor).T if output.is_transposed else _matrix(source.read(tensor))
        whole = np.empty((row, *array.shape[1:]), array.dtype) if whole is None else whole
        for part in parts:
            whole[places[part] : places[part] + part.stop - part.start] = array[part.start : part.stop]
    return whole


def _matrix(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1]) if array.ndim > 2 else array


def _groups(model: Family, spec: ModelSpec, concatenated: bool) -> list[tuple[str, tuple[Rows, ...]]]:
    groups: dict[str, tuple[Rows, ...]] = {}
    for name, shape in tensor_shapes(spec).items():
        for theirs, rows in in_files(name, shape, spec, model.mindformers.stacked, _joined(model, concatenated)):
            groups[theirs] = (*groups.get(theirs, ()), rows)
    return list(groups.items())


def _joined(model: Family, concatenated: bool):
    """What a tensor is called that holds another one."""

    def joined(name: str) -> str:
        for cell, modules in model.mindformers.concatenated.items() if concatenated else ():
            for module in modules:
                name = name.replace(f".{module}.", f".{cell}.")
        return name

    return joined


def _output(
    name: str, parts: tuple[Rows, ...], source: TensorSource, cast: Cast, is_transposed: bool = False
) -> Output:
    infos = [cast.result(source.tensors[part.tensor]) for part in parts]
    dtypes = sorted({info.dtype for info in infos})
    if len(dtypes) > 1:
        names = ", ".join(dict.fromkeys(part.tensor for part in parts))
        raise InputError(f"{names}: cannot be joined, they are {' and '.join(dtypes)}; give --dtype")
    shape = _shape(parts, [info.shape[::-1] if is_transposed else info.shape for info in infos])
    return Output(name, TensorInfo(shape, infos[0].dtype), parts, is_transposed)


def _shape(parts: tuple[Rows, ...], shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what holds these parts of tensors of these shapes: of a stacked tensor's, a stack as well."""
    rows, whole = sum(part.stop - part.start for part in parts), shapes[0]
    if len(whole) < 3:
        return (rows, *whole[1:])
    if len(parts) > 1:
        return len(parts), rows // len(parts), whole[-1]
    return whole if rows == row_count(whole) else (rows, whole[-1])
