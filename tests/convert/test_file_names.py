"""Protects families whose files name and join tensors in their own way: read into canonical ones, written back."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msft.convert.check import check_against
from msft.convert.open import open_weights
from msft.convert.random_weights import RandomWeights
from msft.convert.weights import write_ckpt, write_hf_folder
from msft.models.families import spec_from_hf
from tests.conformance.families import CONFIGS


def internlm2(name, of):
    """The release's own split: rearrange 'b q (h gs d) -> b q h gs d', all but the last two of gs are queries."""
    layer = name.removesuffix("attention.wqkv.weight")
    query, key, value = (of(f"{layer}self_attn.{part}_proj.weight") for part in "qkv")
    query, key, value = query.reshape(2, 2, 8, 32), key.reshape(2, 1, 8, 32), value.reshape(2, 1, 8, 32)
    return np.concatenate((query, key, value), 1).reshape(-1, 32)


def one_below_another(name, of):
    layer, _, leaf = name.rpartition(".")
    layer = layer.replace(".self_attn.W_pack", "").replace(".self_attention.query_key_value", "")
    layer = layer.replace("transformer.encoder.layers.", "model.layers.")
    return np.concatenate([of(f"{layer}.self_attn.{part}_proj.{leaf}") for part in "qkv"])


# Config -> (a joined tensor and what it holds), some names in files and the canonical ones.
FILES = {
    "internlm2": (
        ("model.layers.1.attention.wqkv.weight", internlm2),
        {
            "model.tok_embeddings.weight": "model.embed_tokens.weight",
            "model.layers.0.feed_forward.w1.weight": "model.layers.0.mlp.gate_proj.weight",
            "model.layers.0.feed_forward.w3.weight": "model.layers.0.mlp.up_proj.weight",
            "model.layers.1.feed_forward.w2.weight": "model.layers.1.mlp.down_proj.weight",
            "model.layers.1.attention.wo.weight": "model.layers.1.self_attn.o_proj.weight",
            "model.layers.0.attention_norm.weight": "model.layers.0.input_layernorm.weight",
            "model.layers.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
            "output.weight": "lm_head.weight",
        },
    ),
    "baichuan": (
        ("model.layers.1.self_attn.W_pack.weight", one_below_another),
        {"lm_head.weight": "lm_head.weight", "model.norm.weight": "model.norm.weight"},
    ),
    "chatglm": (
        ("transformer.encoder.layers.1.self_attention.query_key_value.bias", one_below_another),
        {
            "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "transformer.encoder.layers.0.self_attention.dense.weight": "model.layers.0.self_attn.o_proj.weight",
            "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight": "model.layers.0.mlp.gate_up_proj.weight",
            "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight": "model.layers.0.mlp.down_proj.weight",
            "transformer.encoder.final_layernorm.weight": "model.norm.weight",
            "transformer.output_layer.weight": "lm_head.weight",
        },
    ),
    "gpt_neox": (None, {"embed_out.weight": "lm_head.weight", "gpt_neox.embed_in.weight": "gpt_neox.embed_in.weight"}),
}


def folder_of(name, path):
    """The model as a folder of its family, and its random tensors."""
    spec = spec_from_hf(CONFIGS[name])
    source = RandomWeights(spec, 3)
    write_hf_folder(source, spec, path, bar=False)
    return spec, source


@pytest.mark.parametrize("name", FILES)
def test_files_hold_what_the_family_says(tmp_path, name):
    spec, source = folder_of(name, tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    joined, names = FILES[name]
    for theirs, canonical in names.items():
        np.testing.assert_array_equal(found[theirs], source.read(canonical))
    if joined:
        np.testing.assert_array_equal(found[joined[0]], joined[1](joined[0], source.read))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == CONFIGS[name]["model_type"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_goes_to_ckpt_and_back_bit_for_bit(tmp_path, name):
    spec, source = folder_of(name, tmp_path / "model")
    opened = open_weights(tmp_path / "model", spec)
    check_against(spec, opened)
    write_ckpt(opened, spec, tmp_path / "model.ckpt")
    again = open_weights(tmp_path / "model.ckpt", spec)
    check_against(spec, again)
    write_hf_folder(again, spec, tmp_path / "back", bar=False)
    for tensor in source.tensors:
        np.testing.assert_array_equal(opened.read(tensor), source.read(tensor))
        np.testing.assert_array_equal(again.read(tensor), source.read(tensor))
    first, last = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "back"))
    assert first.keys() == last.keys()
    assert all(np.array_equal(first[tensor], last[tensor]) for tensor in first)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_files_without_the_models_prefix_and_with_old_masks_are_read(tmp_path, name):
    spec, source = folder_of(name, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    old = {tensor.removeprefix("transformer."): array for tensor, array in load_file(file).items()}
    old["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)
    old["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(old, file)
    opened = open_weights(tmp_path / "model", spec)
    check_against(spec, opened)
    for tensor in source.tensors:
        np.testing.assert_array_equal(opened.read(tensor), source.read(tensor))
