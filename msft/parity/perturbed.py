"""The smallest change that weights can have: one element of one tensor, moved to the next number of its dtype."""

import numpy as np

from msft.convert.source import TensorSource
from msft.models.shapes import linear_modules
from msft.models.spec import ModelSpec


class PerturbedWeights:
    """A TensorSource in which the first element of the first linear weight is one ulp larger in magnitude."""

    def __init__(self, base: TensorSource, spec: ModelSpec):
        self.base, self.tensors = base, base.tensors
        self.name = f"{linear_modules(spec)[0]}.weight"

    def read(self, name: str) -> np.ndarray:
        """Return one tensor."""
        array = self.base.read(name)
        if name != self.name:
            return array
        moved = np.array(array)
        first = moved.reshape(-1)[:1]
        first[:] = np.nextafter(first, np.copysign(np.array(np.inf, first.dtype), first))
        return moved

    def file_of(self, name: str) -> str:
        """Return where a tensor comes from, for messages."""
        return self.base.file_of(name)

    def describe(self) -> str:
        """Say what was changed."""
        return f"{self.name}[0, 0], the next {self.tensors[self.name].dtype} away from 0"
