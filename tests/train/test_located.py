"""What a folder in `load_checkpoint` stands for: MindFormers' rank folders and msft's own checkpoints."""

import json
import os

import numpy as np
import pytest

from msft.config.load import load_recipe
from msft.convert.ckpt import CkptWriter, read_index
from msft.convert.dtypes import Cast
from msft.convert.open import read_spec
from msft.convert.random_weights import RandomWeights
from msft.convert.source import TensorInfo
from msft.convert.stored import StoredTensors
from msft.convert.weights import write_ckpt
from msft.errors import InputError
from msft.train import manifest, sources
from msft.train.located import located


@pytest.fixture
def rank_0(tmp_path):
    folder = tmp_path / "checkpoint" / "rank_0"
    folder.mkdir(parents=True)
    for age, name in enumerate(("b_rank_0-1_9.ckpt", "a_rank_0-1_10.ckpt")):
        (folder / name).write_text("x")
        os.utime(folder / name, (1000 + age, 1000 + age))
    return folder


def test_the_file_that_meta_names(rank_0):
    (rank_0 / "meta.json").write_text(json.dumps({"last_ckpt_file": "b_rank_0-1_9.ckpt"}))
    assert located(rank_0.parent) == rank_0 / "b_rank_0-1_9.ckpt"


@pytest.mark.parametrize("meta", [None, "", "[]", '{"last_ckpt_file": 3}', '{"last_ckpt_file": "../../x.ckpt"}'])
def test_else_the_newest(rank_0, meta, capsys):
    (rank_0.parent.parent / "x.ckpt").write_text("outside")
    if meta is not None:
        (rank_0 / "meta.json").write_text(meta)
    assert located(rank_0.parent) == rank_0 / "a_rank_0-1_10.ckpt"
    assert ("names no file here" in capsys.readouterr().err) == (meta is not None)


def test_a_rank_folder_without_files(tmp_path):
    (tmp_path / "rank_0").mkdir()
    with pytest.raises(InputError, match="holds no CKPT"):
        located(tmp_path)


def test_a_folder_of_checkpoints_is_its_newest_whole_one(tmp_path, capsys):
    checkpoints = tmp_path / "checkpoints"
    for step in (4, 8):
        (checkpoints / f"step-{step}").mkdir(parents=True)
        (checkpoints / f"step-{step}" / "x").write_text("x")
        manifest.write(checkpoints / f"step-{step}")
    assert located(checkpoints) == located(tmp_path) == checkpoints / "step-8"
    (checkpoints / "step-8" / "x").unlink()
    assert located(checkpoints) == checkpoints / "step-4"
    (checkpoints / "step-4" / "x").unlink()
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        located(tmp_path)
    assert "step-8 is damaged and passed over" in capsys.readouterr().err


def test_anything_else_is_itself(tmp_path, tiny_model):
    assert located(tiny_model) == tiny_model
    assert located(tmp_path / "nowhere") == tmp_path / "nowhere"


def ranks_of(folder, spec, halved):
    """Two ranks' files: whole models, or with the first matrix cut in two."""
    for rank in range(2):
        path = folder / f"rank_{rank}" / f"x_rank_{rank}-network.ckpt"
        path.parent.mkdir(parents=True)
        write_ckpt(RandomWeights(spec, 1), spec, path)
        if halved:
            source = StoredTensors(read_index(path).tensors)
            arrays = {name: source.read(name) for name in source.tensors}
            name = "model.layers.0.attention.wq.weight"
            arrays[name] = np.ascontiguousarray(arrays[name][:16])
            with open(path, "wb") as file:
                writer, keep = CkptWriter(file), Cast(None)
                for name, array in arrays.items():
                    writer.add(name, TensorInfo(array.shape, array.dtype.name), keep.pieces(name, array))
                writer.close()
    return folder


def test_whole_tensors_of_several_ranks_are_read_slices_are_refused(tmp_path, write_recipe, tiny_model):
    spec = read_spec(tiny_model)

    def opened(folder):
        return sources.open_all(load_recipe(write_recipe(), ["--load_checkpoint", str(folder)]), spec, None)

    whole = ranks_of(tmp_path / "whole", spec, halved=False)
    assert opened(whole).path == whole / "rank_0" / "x_rank_0-network.ckpt"
    sliced = ranks_of(tmp_path / "sliced", spec, halved=True)
    with pytest.raises(InputError) as caught:
        opened(sliced)
    assert f"{sliced}: holds files of 2 ranks, and one rank's alone do not fit" in str(caught.value)
    assert "name src_strategy_path_or_dir" in str(caught.value)
    assert "'model.layers.0.self_attn.q_proj.weight' has shape [16, 32]" in str(caught.value)
