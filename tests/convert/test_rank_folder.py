"""Distributed checkpoints: tensors joined from the ranks' slices are, to the bit, what MindSpore makes of them."""

import math
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msft.convert import rank_folder
from msft.convert.check import check_against
from msft.convert.ckpt import CkptWriter
from msft.convert.dtypes import Cast
from msft.convert.joined import JoinedTensors
from msft.convert.open import open_weights
from msft.convert.source import TensorInfo
from msft.convert.strategy import read_strategy
from msft.errors import InputError
from msft.models import llama
from tests.convert.mindspore_ranks import Cut, llama_cuts, slices, strategy_bytes, write_distributed


@pytest.fixture(scope="session")
def arrays(expected):
    return {llama.MINDFORMERS.write(name): array for name, array in expected.items()}


def stages_of(arrays, count):
    """The parameters of each pipeline stage: layers in equal parts, the embedding first, norm and head last."""
    result = [{} for _ in range(count)]
    for name, array in arrays.items():
        layer = int(name.split(".")[2]) * count // 2 if ".layers." in name else 0 if "embeddings" in name else count - 1
        result[layer][name] = array
    return result


# data x model x stages, and the optimizer's shards.
LAYOUTS = {
    "model 2": (1, 2, 1, 0),
    "model 4": (1, 4, 1, 0),
    "data 2, model 2": (2, 2, 1, 0),
    "all shards": (4, 1, 1, -1),
    "2 shards of 4 copies": (4, 1, 1, 2),
    "2 stages": (1, 1, 2, 0),
    "2 stages, model 2": (1, 2, 2, 0),
    "2 stages, data 2, model 2, all shards": (2, 2, 2, -1),
}


def opened(folder, strategy):
    return JoinedTensors(rank_folder.read_index(rank_folder.files(folder), strategy))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_joined_tensors_are_those_of_mindspore(layout, arrays, expected, spec, tmp_path, same_bits, capsys):
    import mindspore

    data, model, stages, shard = LAYOUTS[layout]
    cuts = [llama_cuts(part, data, model, shard) for part in stages_of(arrays, stages)]
    folder, strategy = write_distributed(tmp_path, arrays, cuts)
    merged = tmp_path / "merged" / "merged_ckpt_strategy.ckpt"
    mindspore.merge_pipeline_strategys(str(strategy), str(merged))
    mindspore.transform_checkpoints(str(folder), str(tmp_path / "whole"), "whole_", str(merged), None)
    whole = mindspore.load_checkpoint(str(tmp_path / "whole" / "rank_0" / "whole_0.ckpt"))
    assert arrays.keys() <= whole.keys()
    given = [strategy, merged] if stages > 1 else [strategy, merged, strategy / "ckpt_strategy_rank_0.ckpt"]
    for number, path in enumerate(given):
        source = opened(folder, path)
        for name, array in arrays.items():
            value = source.read(name)
            assert same_bits(value, array), name
            assert same_bits(value, whole[name].asnumpy()), name
        if number == 0:
            capsys.readouterr()
            model_source = open_weights(folder, spec, strategy=path)
            check_against(spec, model_source)
            assert set(model_source.tensors) == set(expected)
            assert all(same_bits(model_source.read(name), expected[name]) for name in expected)
            count = 2 * len(arrays) + 2
            assert f"left out {count} tensors of optimizer and trainer state" in capsys.readouterr().err
    # A merged file in the folder of those it was made of says the same.
    shutil.copy(merged, strategy)
    assert opened(folder, strategy).tensors == source.tensors


