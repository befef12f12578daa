"""Protects files of models with experts: each expert's matrices by themselves; stacked in the model and in CKPTs."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from msft.cli.main import main
from msft.convert.check import check_against
from msft.convert.open import open_weights
from msft.convert.weights import write_hf_folder
from msft.errors import InputError
from msft.models.families import spec_from_hf
from tests.conformance.families import CONFIGS

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


def saved(name, folder, shard_size="50GB"):
    """transformers' model in its own files, and its tensors."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[name]))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return {tensor: array.numpy() for tensor, array in model.state_dict().items()}


def files_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_own_files_go_to_ckpt_and_back(name, shard_size, tmp_path):
    """Of many small shards the experts of a layer lie in several; what is written is what transformers wrote."""
    tensors, spec = saved(name, tmp_path / "model", shard_size), spec_from_hf(CONFIGS[name])
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 5) == (shard_size == "20KB")
    source = open_weights(tmp_path / "model")
    check_against(spec, source)
    assert_equal({tensor: source.read(tensor) for tensor in source.tensors}, tensors)
    words = ("convert_weight", "--model", name)
    assert main([*words, "--input_path", str(tmp_path / "model"), "--output_path", str(tmp_path / "m.ckpt")]) == 0
    back = ("--input_path", str(tmp_path / "m.ckpt"), "--output_path", str(tmp_path / "back"), "--reversed")
    assert main([*words, *back]) == 0
    assert_equal(files_of(tmp_path / "back"), files_of(tmp_path / "model"))
    write_hf_folder(source, spec, tmp_path / "again", bar=False, shard_bytes=20_000)
    assert_equal(files_of(tmp_path / "again"), files_of(tmp_path / "model"))


def test_a_mixtral_ckpt_has_mindformers_names(tmp_path):
    """As its research/mixtral scripts stack them: all gates, all of what they let through, all last matrices."""
    from msft.convert import ckpt
    from msft.convert.stored import StoredTensors

    saved("mixtral", tmp_path / "model")
    words = ("convert_weight", "--model", "mixtral", "--input_path", str(tmp_path / "model"))
    assert main([*words, "--output_path", str(tmp_path / "m.ckpt")]) == 0
    found = StoredTensors(ckpt.read_index(tmp_path / "m.ckpt").tensors)
    theirs, layer = files_of(tmp_path / "model"), "model.layers.1."
    for matrix in ("w1", "w2", "w3"):
        stack = [theirs[f"{layer}block_sparse_moe.experts.{number}.{matrix}.weight"] for number in range(5)]
        np.testing.assert_array_equal(found.read(f"{layer}feed_forward.ffn.{matrix}.weight"), np.stack(stack))
    router = theirs[f"{layer}block_sparse_moe.gate.weight"]
    np.testing.assert_array_equal(found.read(f"{layer}feed_forward.router.dense.weight"), router)
    assert not any("experts" in name for name in found.tensors)


def test_stacked_tensors_and_bin_files_are_read_too(tmp_path):
    """What torch.save makes of a model's own tensors: experts stacked, whatever transformers would write."""
    tensors, spec = saved("qwen2_moe", tmp_path / "model"), spec_from_hf(CONFIGS["qwen2_moe"])
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, tmp_path / "model/pytorch_model.bin")
    source = open_weights(tmp_path / "model", spec)
    check_against(spec, source)
    assert_equal({tensor: source.read(tensor) for tensor in source.tensors}, tensors)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (None, r"experts.gate_up_proj' lacks matrices, first one of expert 4$"),
        (
            np.zeros((24, 16), np.float32),
            r"16 wide and float32, 32 wide, they must be 32 wide and of one dtype$",
        ),
        (np.zeros((24, 32), np.float16), r"are float16, 32 wide and float32, 32 wide, they must be 32 wide"),
    ],
)
def test_a_matrix_that_is_missing_or_of_another_kind_is_named(changed, message, tmp_path):
    saved("qwen3_moe", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.experts.4.up_proj.weight"
    del tensors[name]
    save_file(tensors | ({} if changed is None else {name: changed}), file)
    with pytest.raises(InputError, match=message):
        open_weights(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_local_experts"] == 6
