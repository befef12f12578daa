"""CKPTs whose tensors are parts of canonical ones, or several, or transposed (`MindFormersNames.layout`)."""

from collections.abc import Mapping

import numpy as np

from msft.convert.joined import Joined, JoinedTensors
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored
from msft.errors import InputError
from msft.models.families import family
from msft.models.family import CkptTensor, Rows
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec


def is_meant(stored: Mapping[str, Stored | Joined], spec: ModelSpec) -> bool:
    """Whether tensors carry names that the family has in a CKPT alone."""
    kind = family(spec.family)
    if not kind.mindformers.layout:
        return False
    return (
        not _named(stored, spec)
        .keys()
        .isdisjoint(kind.mindformers.layout(spec).keys() - kind.files.tensors(spec).keys())
    )


def _named(stored: Mapping[str, Stored | Joined], spec: ModelSpec) -> dict[str, Stored | Joined]:
    """Tensors under the names of today."""
    found = {}
    for name, entry in stored.items():
        for old, new in family(spec.family).mindformers.aliases:
            name = name.replace(old, new)
        found[name] = entry
    return found


class LaidOutTensors:
    """A TensorSource of the canonical tensors of a CKPT; the tensors that hold one are read when it is.

    What does not have the shape that the layout says keeps its own name.
    """

    def __init__(self, stored: Mapping[str, Stored | Joined], spec: ModelSpec):
        stored = _named(stored, spec)
        self.source, self.shapes = JoinedTensors(stored), tensor_shapes(spec)
        layout = family(spec.family).mindformers.layout(spec)
        fitting = {name: held for name, held in layout.items() if self._fits(name, held)}
        self.places: dict[str, list[tuple[str, int, Rows, bool]]] = {}
        for name, held in fitting.items():
            at = 0
            for rows in held.parts:
                self.places.setdefault(rows.tensor, []).append((name, at, rows, held.is_transposed))
                at += rows.stop - rows.start
        self.tensors = {name: info for name, info in self.source.tensors.items() if name not in fitting}
        for name, places in self.places.items():
            self._check_dtypes(name, [place[0] for place in places])
            if sum(rows.stop - rows.start for _, _, rows, _ in places) == self._rows_of(name, places[0][3]):
                self.tensors[name] = TensorInfo(self.shapes[name], self.source.tensors[places[0][0]].dtype)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor; those of the CKPT that hold parts of it are in memory one after another."""
        if name not in self.places:
            return self.source.read(name)
        shape, whole = self.shapes[name], None
        for theirs, at, rows, is_transposed in self.places[name]:
            array = self.source.read(theirs)
            whole = np.empty(shape[::-1] if is_transposed else shape, array.dtype) if whole is None else whole
            whole[rows.start : rows.stop] = array[at : at + rows.stop - rows.start]
        return np.ascontiguousarray(whole.T) if is_transposed else whole

    def file_of(self, name: str) -> str:
        """Return the path of the (first) file that holds a tensor."""
        return self.source.file_of(self.places[name][0][0] if name in self.places else name)

    def _check_dtypes(self, name: str, held_by: list[str]) -> None:
        """Raise InputError for parts of other dtypes, of which one would be written with the other's numbers."""
        dtypes = {theirs: self.source.tensors[theirs].dtype for theirs in held_by}
        if len(set(dtypes.values())) > 1:
            found = ", ".join(f"{theirs} {dtype}" for theirs, dtype in dtypes.items())
            raise InputError(f"{self.source.file_of(held_by[0])}: parts of {name!r} must have one dtype: {found}")

    def _fits(self, name: str, held: CkptTensor) -> bool:
        if name not in self.source.tensors:
            return False
        shape, rows = self.shapes[held.parts[0].tensor], sum(part.stop - part.start for part in held.parts)
        return self.source.tensors[name].shape == (rows, *(shape[:1] if held.is_transposed else shape[1:]))

    def _rows_of(self, name: str, is_transposed: bool) -> int:
        return self.shapes[name][1 if is_transposed else 0]
