"""Files of torch.save read without torch: equal to torch.load, and nothing in them is ever run."""

import collections
import io
import os
import pickle
import random
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from msft.convert import torch_file
from msft.convert.stored import StoredTensors
from msft.errors import InputError


def read_all(path) -> dict[str, np.ndarray]:
    source = StoredTensors(torch_file.read_index(path))
    return {name: source.read(name) for name in source.tensors}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def states() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    dtypes = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.uint16,
    )
    return {
        **{f"plain.{dtype}": (base * 3).abs().to(dtype) for dtype in dtypes},
        "base": base,
        "transposed": base.t(),
        "rows": base[2:4],
        "columns": base[:, 3:5],
        "every_second": base[::2, ::3],
        "expanded": base[:1].expand(4, 8),
        "scalar": torch.tensor(4.5),
        "empty": torch.zeros(0, 3),
        "one_row": base[1:2].t(),
        "parameter": torch.nn.Parameter(base + 1),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_and_layout_equals_torch(tmp_path, same_bits, protocol):
    torch.save(states(), tmp_path / "x.bin", pickle_protocol=protocol)
    loaded = read_all(tmp_path / "x.bin")
    assert list(loaded) == list(states())
    for name, tensor in states().items():
        assert same_bits(np.ascontiguousarray(loaded[name]).reshape(loaded[name].shape), as_numpy(tensor)), name


def test_a_modules_state_dict_is_read(tmp_path, same_bits):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / "x.bin")
    loaded = read_all(tmp_path / "x.bin")
    for name, tensor in module.state_dict().items():
        assert same_bits(loaded[name], tensor.numpy())


def test_the_old_format_is_refused_with_the_way_out(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="old format.*save it again with torch.save"):
        torch_file.read_index(tmp_path / "x.bin")


class Attack:
    """Creates the file `marker` when unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class Eval:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.marker!r})",)


class Spawn:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return subprocess.call, ([sys.executable, "-c", f"import os; os.mkdir({self.marker!r})"],)


@pytest.mark.parametrize(("attack", "name"), [(Attack, "mkdir"), (Eval, "eval"), (Spawn, "call")])
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_is_refused_by_name_and_not_run(tmp_path, attack, name, protocol):
    marker = tmp_path / "ran"
    torch.save({"w": torch.zeros(2), "x": attack(marker)}, tmp_path / "x.bin", pickle_protocol=protocol)
    with pytest.raises(InputError, match=f"x.bin: the pickle calls .*{name}"):
        torch_file.read_index(tmp_path / "x.bin")
    assert not marker.exists()
    with pytest.raises(pickle.UnpicklingError):  # torch itself agrees
        torch.load(tmp_path / "x.bin", weights_only=True)


def archive(path, pickled: bytes, records: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in (records or {}).items():
            file.writestr(f"archive/data/{name}", content)


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (pickle.dumps(collections.Counter(a=1), 2), "calls collections.Counter"),
        (pickle.dumps({"a": collections.deque()}, 2), "calls collections.deque"),
        (pickle.dumps({"a": {1, 2}}, 4), "uses EMPTY_SET"),
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "calls os.system"),
        (b"\x80\x02(X\x02\x00\x00\x00lsios\nsystem\n.", "uses INST"),
        (b"\x80\x02cos\nsystem\n)\x81.", "uses NEWOBJ"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "collections.OrderedDict where a dict belongs"),
        (b"\x80\x02}X\x01\x00\x00\x00acos\nsystem\ns.", "'a' is no tensor"),
        (pickle.dumps([1, 2], 2), "holds a list, not a state dict"),
        (pickle.dumps({"a": 1}, 2), "'a' is no tensor"),
        (pickle.dumps({("a",): 1}, 2), "has a tuple as a name"),
        (b"\x80\x02}", "damaged"),
        (b"\x80\x02s.", "damaged"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02\x8a\xff", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
    ],
)
def test_other_pickles_are_refused(tmp_path, pickled, message):
    archive(tmp_path / "x.bin", pickled)
    with pytest.raises(InputError, match=message) as error:
        torch_file.read_index(tmp_path / "x.bin")
    assert "x.bin" in str(error.value)


def saved(tensors) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def test_truncated_files_are_refused(tmp_path):
    data = saved({"w": torch.randn(100)})
    for length in range(0, len(data), 7):
        (tmp_path / "x.bin").write_bytes(data[:length])
        with pytest.raises(InputError, match="x.bin"):
            torch_file.read_index(tmp_path / "x.bin")


def test_damaged_files_never_crash(tmp_path):
    data = saved({"w": torch.randn(10), "v": torch.randn(3, 3).t()})
    rng = random.Random(0)
    for _ in range(1000):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 2, 8])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        (tmp_path / "x.bin").write_bytes(changed)
        try:
            read_all(tmp_path / "x.bin")
        except InputError:
            pass


def rewrite(path, change) -> None:
    """Save one tensor, then write its zip again with the pickle or the records changed."""
    with zipfile.ZipFile(io.BytesIO(saved({"w": torch.arange(8.0)}))) as source:
        files = {info.filename: source.read(info) for info in source.infolist()}
    files, compression = change(files)
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in files.items():
            file.writestr(name, content)


def without_record(files):
    return {name: content for name, content in files.items() if "/data/" not in name}, zipfile.ZIP_STORED


def short_record(files):
    return {name: content[:16] if "/data/" in name else content for name, content in files.items()}, zipfile.ZIP_STORED


def compressed(files):
    return files, zipfile.ZIP_DEFLATED


def big_endian(files):
    return {name: b"big" if name.endswith("byteorder") else content for name, content in files.items()}, 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_record, "tensor 'w': its record 'data/0' is missing"),
        (short_record, "tensor 'w': reaches beyond its record of 16 bytes"),
        (compressed, "is compressed"),
        (big_endian, "big-endian"),
    ],
)
def test_records_that_do_not_fit_are_named(tmp_path, change, message):
    rewrite(tmp_path / "x.bin", change)
    with pytest.raises(InputError, match=message):
        torch_file.read_index(tmp_path / "x.bin")


def test_neither_torch_nor_pickle_is_imported(tmp_path):
    (tmp_path / "x.bin").write_bytes(saved({"w": torch.arange(3.0)}))
    code = (
        "import sys; from msft.convert import torch_file; from msft.convert.stored import StoredTensors; "
        f"print(StoredTensors(torch_file.read_index({str(tmp_path / 'x.bin')!r})).read('w'), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[0. 1. 2.] False", result.stderr


def test_a_flipped_bit_in_a_tensor_is_found_by_the_zips_crc(tmp_path):
    numbers = torch.arange(12.0)
    torch.save({"a": numbers}, tmp_path / "x.bin")
    data = bytearray((tmp_path / "x.bin").read_bytes())
    data[data.index(numbers.numpy().tobytes()) + 6] ^= 1
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(InputError, match="x.bin: damaged: record x/data/0 does not fit its CRC-32"):
        read_all(tmp_path / "x.bin")
    assert list(torch_file.read_index(tmp_path / "x.bin", verify=False)) == ["a"]


def test_files_saved_without_crcs_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(12.0)}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(read_all(tmp_path / "x.bin")["a"], np.arange(12.0, dtype=np.float32))


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20)])
def test_few_bytes_do_not_claim_terabytes(tmp_path, shape):
    torch.save({"a": torch.zeros(1).expand(shape)}, tmp_path / "x.bin")
    with pytest.raises(InputError, match="elements in a record of 4 bytes; save a copy"):
        torch_file.read_index(tmp_path / "x.bin")