@pytest.mark.parametrize(
    "cut",
    [
        Cut([2, 2, 2], [-1, 1], 1, 2),
        Cut([2, 2, 2], [1, -1], 1, -1),
        Cut([2, 2, 2], [2, -1], 1, 2),
        Cut([2, 3, 2], [2, 0], 2, 3),
        Cut([4, 2, 2], [1, 0], 4, 2),
        Cut([4, 2], [0, -1], 2, 2),
        Cut([2, 4], [0, 1]),
        Cut([2, 4], [[1, 0], [-1]]),
        Cut([2, 3, 2], [[0, 2], [-1]], 2, 3),
        Cut([4, 2, 1], [[2], [1, 0]]),
    ],
    ids=str,
)
def test_other_cuts_are_joined_as_mindspore_joins_them(tmp_path, same_bits, cut):
    """Several dimensions of copies, of which some take the optimizer's shards; axes that two dimensions cut."""
    import mindspore

    array = np.arange(24 * 16, dtype=np.float32).reshape(24, 16)
    folder, strategy = write_distributed(tmp_path, {"a.b": array}, [{"a.b": cut}])
    file = strategy / "ckpt_strategy_rank_0.ckpt"
    mindspore.transform_checkpoints(str(folder), str(tmp_path / "whole"), "whole_", str(file), None)
    whole = mindspore.load_checkpoint(str(tmp_path / "whole" / "rank_0" / "whole_0.ckpt"))["a.b"].asnumpy()
    assert same_bits(whole, array)
    assert same_bits(opened(folder, strategy).read("a.b"), whole)


def test_bfloat16_slices(tmp_path, same_bits):
    import ml_dtypes

    array = np.arange(32, dtype=np.float32).reshape(4, 8).astype(ml_dtypes.bfloat16)
    write_ckpts(tmp_path, {"a.b": slices(array, Cut([2, 2], [1, 0]))})
    (tmp_path / "s.ckpt").write_bytes(strategy_bytes({"a.b": Cut([2, 2], [1, 0])}))
    assert same_bits(opened(tmp_path, tmp_path / "s.ckpt").read("a.b"), array)


def write_ckpts(folder, parts):
    """Write each rank's slices with our own writer, which test_ckpt.py holds against MindSpore's reader."""
    for rank in range(len(next(iter(parts.values())))):
        place = folder / f"rank_{rank}"
        place.mkdir(parents=True, exist_ok=True)
        with open(place / "x.ckpt", "wb") as file:
            writer, keep = CkptWriter(file), Cast(None)
            for name, part in parts.items():
                info = TensorInfo(part[rank].shape, part[rank].dtype.name)
                writer.add(name, info, keep.pieces(name, np.ascontiguousarray(part[rank])))
            writer.close()


@st.composite
def random_cuts(draw):
    """(cut, shape): a device matrix of up to 4 dimensions and 48 ranks, any axes cut by any of its dimensions."""
    devices = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda sizes: math.prod(sizes) <= 48))
    ndim = draw(st.integers(1, 3))
    dims = draw(st.permutations(range(len(devices))))
    nested = ndim > 1 and draw(st.booleans())
    tensor_map, left = [], list(dims)
    for _ in range(ndim):
        count = min(len(left), draw(st.integers(0, 2 if nested else 1)))
        own, left = left[:count], left[count:]
        tensor_map.append(own or [-1] if nested else own[0] if own else -1)
    used = [dim for axis in tensor_map for dim in (axis if nested else [axis]) if dim != -1]
    repeated = [index for index, size in enumerate(devices) if len(devices) - 1 - index not in used and size > 1]
    copies = math.prod(devices[index] for index in repeated)
    size = draw(st.sampled_from([0, -1, *(size for size in range(2, copies + 1) if copies % size == 0)]))
    step = math.prod(devices[repeated[-1] + 1 :]) if repeated and size else 0
    shape = []
    for axis in tensor_map:
        parts = math.prod(devices[len(devices) - 1 - dim] for dim in (axis if nested else [axis]) if dim != -1)
        shape.append(parts * draw(st.integers(1, 3)))
    shape[0] *= 1 if not size else copies if size == -1 else size
    return Cut(devices, tensor_map, step, size if step else 0), shape


@pytest.fixture(scope="session")
def mindspore_imported():
    """Importing it changes Python's recursion limit, which hypothesis would notice in the middle of a test."""
    import mindspore.train.node_strategy_pb2  # noqa: F401


@settings(max_examples=60, deadline=None)
@given(random_cuts())
def test_any_cut_is_joined(tmp_path_factory, same_bits, mindspore_imported, drawn):
    cut, shape = drawn
    folder = tmp_path_factory.mktemp("ranks")
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    write_ckpts(folder, {"a.b": slices(array, cut)})
    (folder / "s.ckpt").write_bytes(strategy_bytes({"a.b": cut}))
    source = opened(folder, folder / "s.ckpt")
    assert source.tensors["a.b"] == TensorInfo(tuple(shape), "float32")
    assert same_bits(source.read("a.b"), array)
    shutil.rmtree(folder)


