"""One name for each dtype (numpy's, plus 'bfloat16'), what file formats call them, and casts in small pieces."""

import math
from collections.abc import Iterator

import numpy as np

from msft.convert.source import TensorInfo

SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
MINDSPORE = {
    "Float64": "float64",
    "Float32": "float32",
    "Float16": "float16",
    "BFloat16": "bfloat16",
    "Int64": "int64",
    "Int32": "int32",
    "Int16": "int16",
    "Int8": "int8",
    "UInt64": "uint64",
    "UInt32": "uint32",
    "UInt16": "uint16",
    "UInt8": "uint8",
    "Bool": "bool",
}
TORCH_STORAGE = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
FLOATS = ("float64", "float32", "float16", "bfloat16")
WORDS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# Small enough for the cache of one core.
PIECE_BYTES = 2**20


def numpy_dtype(name: str) -> np.dtype:
    """Return the numpy dtype of a name; 'bfloat16' is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def byte_count(info: TensorInfo) -> int:
    """Return the size of a tensor's content in bytes."""
    return math.prod(info.shape) * numpy_dtype(info.dtype).itemsize


class Cast:
    """A cast of float tensors to one dtype (None keeps each tensor's own) that counts what overflowed to infinity.

    `overflows` maps a tensor's name to how many of its finite numbers became infinite.
    """

    def __init__(self, dtype: str | None):
        self.dtype = dtype
        self.overflows: dict[str, int] = {}

    def result(self, info: TensorInfo) -> TensorInfo:
        """Return what a tensor of this shape and dtype becomes; only floats are cast."""
        return info._replace(dtype=self.dtype) if self.dtype and info.dtype in FLOATS else info

    def pieces(self, name: str, array: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the cast array in C order as uint8 arrays of about a megabyte, each valid until the next."""
        target = numpy_dtype(self.result(TensorInfo(array.shape, array.dtype.name)).dtype)
        for part in _parts(array):
            yield self._cast(name, part, target).reshape(-1).view(np.uint8)

    def _cast(self, name: str, part: np.ndarray, target: np.dtype) -> np.ndarray:
        if part.dtype == target:
            return np.ascontiguousarray(part)
        with np.errstate(all="ignore"):
            result = np.ascontiguousarray(part.astype(target))
            overflows = int((np.isinf(result) & np.isfinite(part)).sum())
        if overflows:
            self.overflows[name] = self.overflows.get(name, 0) + overflows
        return result


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    if array.ndim == 0 or array.flags.c_contiguous:
        array = array.reshape(-1)
    if not array.size:
        return
    step = max(1, PIECE_BYTES * len(array) // array.nbytes)
    for start in range(0, len(array), step):
        yield array[start : start + step]
