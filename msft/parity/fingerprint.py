"""What stands for a tensor that is not kept: shape, hash, statistics, and a few of its values."""

import hashlib
from dataclasses import dataclass

import numpy as np

SAMPLES = 256


@dataclass(frozen=True)
class Fingerprint:
    """A float32 array in small; `sample` float32 holds up to `SAMPLES` of its values, evenly spread in C order."""

    shape: tuple[int, ...]
    sha256: str
    norm: float
    mean: float
    largest: float
    sample: np.ndarray

    @property
    def size(self) -> int:
        """Number of elements of the array."""
        return int(np.prod(self.shape))


def fingerprint(array: np.ndarray | Fingerprint) -> Fingerprint:
    """Return an array's fingerprint; a fingerprint is its own."""
    if isinstance(array, Fingerprint):
        return array
    array = np.ascontiguousarray(array, dtype=np.float32)
    flat = array.reshape(-1)
    places = np.unique(np.linspace(0, flat.size - 1, min(SAMPLES, flat.size)).astype(np.int64))
    return Fingerprint(
        shape=array.shape,
        sha256=hashlib.sha256(array.data).hexdigest(),
        norm=norm(array),
        mean=float(flat.mean(dtype=np.float64)),
        largest=float(np.abs(flat).max()),
        sample=flat[places],
    )


def norm(array: np.ndarray) -> float:
    """Return the L2 norm, summed in float64 without a float64 copy."""
    flat = array.reshape(-1)
    return float(np.sqrt(np.einsum("i,i->", flat, flat, dtype=np.float64)))
