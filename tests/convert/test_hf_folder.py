"""Hugging Face folders: transformers' layouts read, indexes that lie or escape refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from msft.convert.open import open_weights
from msft.errors import InputError


def check_equal(source, expected, same_bits):
    assert set(source.tensors) == set(expected)
    for name, array in expected.items():
        assert same_bits(source.read(name), array), name


def test_one_safetensors_file(hf_folder, expected, same_bits):
    check_equal(open_weights(hf_folder), expected, same_bits)
    check_equal(open_weights(hf_folder / "model.safetensors"), expected, same_bits)


@pytest.fixture(scope="module")
def sharded(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "model"
    model.save_pretrained(folder, max_shard_size="15KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_shards_and_every_file_of_the_folder_stand_for_the_whole(sharded, expected, same_bits):
    """MindFormers' --input_path is "a folder or a file in it"."""
    check_equal(open_weights(sharded), expected, same_bits)
    for name in ("model.safetensors.index.json", "config.json", sorted(p.name for p in sharded.glob("model-0*"))[1]):
        check_equal(open_weights(sharded / name), expected, same_bits)


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files(tmp_path, model, expected, same_bits, shards):
    state = model.state_dict()
    names = list(state)
    if shards == 1:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        weight_map = {}
        for number in range(2):
            part, file = names[number::2], f"pytorch_model-{number + 1:05}-of-00002.bin"
            torch.save({name: state[name] for name in part}, tmp_path / file)
            weight_map |= dict.fromkeys(part, file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check_equal(open_weights(tmp_path), expected, same_bits)
    check_equal(open_weights(next(tmp_path.glob("*.bin"))), expected, same_bits)


def changed_index(sharded, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    change(value, folder)
    index.write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("target", ["../outside.safetensors", "a/../../outside.safetensors", "{absolute}"])
def test_an_index_that_points_outside_its_folder(sharded, tmp_path, target):
    shutil.copyfile(next(sharded.glob("model-00001*")), tmp_path / "outside.safetensors")
    target = target.format(absolute=tmp_path / "outside.safetensors")

    def change(index, _):
        index["weight_map"]["model.norm.weight"] = target

    folder = changed_index(sharded, tmp_path, change)
    with pytest.raises(InputError, match="points to '.*outside.safetensors', outside its folder"):
        open_weights(folder)


def test_a_shard_that_links_outside(sharded, tmp_path):
    def change(_, folder):
        shard = next(folder.glob("model-00001*"))
        shutil.move(shard, tmp_path / "outside.safetensors")
        shard.symlink_to(tmp_path / "outside.safetensors")

    with pytest.raises(InputError, match="outside its folder"):
        open_weights(changed_index(sharded, tmp_path, change))


def test_links_of_the_hub_cache_are_followed(sharded, tmp_path, expected, same_bits):
    """Hugging Face's cache holds snapshots/REVISION/FILE -> ../../blobs/HASH."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in sharded.iterdir():
        shutil.copyfile(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    check_equal(open_weights(snapshot), expected, same_bits)


def test_an_index_that_lies_is_named(sharded, tmp_path):
    def change(index, folder):
        index["weight_map"]["model.norm.weight"] = next(
            file.name
            for file in sorted(folder.glob("model-0*"))
            if file.name != index["weight_map"]["model.norm.weight"]
        )
        index["weight_map"]["invented"] = index["weight_map"]["lm_head.weight"]

    folder = changed_index(sharded, tmp_path, change)
    with pytest.raises(InputError) as error:
        open_weights(folder)
    assert len(error.value.problems) == 2
    assert "model-00001-of" in str(error.value) and "lacks tensor 'model.norm.weight'" in str(error.value)
    assert "lacks tensor 'invented'" in str(error.value)


def test_a_missing_shard_is_named(sharded, tmp_path):
    folder = changed_index(sharded, tmp_path, lambda _, folder: next(folder.glob("model-00002*")).unlink())
    with pytest.raises(InputError, match="shard model-00002-of-.* is missing"):
        open_weights(folder)


def test_a_truncated_shard_is_named(sharded, tmp_path):
    def change(_, folder):
        shard = next(folder.glob("model-00002*"))
        shard.write_bytes(shard.read_bytes()[:-1])

    with pytest.raises(InputError, match="model-00002-of-.*truncated"):
        open_weights(changed_index(sharded, tmp_path, change))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}', "\xff", "[" * 99999]
)
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="index.json"):
        open_weights(tmp_path)


def test_tensors_beside_the_index_are_kept_for_the_check(sharded, tmp_path, expected):
    """A tensor that the index forgets is not hidden: whoever checks the source against a model sees it."""

    def change(index, _):
        del index["weight_map"]["model.norm.weight"]

    assert set(open_weights(changed_index(sharded, tmp_path, change)).tensors) == set(expected)


def test_reads_are_copies(hf_folder):
    source = open_weights(hf_folder)
    source.read("model.norm.weight")[:] = 7
    assert not np.all(source.read("model.norm.weight") == 7)
