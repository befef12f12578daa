"""Tensors that are read when they are asked for, so that no state is ever held whole only to be dealt out."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from msft.convert.stored import StoredTensors


class Lazy(Mapping[str, np.ndarray]):
    """A mapping from names to tensors that `read`(name) gives; `shapes` are known without reading."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], np.ndarray]):
        self.shapes, self._read = shapes, read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def chosen(arrays: Mapping[str, np.ndarray], names: Iterable[str]) -> Lazy:
    """Return some of the tensors of a mapping, which it may still have to read."""
    shapes = arrays.shapes if isinstance(arrays, Lazy) else {name: array.shape for name, array in arrays.items()}
    return Lazy({name: shapes[name] for name in names}, arrays.__getitem__)


def stored(source: StoredTensors, names: dict[str, str]) -> Lazy:
    """Return tensors of a file or several; `names` are theirs in the file by the names they get."""
    shapes = {name: source.tensors[place].shape for name, place in names.items()}
    return Lazy(shapes, lambda name: source.read(names[name]))
