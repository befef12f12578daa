"""Protects checkpoints of parts: the parts of any layout are the whole, bit for bit; what does not fit is named."""

import json
import math
import os
import threading

import numpy as np
import pytest

from msft.backend import slices
from msft.backend.contract import Place, StateParts
from msft.backend.mesh import Mesh
from msft.errors import InputError, RunError
from msft.train import manifest, sliced

BLOCK = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    f"{BLOCK}self_attn.q_proj.weight": (8, 6),
    f"{BLOCK}self_attn.o_proj.weight": (6, 8),
    f"{BLOCK}self_attn.o_proj.bias": (6,),
    f"{BLOCK}input_layernorm.weight": (3,),
}
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)]


def wholes(seed):
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def parts(kinds, mesh):
    """What an engine's rank gives: its rows of its slices."""
    places, found = slices.places(SHAPES, mesh), [{}, {}, {}]
    for name in places:
        for arrays, given in zip(found, kinds, strict=True):
            own = slices.cut(given[name], slices.axis(name, mesh), mesh)
            arrays[name] = own[mesh.rows(len(own))]
    return StateParts(*found, places, {})


def written(folder, data, tensor):
    kinds = [wholes(seed) for seed in range(3)]
    for rank in range(data * tensor):
        sliced.write(folder, rank, parts(kinds, Mesh(data, tensor, rank)))
    return kinds


@pytest.mark.parametrize(("data", "tensor"), LAYOUTS)
def test_parts_of_any_layout_are_the_whole(data, tensor, tmp_path):
    kinds = written(tmp_path, data, tensor)
    assert sliced.is_sliced(tmp_path)
    for kind, expected in zip(sliced.KINDS, kinds, strict=True):
        found = sliced.Tensors(tmp_path, kind)
        assert found.shapes == SHAPES
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def flat_parts(kinds, ranks, rank):
    """What a rank of ZeRO gives: its range of all tensors one after another, cut within rows too."""
    total = sum(math.prod(shape) for shape in SHAPES.values())
    begin, end = total * rank // ranks, total * (rank + 1) // ranks
    places, found, before = {}, [{}, {}, {}], 0
    for name, shape in SHAPES.items():
        first, last = (min(max(bound - before, 0), math.prod(shape)) for bound in (begin, end))
        before += math.prod(shape)
        if last > first:
            places[name] = Place(shape, (first,), (last - first,))
            for arrays, given in zip(found, kinds, strict=True):
                arrays[name] = given[name].flatten()[first:last]
    return StateParts(*found, places, {})


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranges_of_flattened_tensors_are_the_whole(ranks, tmp_path):
    kinds = [wholes(seed) for seed in range(3)]
    for rank in range(ranks):
        sliced.write(tmp_path, rank, flat_parts(kinds, ranks, rank))
    for kind, expected in zip(sliced.KINDS, kinds, strict=True):
        found = sliced.Tensors(tmp_path, kind)
        assert found.shapes == SHAPES
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_a_range_lies_where_its_numbers_are():
    """4 x 3 numbers from 0 on: five of them from the third on end in the second row of two."""
    place = Place((4, 3), (2,), (5,))
    whole = np.arange(12.0).reshape(4, 3)
    assert place.of(whole).tolist() == [2, 3, 4, 5, 6]
    place.of(whole)[...] = -1
    assert whole.tolist() == [[0, 1, -1], [-1, -1, -1], [-1, 7, 8], [9, 10, 11]]
    assert place.fits() and not place._replace(start=(8,)).fits() and not place._replace(start=(-1,)).fits()


@pytest.mark.parametrize("shift", [1, -1])
def test_ranges_that_leave_a_gap_or_overlap_are_named(shift, tmp_path):
    kinds = [wholes(seed) for seed in range(3)]
    name = "model.embed_tokens.weight"
    for rank in range(3):
        given = flat_parts(kinds, 3, rank)
        if rank == 1:
            given.places[name] = given.places[name]._replace(start=(given.places[name].start[0] + shift,))
        sliced.write(tmp_path, rank, given)
    with pytest.raises(InputError, match="the parts of weights 'model.embed_tokens.weight' are not the whole"):
        sliced.Tensors(tmp_path, "weights")


