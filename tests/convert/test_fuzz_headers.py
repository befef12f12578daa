"""Whatever claims to be a weight file, reading it ends soon, in tensors or one InputError, within little memory."""

import contextlib
import json
import tracemalloc

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msft.convert import ckpt, safetensors_file, torch_pickle
from msft.convert.gguf_header import read_header
from msft.convert.open import open_weights
from msft.convert.protobuf import BYTES, key, varint
from msft.convert.stored import StoredTensors
from msft.errors import InputError

MEMORY = 20 * 2**20  # the inputs are a few kilobytes
fuzz = settings(max_examples=300, deadline=20_000, suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY


def survive(read, path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        with little_memory():
            source = StoredTensors(read(path))
            for name in source.tensors:
                assert source.read(name).nbytes <= len(data)
                assert sum(part.nbytes for part in source.parts(name)) <= len(data)
    except InputError as error:
        assert str(path) in str(error) and len(str(error)) < 2000


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


@fuzz
@given(data=ckpts())
def test_ckpt(tmp_path, data):
    survive(lambda path: ckpt.read_index(path).tensors, tmp_path / "x.ckpt", data)


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


@fuzz
@given(header=headers, content=st.binary(max_size=64), claimed=st.one_of(st.none(), number))
def test_safetensors(tmp_path, header, content, claimed):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = min(len(text) if claimed is None else claimed, 2**64 - 1)
    survive(safetensors_file.read_index, tmp_path / "x.safetensors", length.to_bytes(8, "little") + text + content)


OPCODES = st.one_of(
    st.sampled_from(
        [
            b"}",
            b"]",
            b")",
            b"(",
            b"t",
            b"\x85",
            b"\x86",
            b"\x87",
            b"s",
            b"u",
            b"a",
            b"e",
            b"R",
            b"b",
            b"Q",
            b"N",
            b"\x88",
            b"\x94",
            b"0",
            b"2",
            b"\x81",
            b"ccollections\nOrderedDict\n",
            b"ctorch\nFloatStorage\n",
            b"cos\nsystem\n",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"X\x07\x00\x00\x00storage",
            b"X\x01\x00\x00\x000",
            b"q\x00",
            b"h\x00",
            b"r\xff\xff\xff\xff",
            b"j\xff\xff\xff\xff",
            b"K\x02",
            b"J\xff\xff\xff\xff",
            b"\x8a\x09" + b"\xff" * 9,
            b".",
        ]
    ),
    st.binary(min_size=1, max_size=6),
)


@fuzz
@given(opcodes=st.lists(OPCODES, max_size=25))
def test_torch_pickles(opcodes):
    try:
        with little_memory():
            torch_pickle.load(b"\x80\x02" + b"".join(opcodes) + b".", "x.bin")
    except InputError as error:
        assert "x.bin" in str(error)


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


@fuzz
@given(data=ggufs())
def test_gguf_headers(tmp_path, data):
    (tmp_path / "x.gguf").write_bytes(data)
    try:
        with little_memory():
            read_header(tmp_path / "x.gguf")
        open_weights(tmp_path / "x.gguf")
    except InputError as error:
        assert str(tmp_path / "x.gguf") in str(error)


@fuzz
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda start, rest: start + rest,
            st.sampled_from(
                [b"GGUF\x03\x00\x00\x00", b"PK\x03\x04", b"\x0a\x10", b"\x80\x02\x8a\x0a", b"\x02" + bytes(7) + b"{}"]
            ),
            st.binary(max_size=200),
        ),
    )
)
def test_any_file(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    try:
        open_weights(tmp_path / "x")
    except InputError as error:
        assert str(tmp_path / "x") in str(error)
