"""The CKPT format against MindSpore's own reader and writer, and every damage to it noticed."""

import io
import random

import ml_dtypes
import numpy as np
import pytest

from msft.convert import ckpt
from msft.convert.dtypes import Cast
from msft.convert.source import TensorInfo
from msft.convert.stored import StoredTensors
from msft.errors import InputError

DTYPES = [
    "float64",
    "float32",
    "float16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
]


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    result = {f"a.{name}": rng.integers(0, 2, (3, 5)).astype(name) for name in DTYPES}
    result["a.bfloat16"] = rng.normal(size=(4, 3)).astype(ml_dtypes.bfloat16)
    result["scalar"] = np.array(7, np.int64)
    result["a.long"] = rng.normal(size=(1, 2, 3, 4)).astype(np.float32)
    return result


def write(path, tensors: dict[str, np.ndarray], crc: bool = True) -> None:
    keep = Cast(None)
    with open(path, "wb") as file:
        writer = ckpt.CkptWriter(file)
        for name, array in tensors.items():
            writer.add(name, TensorInfo(array.shape, array.dtype.name), keep.pieces(name, array))
        if crc:
            writer.close()


def read_all(path) -> dict[str, np.ndarray]:
    source = StoredTensors(ckpt.read_index(path).tensors)
    return {name: source.read(name) for name in source.tensors}


def test_mindspore_reads_what_we_write(tmp_path, same_bits):
    import mindspore

    write(tmp_path / "x.ckpt", arrays())
    loaded = mindspore.load_checkpoint(str(tmp_path / "x.ckpt"), crc_check=True)
    assert list(loaded) == list(arrays())
    for name, array in arrays().items():
        ours = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
        theirs = loaded[name].asnumpy()
        assert same_bits(theirs.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else theirs, ours), name


@pytest.mark.parametrize("crc", [True, False])
def test_we_read_what_mindspore_writes(tmp_path, crc):
    import mindspore

    params = [
        {
            "name": name,
            "data": mindspore.Tensor(array.astype(np.float32), mindspore.bfloat16)
            if array.dtype == ml_dtypes.bfloat16
            else mindspore.Tensor(array),
        }
        for name, array in arrays().items()
    ]
    extra = {"epoch_num": 3, "learning_rate": 0.5, "run": "späte Läufe", "last": True}
    mindspore.save_checkpoint(params, str(tmp_path / "x.ckpt"), append_dict=extra, crc_check=crc)
    loaded = read_all(tmp_path / "x.ckpt")
    for name, array in arrays().items():
        assert loaded[name].dtype == array.dtype and loaded[name].tobytes() == array.tobytes(), name
        assert loaded[name].shape == array.shape, name
    assert (loaded["epoch_num"], loaded["last"]) == (3, True) and loaded["learning_rate"] == np.float32(0.5)
    assert ckpt.read_index(tmp_path / "x.ckpt").texts == {"run": "späte Läufe"}


def test_large_tensors_are_sliced_like_mindspores(tmp_path, monkeypatch, same_bits):
    """A tensor over the limit becomes several entries with the full shape; MindSpore joins them, and so do we."""
    import mindspore

    monkeypatch.setattr(ckpt, "SLICE_BYTES", 1000)
    big = np.random.default_rng(1).normal(size=(33, 31)).astype(np.float32)
    write(tmp_path / "x.ckpt", {"first": big[:2], "big": big, "last": big[:1]})
    index = ckpt.read_index(tmp_path / "x.ckpt").tensors
    assert [length for _, length in index["big"].extents] == [1000] * 4 + [92]
    assert same_bits(read_all(tmp_path / "x.ckpt")["big"], big)
    assert same_bits(mindspore.load_checkpoint(str(tmp_path / "x.ckpt"), crc_check=True)["big"].asnumpy(), big)


def test_every_flipped_byte_is_noticed(tmp_path):
    """Flip each byte of a file with CRC, all bits and the lowest bit: never a silently different tensor."""
    write(tmp_path / "x.ckpt", {"model.norm_out.weight": np.arange(20, dtype=np.float32), "s": np.array(1, np.int32)})
    good = (tmp_path / "x.ckpt").read_bytes()
    bad = tmp_path / "bad.ckpt"
    for position in range(len(good)):
        for mask in (0xFF, 0x01):
            bad.write_bytes(good[:position] + bytes([good[position] ^ mask]) + good[position + 1 :])
            with pytest.raises(InputError, match="bad.ckpt"):
                ckpt.read_index(bad)