def test_every_number_is_written_once(tmp_path):
    written(tmp_path, 4, 2)
    counted = sum(
        array.size for rank in range(8) for array in parts([wholes(0)] * 3, Mesh(4, 2, rank)).weights.values()
    )
    assert counted == sum(np.prod(shape) for shape in SHAPES.values())


def test_a_missing_part_is_named(tmp_path):
    written(tmp_path, 2, 2)
    (tmp_path / "slices" / "rank-3.safetensors").unlink()
    with pytest.raises(InputError, match=r"slices: the parts of first moment '\S+' are not the whole"):
        sliced.Tensors(tmp_path, "first_moment")


def test_a_part_that_is_there_twice_is_named(tmp_path):
    written(tmp_path, 2, 1)
    content = (tmp_path / "slices" / "rank-0.safetensors").read_bytes()
    (tmp_path / "slices" / "rank-1.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="are not the whole"):
        sliced.Tensors(tmp_path, "weights")


def test_a_part_outside_its_tensor_is_named(tmp_path):
    state = parts([wholes(0)] * 3, Mesh())
    name = f"{BLOCK}input_layernorm.weight"
    state.places[name] = state.places[name]._replace(start=(1,))
    sliced.write(tmp_path, 0, state)
    with pytest.raises(InputError, match="input_layernorm.weight' are not the whole"):
        sliced.Tensors(tmp_path, "weights")


def test_parts_that_overlap_and_leave_a_gap_of_the_same_size_are_named(tmp_path):
    """Rows 0 and 1, 1 and 2 of four: as many numbers as the whole, from different places, yet row 3 is in no part."""
    for rank in range(2):
        arrays = {"a": np.ones((2, 5), np.float32)}
        sliced.write(tmp_path, rank, StateParts(*[arrays] * 3, {"a": Place((4, 5), (rank, 0), (2, 5))}, {}))
    with pytest.raises(InputError, match="'a' are not the whole"):
        sliced.Tensors(tmp_path, "weights")


@pytest.mark.parametrize(("whole", "start"), [("ab", "cd"), ((2.0, 5.0), (0.0, 0.0)), ((2, 5), (None, 0)), (10, 0)])
def test_places_that_are_no_whole_numbers_are_named(whole, start, tmp_path):
    arrays = {"a": np.ones((2, 5), np.float32)}
    sliced.write(tmp_path, 0, StateParts(*[arrays] * 3, {"a": Place(whole, start, (2, 5))}, {}))
    with pytest.raises(InputError, match="rank-0.safetensors: does not say where its parts belong"):
        sliced.Tensors(tmp_path, "weights")


def test_a_file_without_places_is_named(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "slices").mkdir()
    save_file({"weights.a": np.zeros(3, np.float32)}, tmp_path / "slices" / "rank-0.safetensors")
    with pytest.raises(InputError, match="rank-0.safetensors: does not say where its parts belong"):
        sliced.Tensors(tmp_path, "weights")


def test_waiting_ends_with_the_last_rank_and_gives_what_the_manifest_says(tmp_path):
    state = parts([wholes(0)] * 3, Mesh())
    late = threading.Timer(0.3, lambda: sliced.write(tmp_path, 1, state))
    sliced.write(tmp_path, 0, state)
    late.start()
    known = sliced.wait(tmp_path, 2)
    late.join()
    manifest.write(tmp_path, known)
    assert manifest.problems(tmp_path) == []
    assert json.loads((tmp_path / manifest.NAME).read_text())["files"].items() >= known.items()


def test_the_first_rank_may_rename_the_folder_as_soon_as_the_last_note_is_there(tmp_path, monkeypatch):
    state, replace = parts([wholes(0)] * 3, Mesh()), os.replace

    def replaced(old, new):
        replace(old, new)
        if str(new).endswith("rank-0.json"):
            (tmp_path / "temporary").rename(tmp_path / "whole")

    monkeypatch.setattr(os, "replace", replaced)
    sliced.write(tmp_path / "temporary", 0, state)
    assert sliced.wait(tmp_path / "whole", 1)


def test_ranks_that_never_write_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sliced, "WAIT_SECONDS", 0.1)
    sliced.write(tmp_path, 1, parts([wholes(0)] * 3, Mesh()))
    with pytest.raises(RunError, match="the parts of rank 0, 2 did not appear within 0 s: output_dir must be a folder"):
        sliced.wait(tmp_path, 3)
