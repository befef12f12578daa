"""The safetensors format against the safetensors library, and damaged headers refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest

from msft.convert import safetensors_file
from msft.convert.dtypes import Cast
from msft.convert.source import TensorInfo
from msft.convert.stored import StoredTensors
from msft.errors import InputError


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "a.weight": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
        "half": rng.normal(size=(2, 2)).astype(np.float16),
        "count": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False, True]),
    }


def write(path, arrays, metadata=None) -> None:
    keep = Cast(None)
    with open(path, "wb") as file:
        infos = {name: TensorInfo(array.shape, array.dtype.name) for name, array in arrays.items()}
        writer = safetensors_file.SafetensorsWriter(file, infos, metadata)
        for name, array in arrays.items():
            writer.add(name, keep.pieces(name, array))
        writer.close()


def test_the_library_reads_what_we_write(tmp_path):
    from safetensors import safe_open

    write(tmp_path / "x.safetensors", tensors(), {"format": "pt", "made": "hier"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "hier"}
        assert set(file.keys()) == set(tensors())
        for name, array in tensors().items():
            loaded = file.get_tensor(name)
            assert tuple(loaded.shape) == array.shape
            assert np.array_equal(loaded.double().numpy(), array.astype(np.float64)), name
    assert safetensors_file.read_metadata(tmp_path / "x.safetensors")["made"] == "hier"


def test_we_read_what_the_library_writes(tmp_path, same_bits):
    from safetensors.numpy import save_file

    save_file(tensors(), tmp_path / "x.safetensors")
    source = StoredTensors(safetensors_file.read_index(tmp_path / "x.safetensors"))
    assert set(source.tensors) == set(tensors())
    for name, array in tensors().items():
        assert same_bits(source.read(name), array), name


def raw(header, content: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def entry(first, last, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no safetensors file, or truncated"),
        (b"\x10", "no safetensors file, or truncated"),
        ((2**40).to_bytes(8, "little") + b"{}", "no safetensors file, or truncated"),
        (raw(b"{nonsense"), "header is damaged"),
        (raw(b"[" * 50000), "header is damaged"),
        (raw(b"\xff\xfe{}"), "header is damaged"),
        (raw(b"[1]"), "no JSON object"),
        (raw(b'{"w": 1, "w": 2}'), "a key occurs twice"),
        (raw({"w": 5}), "tensor 'w': dtype, shape or data_offsets is missing"),
        (raw({"w": entry(0, 8, dtype="F99")}, bytes(8)), "tensor 'w': unsupported dtype 'F99'"),
        (raw({"w": entry(0, 8, dtype=["F32"])}, bytes(8)), "tensor 'w': unsupported dtype"),
        (raw({"w": entry(0, 8, shape=(-2,))}, bytes(8)), "tensor 'w': impossible shape"),
        (raw({"w": entry(0, 8, shape=(2.0,))}, bytes(8)), "tensor 'w': impossible shape"),
        (raw({"w": entry(0, 8, shape=(2**62, 2**62))}, bytes(8)), "tensor 'w': 8 bytes of content do not fit"),
        (raw({"w": entry(8, 0)}, bytes(8)), "tensor 'w': -8 bytes"),
        (raw({"w": entry(0, 8, shape=(3,))}, bytes(8)), "tensor 'w': 8 bytes of content do not fit F32"),
        (raw({"v": entry(0, 8), "w": entry(4, 12)}, bytes(12)), "tensor 'w' begins at byte"),
        (raw({"v": entry(0, 8), "w": entry(16, 24)}, bytes(24)), "tensor 'w' begins at byte"),
        (raw({"w": entry(0, 8)}, bytes(7)), "truncated or damaged"),
        (raw({"w": entry(0, 8)}, bytes(9)), "truncated or damaged"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, data, message):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        safetensors_file.read_index(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value)


def test_a_file_that_shrinks_after_opening_is_named(tmp_path):
    write(tmp_path / "x.safetensors", {"w": np.zeros(100, np.float32)})
    source = StoredTensors(safetensors_file.read_index(tmp_path / "x.safetensors"))
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:-40])
    with pytest.raises(InputError, match="x.safetensors: ends inside tensor 'w'"):
        source.read("w")
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(InputError, match="x.safetensors: tensor 'w' cannot be read: No such file"):
        source.read("w")


def test_the_writer_refuses_another_order_and_unfinished_files(tmp_path):
    infos = {"a": TensorInfo((1,), "uint8"), "b": TensorInfo((1,), "uint8")}
    with open(tmp_path / "x", "wb") as file:
        writer = safetensors_file.SafetensorsWriter(file, infos)
        with pytest.raises(ValueError, match="'b' came where 'a' was due"):
            writer.add("b", [np.zeros(1, np.uint8)])
        with pytest.raises(ValueError, match="never written: a, b"):
            writer.close()