def test_every_truncation_is_noticed(tmp_path):
    """Cutting anywhere inside an entry is noticed; cutting right after one leaves a whole file without CRC."""
    write(tmp_path / "x.ckpt", {"a": np.arange(9, dtype=np.float32), "b": np.arange(3, dtype=np.int64)})
    good = (tmp_path / "x.ckpt").read_bytes()
    whole = {len(good) - ckpt.CRC_TAIL: ["a", "b"], len(good): ["a", "b"]}
    accepted = {}
    for length in range(len(good) + 1):
        (tmp_path / "cut.ckpt").write_bytes(good[:length])
        try:
            accepted[length] = list(ckpt.read_index(tmp_path / "cut.ckpt").tensors)
        except InputError as error:
            assert "cut.ckpt" in str(error)
    only_a = {length: names for length, names in accepted.items() if names == ["a"]}
    assert len(only_a) == 1 and accepted == whole | only_a


def test_random_damage_without_crc_never_crashes(tmp_path):
    """Without CRC damage may go unseen, but it ends in tensors or in one InputError, never in anything else."""
    write(tmp_path / "x.ckpt", arrays(), crc=False)
    good = (tmp_path / "x.ckpt").read_bytes()
    rng = random.Random(0)
    for _ in range(500):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "bad.ckpt").write_bytes(data)
        try:
            read_all(tmp_path / "bad.ckpt")
        except InputError:
            pass


def test_unknown_types_are_named(tmp_path):
    write(tmp_path / "x.ckpt", {"weight": np.zeros(4, np.float32)}, crc=False)
    data = (tmp_path / "x.ckpt").read_bytes().replace(b"Float32", b"Complex")
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(InputError, match="x.ckpt: tensor 'weight': unsupported type 'Complex'"):
        ckpt.read_index(tmp_path / "x.ckpt")


def test_a_tensor_that_occurs_twice_is_named(tmp_path):
    tensors = {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)}
    write(tmp_path / "x.ckpt", tensors, crc=False)
    data = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(data + data)
    with pytest.raises(InputError, match="'a' occurs twice"):
        ckpt.read_index(tmp_path / "x.ckpt")


def test_packed_dims_are_read(tmp_path):
    """protobuf allows a repeated number packed or not; MindSpore writes it unpacked, other writers may not."""
    from mindspore.train.checkpoint_pb2 import Checkpoint

    value = Checkpoint().value.add()
    value.tag, value.tensor.tensor_type, value.tensor.tensor_content = "w", "Float32", bytes(24)
    value.tensor.dims.extend([2, 3])
    plain = value.tensor.SerializeToString()
    packed = b"\x0a\x02\x02\x03" + plain[4:]
    assert plain[:4] == b"\x08\x02\x08\x03"
    entry = b"\x0a\x01w\x12" + bytes([len(packed)]) + packed
    (tmp_path / "x.ckpt").write_bytes(b"\x0a" + bytes([len(entry)]) + entry)
    assert ckpt.read_index(tmp_path / "x.ckpt").tensors["w"].info.shape == (2, 3)


def test_the_writer_refuses_wrong_content():
    writer = ckpt.CkptWriter(io.BytesIO())
    with pytest.raises(ValueError, match="lacks 4 bytes"):
        writer.add("w", TensorInfo((3,), "float32"), [np.zeros(8, np.uint8)])
    with pytest.raises(ValueError, match="more content"):
        writer.add("w", TensorInfo((1,), "float32"), [np.zeros(8, np.uint8)])


def test_a_first_look_passes_over_the_crc(tmp_path):
    write(tmp_path / "x.ckpt", {"w": np.zeros(4, np.float32)})
    data = bytearray((tmp_path / "x.ckpt").read_bytes())
    data[-ckpt.CRC_TAIL - 1] ^= 1
    (tmp_path / "x.ckpt").write_bytes(data)
    assert list(ckpt.read_index(tmp_path / "x.ckpt", verify=False).tensors) == ["w"]
    with pytest.raises(InputError, match="does not fit its CRC-32"):
        ckpt.read_index(tmp_path / "x.ckpt")
