"""Tensors that are read when they are asked for, so that no state is ever held whole only to be dealt out."""

from collections.abc import Callable, Iterator, Mapping

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


def stored(source: StoredTensors, names: dict[str, str]) -> Lazy:
    """Return tensors of a file or several; `names` are theirs in the file by the names they get."""
    shapes = {name: source.tensors[place].shape for name, place in names.items()}
    return Lazy(shapes, lambda name: source.read(names[name]))