@pytest.mark.parametrize("tensor_map", [[1, 0], [0, 2], [-1, 1], [2, -1], [-1, -1]])
def test_slices_that_mindspore_cuts_are_joined(tmp_path, same_bits, tensor_map):
    import mindspore
    from mindspore.parallel._tensor import _load_tensor

    devices, array = [2, 3, 2], np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)
    parts = [_load_tensor(mindspore.Tensor(array), devices, tensor_map, None, rank) for rank in range(12)]
    write_ckpts(tmp_path, {"a.b": parts})
    (tmp_path / "s.ckpt").write_bytes(strategy_bytes({"a.b": Cut(devices, tensor_map)}))
    assert same_bits(opened(tmp_path, tmp_path / "s.ckpt").read("a.b"), array)


def test_joined_query_key_value(arrays, spec, tmp_path, expected, same_bits):
    """The optimizer's shards of a qkv_concat tensor are joined and split; what model_parallel cut is refused."""
    joined = dict(arrays)
    for layer in range(2):
        at = f"model.layers.{layer}.attention"
        joined[f"{at}.w_qkv.weight"] = np.concatenate([joined.pop(f"{at}.{one}.weight") for one in ("wq", "wk", "wv")])
    folder, strategy = write_distributed(tmp_path / "a", joined, [llama_cuts(joined, 4, 1, -1)])
    source = open_weights(folder, spec, strategy=strategy)
    check_against(spec, source)
    assert all(same_bits(source.read(name), expected[name]) for name in expected)
    cuts = llama_cuts(joined, 1, 2)
    cuts["model.layers.0.attention.w_qkv.weight"] = Cut([1, 2], [0, -1])
    folder, strategy = write_distributed(tmp_path / "b", joined, [cuts])
    with pytest.raises(InputError, match=r"'model.layers.0.attention.w_qkv.weight' \(qkv_concat\) is cut along its"):
        open_weights(folder, spec, strategy=strategy)


@pytest.fixture
def saved(arrays, tmp_path):
    """2 stages x data 2 x model 2."""
    return write_distributed(tmp_path, arrays, [llama_cuts(part, 2, 2) for part in stages_of(arrays, 2)])


def test_equal_slices_are_read_once_and_one_rank_of_them_is_enough(saved, arrays, same_bits):
    """Also where MindSpore saves each slice once (remove_redundancy)."""
    folder, strategy = saved
    shutil.rmtree(folder / "rank_0")
    for rank in (5, 6):
        (folder / f"rank_{rank}" / f"llama_rank_{rank}-1_2.ckpt").unlink()
    source = opened(folder, strategy)
    assert all(same_bits(source.read(name), array) for name, array in arrays.items())
    pieces = source.entries["model.layers.0.attention.wq.weight"].pieces
    assert [piece.stored.file.parent.name for piece in pieces] == ["rank_1", "rank_2"]


def test_one_tensor_and_one_slice_are_in_memory(tmp_path):
    array, cut = np.ones((1024, 2048), np.float32), Cut([2, 2], [1, 0])
    write_ckpts(tmp_path, {name: slices(array, cut) for name in ("a.b", "a.c")})
    (tmp_path / "s.ckpt").write_bytes(strategy_bytes({"a.b": cut, "a.c": cut}))
    source = opened(tmp_path, tmp_path / "s.ckpt")
    tracemalloc.start()
    try:
        for name in ("a.b", "a.c"):
            assert source.read(name).nbytes == array.nbytes
        assert tracemalloc.get_traced_memory()[1] < 1.3 * array.nbytes
    finally:
        tracemalloc.stop()


def test_missing_ranks_and_tensors_are_named(saved, arrays):
    folder, strategy = saved
    for rank in (0, 2):
        shutil.rmtree(folder / f"rank_{rank}")
    with pytest.raises(InputError) as caught:
        opened(folder, strategy)
    assert len(caught.value.problems) == 1
    assert f"{folder}: has no rank_0 with a CKPT, which held slices of" in str(caught.value)
    assert "that no other rank has" in str(caught.value)


