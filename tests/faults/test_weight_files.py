"""Whatever claims to be a weight file, reading it ends soon, in tensors or one InputError, within little memory."""

import json

import numpy as np
import pytest
from hypothesis import strategies as st

from msft.convert import ckpt, companions, safetensors_file, strategy
from msft.convert.dtypes import Cast
from msft.convert.gguf_header import read_header
from msft.convert.open import open_weights, read_spec
from msft.convert.protobuf import BYTES, key, varint
from msft.convert.source import TensorInfo
from tests.faults.inputs import result_or_error, short_and_long, try_all
from tests.faults.json_values import damaged
from tests.faults.weight_files import Rebuilt, little_memory, survive, torch_archive

number = st.one_of(st.integers(0, 40), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]))


def field(tag: int, content: bytes, claimed: int | None = None) -> bytes:
    return key(tag, BYTES) + varint(len(content) if claimed is None else claimed) + content


@st.composite
def tensors(draw) -> bytes:
    dims = draw(st.lists(number, max_size=4))
    parts = [key(1, 0) + varint(dim) for dim in dims]
    parts.append(field(2, draw(st.sampled_from([b"Float32", b"BFloat16", b"str", b"Int4", b"\xff", b""]))))
    parts.append(field(3, draw(st.binary(max_size=64)), draw(st.one_of(st.none(), number))))
    return b"".join(draw(st.permutations(parts)) + [draw(st.binary(max_size=3))])


@st.composite
def ckpts(draw) -> bytes:
    data = b""
    for _ in range(draw(st.integers(0, 4))):
        tag = field(1, draw(st.sampled_from([b"a", b"b", b"model.norm_out.weight", b"\xff\xfe", b"x" * 70000])))
        value = tag + field(2, draw(tensors()), draw(st.one_of(st.none(), st.none(), number)))
        data += field(1, value, draw(st.one_of(st.none(), st.none(), number)))
    return data + draw(st.one_of(st.just(b""), st.binary(max_size=30), st.just(b"crc_num" + bytes(10))))


def read_ckpt(path):
    return ckpt.read_index(path).tensors


@short_and_long(200, 3000)
def test_ckpt(tmp_path, count):
    try_all(count, ckpts(), lambda data: survive(read_ckpt, tmp_path / "x.ckpt", data))


MINUS_1 = 2**64 - 1  # as a varint


def numbers(*values: int) -> bytes:
    return b"".join(key(1, 0) + varint(value) for value in values)


PLACES = ("start", "stage", "sizes", "dims", "axes", "uneven", "field", "shards", "wire", "name", "length", "end")


@st.composite
def strategies(draw) -> bytes:
    """Strategy files for two parameters, sound ones or with anything in one kind of place."""
    odd = draw(st.sampled_from(["", "", *PLACES]))

    def one(place, sound, other):
        return draw(other if place == odd else st.sampled_from(sound))

    data = one("start", [b"\x08\x01"], st.sampled_from([b"", b"\x0a\x00"]))
    for _ in range(2):
        stage = one("stage", [0], st.sampled_from([0, 1, 2**40]))
        data += field(2, field(1, b"MatMul") + field(2, key(1, 0) + varint(stage)))
    for sound in (b"a.b", b"a.c"):
        axes = one("axes", [1], st.integers(0, 3))
        sizes = one("sizes", [(2, 2), (1, 4)], st.lists(st.sampled_from([1, 2, 4, 0, 2**20, 2**63]), max_size=3))
        dims = [(0, MINUS_1), (MINUS_1, 0), (MINUS_1, MINUS_1)]
        dims = one("dims", dims, st.lists(st.sampled_from([0, 1, 2, MINUS_1, 2**62]), max_size=3))
        step, size = one("shards", [(0, 0), (1, 0)], st.tuples(number, number))
        layouts = [field(1, numbers(*sizes)), *[field(2, numbers(*dims))] * axes]
        layouts += [field(3, numbers(*one("uneven", [()], st.just((1, 3))))), field(4, b"")]
        for index, value in ((5, one("field", [0], number)), (6, step), (7, size)):
            layouts.append(key(index, one("wire", [0], st.sampled_from([0, 1, 2]))) + varint(value))
        name = one("name", [sound], st.sampled_from([b"a.b", b"1-a.b", b"999999-a.b", b"\xff", b"x" * 70000]))
        data += field(3, field(1, name) + field(2, b"".join(layouts), one("length", [None], number)))
    return data + one("end", [b""], st.binary(max_size=3))


@short_and_long(200, 3000)
def test_strategies(tmp_path, count):
    """A strategy file is refused, or what it makes of a folder of four ranks is no larger than the folder."""
    path, folder = tmp_path / "s.ckpt", tmp_path / "ranks"
    content = np.arange(6, dtype=np.float32).reshape(2, 3)
    for rank in range(4):
        (folder / f"rank_{rank}").mkdir(parents=True)
        with open(folder / f"rank_{rank}" / "x.ckpt", "wb") as file:
            writer = ckpt.CkptWriter(file)
            for name in ("a.b", "a.c"):
                writer.add(name, TensorInfo((2, 3), "float32"), Cast(None).pieces(name, content))
            writer.close()
    accepted = 0

    def check(data):
        nonlocal accepted
        path.write_bytes(data)
        with little_memory():
            result_or_error(lambda: strategy.read_strategy(path), str(path))
            source = result_or_error(lambda: open_weights(folder, strategy=path), str(tmp_path))
            if source:
                accepted += 1
                assert all(source.read(name).nbytes <= 4 * content.nbytes for name in source.tensors)

    try_all(count, strategies(), check)
    assert accepted > count / 100, "too few strategies are sound: the test tries nothing"


