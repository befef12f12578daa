"""Whatever claims to be a file of torch.save, reading it ends in tensors or one InputError, within little memory."""

from hypothesis import strategies as st

from msft.convert import torch_file, torch_pickle
from tests.faults.inputs import result_or_error, short_and_long, try_all
from tests.faults.json_values import damaged
from tests.faults.weight_files import Rebuilt, little_memory, survive, torch_archive

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


PICKLES = st.lists(OPCODES, max_size=25).map(lambda opcodes: b"\x80\x02" + b"".join(opcodes) + b".")


@short_and_long(200, 4000)
def test_torch_pickles(count):
    def check(data):
        with little_memory():
            result_or_error(lambda: torch_pickle.load(data, "x.bin"), "x.bin")

    try_all(count, PICKLES, check)


places = st.one_of(st.integers(0, 9), st.sampled_from([2**31, 2**40, 2**62, 2**63 - 1, 2**63, -1]))
tuples = st.lists(places, max_size=3).map(tuple)
rebuilt = st.builds(Rebuilt, places, tuples, tuples) | st.builds(Rebuilt, st.just(0), st.just((2, 3)), st.just((3, 1)))
states = st.dictionaries(st.text(max_size=4), rebuilt | st.integers() | st.text(max_size=3), max_size=4) | rebuilt


@short_and_long(150, 3000)
def test_torch_archives(tmp_path, count):
    names = st.sampled_from(["archive", "archive", "", "../up", "a/b"])
    files = st.builds(torch_archive, states, st.binary(max_size=64), names, st.booleans())
    files |= files.flatmap(damaged)
    try_all(count, files, lambda data: survive(torch_file.read_index, tmp_path / "x.bin", data))
