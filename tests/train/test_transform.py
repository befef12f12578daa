"""Protects `msft transform_ckpt`: the same numbers under any layout, in bounded memory, and what cannot be is named."""

import resource
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest

from msft.backend import slices
from msft.backend.contract import StateParts
from msft.backend.mesh import Mesh
from msft.cli.main import main
from msft.convert import safetensors_file
from msft.files import write_json
from msft.train import checkpoint, manifest, sliced

SIZE = 512
SHAPES = {
    f"model.layers.{number}.self_attn.{name}_proj.weight": (SIZE, SIZE) for number in range(6) for name in "qo"
} | {"model.norm.weight": (SIZE,), "model.embed_tokens.weight": (SIZE, 8)}
MEGABYTE = 2**20


def arrays(kind):
    generator = np.random.default_rng(len(kind))
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def source(tmp_path):
    """A checkpoint of 2 x 2 processes."""
    folder = tmp_path / "step-4"
    wholes = [arrays(kind) for kind in sliced.KINDS]
    for rank in range(4):
        places = slices.places(SHAPES, Mesh(2, 2, rank))
        kinds = ({name: place.of(whole[name]) for name, place in places.items()} for whole in wholes)
        sliced.write(folder, rank, StateParts(*kinds, places, {}))
    counters = {"step": 4.0, "optimizer_step": 4.0, "loss_scale": 1.0, "good_steps": 4.0}
    state = checkpoint.TrainerState(
        *(4, 0.5, 8, 4, 3, "0" * 64),
        *({}, {}, {}, {}),
        *(100, 0, counters, tuple(SHAPES), "torch", 4, {}),
    )
    write_json(folder / checkpoint.STATE, asdict(state))
    manifest.write(folder, sliced.wait(folder, 4))
    return folder


def transform(source, target, layout, *words):
    return main(["transform_ckpt", "--src", str(source), "--dst", str(target), "--dst_layout", layout, *words])


def test_any_layout_and_back_is_bit_equal(source, tmp_path, capsys):
    way = [source, *(tmp_path / name for name in ("one", "eight", "back"))]
    for before, after, layout in zip(way, way[1:], ("1x1", "2x4", "2x2"), strict=False):
        assert transform(before, after, layout) == 0
        assert manifest.problems(after) == []
    assert "wrote" in capsys.readouterr().out
    assert len([*(tmp_path / "one" / "slices").glob("*.safetensors")]) == 1
    assert len([*(tmp_path / "eight" / "slices").glob("*.safetensors")]) == 8
    for kind in sliced.KINDS:
        found = sliced.Tensors(tmp_path / "eight", kind)
        for name, array in arrays(kind).items():
            np.testing.assert_array_equal(found[name], array)
    for path in (source / "slices").glob("*.safetensors"):
        assert (tmp_path / "back" / "slices" / path.name).read_bytes() == path.read_bytes()
    assert checkpoint.read_state(tmp_path / "back") == checkpoint.read_state(source)


def test_more_parts_than_a_process_may_have_files_open(source, tmp_path, monkeypatch):
    monkeypatch.setattr("msft.train.transform.FILES_AT_ONCE", 16)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(source / checkpoint.STATE) as probe:
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe.fileno() + 32, limits[1]))
    try:
        assert transform(source, tmp_path / "many", "16x4") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    found = sliced.Tensors(tmp_path / "many", "second_moment")
    for name, array in arrays("second_moment").items():
        np.testing.assert_array_equal(found[name], array)


def test_a_vocabulary_is_cut_where_it_is_asked_for(source, tmp_path):
    def shapes(folder):
        path = folder / "slices" / "rank-1.safetensors"
        stored = safetensors_file.read_index(path)
        return {name: stored[f"weights.{name}"].info.shape for name in SHAPES if f"weights.{name}" in stored}

    name, other = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
    assert transform(source, tmp_path / "whole", "1x2") == 0
    assert transform(source, tmp_path / "cut", "1x2", "--vocab_emb_dp", "False") == 0
    assert name not in shapes(tmp_path / "whole") and shapes(tmp_path / "cut")[name] == (SIZE // 2, 8)
    assert shapes(tmp_path / "whole")[other] == shapes(tmp_path / "cut")[other] == (SIZE // 2, SIZE)
    assert manifest.problems(tmp_path / "cut") == []
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        np.testing.assert_array_equal(sliced.Tensors(folder, "weights")[name], arrays("weights")[name])


def test_one_tensor_at_a_time(source, tmp_path):
    tracemalloc.start()
    assert transform(source, tmp_path / "one", "1x1") == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All are 36 MB; a tensor is 1 MB, with its parts, pieces and hashes 4.
    assert peak < 5 * MEGABYTE


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("2", "'2' is not data_parallel x model_parallel, such as 4x2"),
        ("0x2", "'0x2' is not data_parallel"),
        ("1x3", "3 does not divide 'model.layers.0.self_attn.q_proj.weight' (512, 512)"),
    ],
)
def test_layouts_that_cannot_be(layout, message, source, tmp_path, capsys):
    assert transform(source, tmp_path / "target", layout) == 2
    assert f"--dst_layout: {message}" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_a_damaged_checkpoint_and_a_target_that_is_there(source, tmp_path, capsys):
    (tmp_path / "target").mkdir()
    assert transform(source, tmp_path / "target", "1x1") == 2
    (source / "slices" / "rank-1.safetensors").write_bytes(b"")
    assert transform(source, tmp_path / "other", "1x1") == 2
    errors = capsys.readouterr().err
    assert "--dst: " in errors and "target exists" in errors
    assert "--src: " in errors and "rank-1.safetensors has 0 bytes instead of" in errors