def test_a_rank_whose_file_lacks_a_tensor(tmp_path):
    array = np.zeros((4, 4), np.float32)
    cuts = {"a.b": Cut([2], [0, -1]), "a.c": Cut([2], [0, -1])}
    write_ckpts(tmp_path, {name: slices(array, cut) for name, cut in cuts.items()})
    write_ckpts(tmp_path / "other", {"a.c": slices(array, cuts["a.c"])})
    shutil.copy(tmp_path / "other" / "rank_1" / "x.ckpt", tmp_path / "rank_1" / "x.ckpt")
    (tmp_path / "s.ckpt").write_bytes(strategy_bytes(cuts))
    with pytest.raises(InputError, match=r"rank_1: its file lacks slices of 1 tensors \(first: 'a.b'\)"):
        opened(tmp_path, tmp_path / "s.ckpt")


def test_a_strategy_of_another_model_or_layout(saved, arrays, tmp_path, spec, capsys):
    folder, strategy = saved
    other = tmp_path / "other.ckpt"
    other.write_bytes(strategy_bytes({"model.layers.0.attention.wqq.weight": Cut([8], [0, -1])}))
    with pytest.raises(InputError, match="other.ckpt: names none of the tensors in"):
        opened(folder, other)
    first = strategy / "ckpt_strategy_rank_0.ckpt"
    with pytest.raises(InputError, match=r"rank_7: is there, but \S+rank_0.ckpt describes 4 ranks \(1 pipeline stages"):
        opened(folder, first)
    with pytest.raises(InputError, match=r"rank_4.ckpt: has pipeline stage 1, but not stage 0: name the folder"):
        opened(folder, strategy / "ckpt_strategy_rank_4.ckpt")
    # Cut by a strategy that leaves a tensor out: it is said, and the config finds the slice.
    cuts = llama_cuts(arrays, 1, 2)
    place, given = write_distributed(tmp_path / "one", arrays, [cuts])
    del cuts["model.layers.1.attention.wk.weight"]
    other.write_bytes(strategy_bytes(cuts))
    with pytest.raises(InputError, match=r"k_proj.weight' has shape \[8, 32\], but the config says \[16, 32\]"):
        check_against(spec, open_weights(place, spec, strategy=other))
    assert "does not name 1 tensors of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parts", "cut", "message"),
    [
        ([(2, 4), (3, 4)], Cut([2], [0, -1]), r"'a.b' is float32 \[3, 4\], but float32 \[2, 4\] in"),
        ([(2, 4), (2, 4)], Cut([2], [0]), r"has shape \[2, 4\], the strategy cuts 1 axes"),
        ([(2, 4), (2, 4)], Cut([2, 0], [0, -1]), r"the device matrix \[2, 0\] is impossible"),
        ([(2, 4), (2, 4)], Cut([2], [1, -1]), r"the tensor map \[\[1\], \[-1\]\] does not fit the device matrix \[2\]"),
        ([(2, 4), (2, 4)], Cut([2], [0, 0]), r"the tensor map \[\[0\], \[0\]\] does not fit"),
        ([(2, 4), (2, 4)], Cut([2], [-1, -1], 1, 3), "2 copies of a slice cannot be cut into 3 shards"),
        ([(2, 4), (2, 4)], Cut([2], [-1, -1], 1, -2), "cannot be cut into -2 shards"),
        ([(2, 4), (2, 4)], Cut([2], [-1, -1], 2, 2), "the shards' ranks cannot be 2 apart"),
    ],
)
def test_slices_that_do_not_fit(tmp_path, parts, cut, message):
    write_ckpts(tmp_path, {"a.b": [np.zeros(shape, np.float32) for shape in parts]})
    (tmp_path / "s.ckpt").write_bytes(strategy_bytes({"a.b": cut}))
    with pytest.raises(InputError, match=message):
        opened(tmp_path, tmp_path / "s.ckpt")