values = st.recursive(
    st.one_of(st.none(), st.booleans(), number, st.integers(-5, 5), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
entries = st.one_of(
    values,
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E4M3"]), values),
            "shape": st.one_of(st.lists(number, max_size=4), values),
            "data_offsets": st.one_of(st.tuples(number, number).map(list), values),
        }
    ),
)
headers = st.dictionaries(
    st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=5)), entries, max_size=4
)


def safetensors(header, content: bytes, claimed: int | None) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = len(text) if claimed is None else claimed
    return length.to_bytes(8, "little") + text + content


@short_and_long(200, 3000)
def test_safetensors(tmp_path, count):
    files = st.builds(safetensors, headers, st.binary(max_size=64), st.one_of(st.none(), number))
    try_all(count, files, lambda data: survive(safetensors_file.read_index, tmp_path / "x.safetensors", data))


def gguf_text(content: bytes, claimed: int | None = None) -> bytes:
    return (len(content) if claimed is None else claimed).to_bytes(8, "little") + content


@st.composite
def ggufs(draw) -> bytes:
    """Headers with plausible and impossible counts, lengths, types and offsets."""
    word = st.one_of(st.integers(0, 13), number.map(lambda value: value % 2**32)).map(lambda v: v.to_bytes(4, "little"))
    long = number.map(lambda value: value.to_bytes(8, "little"))
    names = [
        b"general.architecture",
        b"general.alignment",
        b"llama.block_count",
        b"token_embd.weight",
        b"rope_freqs.weight",
    ]
    text = st.builds(
        gguf_text, st.one_of(st.sampled_from([b"llama", *names]), st.binary(max_size=9)), st.none() | number
    )
    values, infos = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    data = b"GGUF" + draw(st.sampled_from([b"\x03\0\0\0", b"\x02\0\0\0", b"\0\0\0\x03"]))
    data += draw(st.one_of(st.just(infos.to_bytes(8, "little")), long)) + draw(
        st.one_of(st.just(values.to_bytes(8, "little")), long)
    )
    for _ in range(values):
        data += (
            draw(text)
            + draw(word)
            + draw(st.one_of(text, long, st.tuples(word, long, st.binary(max_size=30)).map(b"".join)))
        )
    for _ in range(infos):
        dims = draw(st.lists(long, max_size=3))
        data += draw(text) + len(dims).to_bytes(4, "little") + b"".join(dims) + draw(word) + draw(long)
    return data + draw(st.binary(max_size=100))


@short_and_long(200, 3000)
def test_gguf_headers(tmp_path, count):
    path = tmp_path / "x.gguf"

    def check(data):
        path.write_bytes(data)
        with little_memory():
            result_or_error(lambda: read_header(path), str(path))
        result_or_error(lambda: open_weights(path), str(path))

    try_all(count, ggufs(), check)


STARTS = [b"GGUF\x03\x00\x00\x00", b"PK\x03\x04", b"\x0a\x10", b"\x80\x02\x8a\x0a", b"\x02" + bytes(7) + b"{}", b""]


@short_and_long(200, 3000)
def test_any_file(tmp_path, count):
    files = st.builds(lambda start, rest: start + rest, st.sampled_from(STARTS), st.binary(max_size=200))

    def check(data):
        (tmp_path / "x").write_bytes(data)
        result_or_error(lambda: open_weights(tmp_path / "x"), str(tmp_path / "x"))

    try_all(count, files, check)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A small whole file of each format: suffix -> content."""
    folder = tmp_path_factory.mktemp("real")
    arrays = {name: np.arange(12, dtype=np.float32).reshape(3, 4) for name in ("model.norm.weight", "lm_head.weight")}
    infos = {name: TensorInfo(array.shape, "float32") for name, array in arrays.items()}
    with open(folder / "x.ckpt", "wb") as file:
        writer = ckpt.CkptWriter(file)
        for name, array in arrays.items():
            writer.add(name, infos[name], Cast(None).pieces(name, array))
        writer.close()
    with open(folder / "x.safetensors", "wb") as file:
        writer = safetensors_file.SafetensorsWriter(file, infos)
        for name, array in arrays.items():
            writer.add(name, Cast(None).pieces(name, array))
        writer.close()
    (folder / "x.bin").write_bytes(torch_archive({name: Rebuilt(0, (3, 4), (4, 1)) for name in arrays}, bytes(64)))
    _write_gguf(folder / "x.gguf", arrays)
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


def _write_gguf(path, arrays) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(4)
    writer.add_feed_forward_length(4)
    writer.add_head_count(2)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "a", "b", "ab"])
    writer.add_token_scores([0.0, -1.0, -2.0, -3.0])
    writer.add_token_types([2, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    for name, array in zip(("token_embd.weight", "blk.0.attn_k.weight"), arrays.values(), strict=True):
        writer.add_tensor(name, array)
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    writer.add_tensor("output.weight", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".bin", ".gguf"])
@short_and_long(100, 2500)
def test_real_files_with_bytes_changed(tmp_path, real, suffix, count):
    path = tmp_path / f"x{suffix}"

    def check(data):
        path.write_bytes(data)
        source = result_or_error(lambda: open_weights(path), str(path))
        for name in source.tensors if source else ():
            # Q8_0 turns 34 bytes into 32 numbers of 4.
            array = result_or_error(lambda name=name: source.read(name), str(path))
            assert array is None or array.nbytes <= 4 * len(data)
        if suffix == ".gguf":
            result_or_error(lambda: read_spec(path), str(path))
            result_or_error(lambda: companions.find(None, path), str(path))

    try_all(count, damaged(real[suffix]), check)
