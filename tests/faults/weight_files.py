"""What the tests of damaged weight files share: reading with little memory, and an archive as torch.save writes it."""

import contextlib
import io
import pickle
import tracemalloc
import zipfile

from msft.convert.stored import StoredTensors
from tests.faults.inputs import result_or_error

TRACED = 20 << 20  # the inputs are a few kilobytes


@contextlib.contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < TRACED


def survive(read, path, data: bytes) -> None:
    path.write_bytes(data)
    with little_memory():
        result_or_error(lambda: read_all(StoredTensors(read(path)), len(data)), str(path))


def read_all(source, size: int) -> None:
    for name in source.tensors:
        assert source.read(name).nbytes <= size
        assert sum(part.nbytes for part in source.parts(name)) <= size


class Rebuilt:
    """Pickles as torch pickles a tensor of the record 'data/0', with any offset, sizes and strides."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def __reduce__(self):
        import torch._utils

        offset, shape, strides = self.numbers
        return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, {})


class Storage:
    """Stands for a storage while pickling."""


class TensorPickler(pickle.Pickler):
    """Writes each `Storage` as torch does: a persistent id of six parts."""

    def persistent_id(self, value):
        import torch

        return ("storage", torch.FloatStorage, "0", "cpu", 16) if isinstance(value, Storage) else None


def torch_archive(state, content: bytes, name: str = "archive", compress: bool = False) -> bytes:
    """A file of torch.save with one record, as the zipfile module writes it."""
    text, file = io.BytesIO(), io.BytesIO()
    TensorPickler(text, protocol=2).dump(state)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{name}/data.pkl", text.getvalue())
        archive.writestr(f"{name}/data/0", content)
    return file.getvalue()