def test_uneven_cuts_are_refused(tmp_path):
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    for change in (lambda cut: cut.param_split_shape[0].dim.extend([1, 3]), lambda cut: setattr(cut, "field", 2)):
        message = ParallelStrategyMap.FromString(strategy_bytes({"a.b": Cut([2], [0, -1])}))
        change(message.parallel_layout_item[0].parallel_layouts)
        (tmp_path / "s.ckpt").write_bytes(message.SerializeToString())
        with pytest.raises(InputError, match=r"s.ckpt: parameter 'a.b': is cut into uneven parts or by fields"):
            read_strategy(tmp_path / "s.ckpt")


def test_what_is_no_strategy(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.ckpt").write_bytes(b"")
    (tmp_path / "only_stage.ckpt").write_bytes(b"\x08\x01")
    weights = saved[0] / "rank_0" / "llama_rank_0-1_2.ckpt"
    for path, message in (
        (tmp_path / "empty", "holds no strategy file"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "s.json", "strategies saved as JSON are not read"),
        (tmp_path / "none.ckpt", "holds no parameter's layout"),
        (tmp_path / "only_stage.ckpt", "holds no parameter's layout"),
        (weights, "no MindSpore strategy file, or truncated or damaged"),
    ):
        with pytest.raises(InputError, match=message):
            read_strategy(path)


def test_files_that_disagree(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(strategy_bytes({"a.b": Cut([2], [0, -1])}))
    (tmp_path / "b.ckpt").write_bytes(strategy_bytes({"a.b": Cut([2], [-1, 0])}))
    with pytest.raises(InputError, match="b.ckpt: 'a.b' is cut in another way"):
        read_strategy(tmp_path)
    (tmp_path / "b.ckpt").write_bytes(strategy_bytes({"a.c": Cut([4], [-1, 0])}))
    with pytest.raises(InputError, match=r"are cut over different numbers of ranks \(\[2, 4\]\)"):
        read_strategy(tmp_path)


def test_every_cut_strategy_is_an_error_or_a_shorter_one(tmp_path):
    """A file cut between two parameters is a sound shorter file; everywhere else the cut is seen."""
    content, path, sound = strategy_bytes({f"a.{name}": Cut([2, 2], [1, -1]) for name in "bcd"}), tmp_path / "s.ckpt", 0
    path.write_bytes(content)
    whole = read_strategy(path).layouts
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            found = read_strategy(path).layouts
        except InputError as error:
            assert str(path) in str(error)
        else:
            sound += 1
            assert found.items() < whole.items()
    assert sound == 2


def test_all_ranks_files_are_of_one_step(saved, arrays, same_bits):
    folder, strategy = saved
    older = {name: array + 1 for name, array in arrays.items()}
    later = write_distributed(folder.parent, older, [llama_cuts(part, 2, 2) for part in stages_of(older, 2)], "1_4")
    assert later == saved
    (folder / "rank_0" / "meta.json").write_text('{"last_ckpt_file": "llama_rank_0-1_2.ckpt"}')
    assert {file.name[-8:] for file in rank_folder.files(folder).values()} == {"1_2.ckpt"}
    (folder / "rank_0" / "meta.json").unlink()
    for place in folder.iterdir():
        for age, name in enumerate(sorted(place.iterdir())):
            os.utime(name, (1000 + age, 1000 + age))
    assert {file.name[-8:] for file in rank_folder.files(folder).values()} == {"1_4.ckpt"}
    name = "model.layers.1.feed_forward.w2.weight"
    assert same_bits(opened(folder, strategy).read(name), older[name])
    (folder / "rank_3" / "llama_rank_3-1_4.ckpt").unlink()
    with pytest.raises(InputError, match=r"rank_3: holds no llama_rank_3-1_4.ckpt, which goes with \S+rank_0-1_4.ckpt"):
        opened(folder, strategy)


def test_a_folder_without_ranks(tmp_path, saved):
    for path in (tmp_path / "nowhere", saved[0] / "rank_0", saved[0] / "rank_0" / "llama_rank_0-1_2.ckpt"):
        with pytest.raises(InputError, match="is no folder of rank_0, rank_1, ..."):
            open_weights(path, strategy=saved[1])
