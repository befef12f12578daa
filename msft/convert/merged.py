"""Base weights plus a LoRA adapter as one source of weights."""

import numpy as np

from msft.backend.contract import Lora
from msft.convert.dtypes import PIECE_BYTES, numpy_dtype
from msft.convert.source import TensorInfo, TensorSource
from msft.errors import InputError, did_you_mean
from msft.models.adapters import peft_names


class MergedTensors:
    """A TensorSource of W + alpha / rank * B A, computed in float32 when a tensor is read.

    Where W `is_transposed` ([inputs, outputs]), it is the product's transpose that is added.

    Merged tensors get `dtype`, or their base's dtype when it is None; others pass through. Raises InputError for an
    adapter without alpha or whose modules or shapes are not the base's.
    """

    def __init__(
        self,
        base: TensorSource,
        lora: Lora,
        weights: dict[str, np.ndarray],
        where: str,
        dtype: str | None,
        is_transposed: bool = False,
    ):
        if not np.isfinite(lora.alpha):
            raise InputError(f"{where}: does not say its alpha, which merging needs; give --lora_alpha")
        self.base, self.weights, self.is_transposed = base, weights, is_transposed
        self.scale = np.float32(lora.alpha / lora.rank)
        self.modules = {f"{module}.weight": module for module in lora.modules}
        problems = [_problem(module, base, weights, where, is_transposed) for module in lora.modules]
        problems = [problem for problem in problems if problem]
        if problems:
            raise InputError(*problems[:20])
        self.tensors = {
            name: TensorInfo(info.shape, dtype or info.dtype) if name in self.modules else info
            for name, info in base.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, merged where the adapter has a module for it."""
        array = self.base.read(name)
        if name not in self.modules:
            return array
        first, second = peft_names(self.modules[name])
        a, b = self.weights[first].astype(np.float32), self.weights[second].astype(np.float32)
        # A transposed weight is W = A' B' of the factors' transposes.
        b, a = (a.T, b.T) if self.is_transposed else (b, a)
        result = np.empty(array.shape, numpy_dtype(self.tensors[name].dtype))
        step = max(1, PIECE_BYTES // (4 * array.shape[1]))
        for start in range(0, len(array), step):
            rows = slice(start, start + step)
            result[rows] = (array[rows].astype(np.float32) + self.scale * (b[rows] @ a)).astype(result.dtype)
        return result

    def file_of(self, name: str) -> str:
        """Return the base's file that holds a tensor."""
        return self.base.file_of(name)


def _problem(module: str, base: TensorSource, weights: dict[str, np.ndarray], where: str, is_transposed: bool) -> str:
    name = f"{module}.weight"
    if name not in base.tensors:
        nearest = did_you_mean(module, [other.removesuffix(".weight") for other in base.tensors][:500])
        return f"{where}: tunes {module!r}, which the base model does not have{nearest}"
    first, second = (weights[factor].shape for factor in peft_names(module))
    shape = base.tensors[name].shape
    found = (first[1], second[0]) if is_transposed else (second[0], first[1])
    if found != shape:
        return f"{where}: {module}: B A is {list(found)}, but the base's weight is {list(shape)}"
    return ""
