"""What every weight file looks like to a reader: names, shapes, dtypes, and one tensor at a time."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor; dtypes are numpy's names plus 'bfloat16' (ml_dtypes)."""

    shape: tuple[int, ...]
    dtype: str


class TensorSource(Protocol):
    """An opened weight file or folder; names are the file's own unless its opener says otherwise."""

    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """Return one tensor; only this tensor is in memory."""

    def file_of(self, name: str) -> str:
        """Return the path of the file that holds a tensor, for messages."""
