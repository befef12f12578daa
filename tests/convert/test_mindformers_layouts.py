"""Protects CKPTs whose tensors MindFormers 1.3.2 splits, joins or transposes: as its converters do, and back bit-equal.

What is expected is written from its convert_weight.py of gpt2, bloom, glm2 and t5.
"""

import numpy as np
import pytest

from msft.convert.check import check_against
from msft.convert.ckpt import CkptWriter, read_index
from msft.convert.open import open_weights
from msft.convert.random_weights import RandomWeights
from msft.convert.source import TensorInfo
from msft.convert.stored import StoredTensors
from msft.convert.weights import write_ckpt, write_hf_folder
from msft.errors import InputError
from msft.models.families import spec_from_hf
from tests.conformance.families import CONFIGS
from tests.conformance.tiny_engines import Perturbed

AROUND = {
    "gpt2": {
        "backbone.embedding.word_embedding.embedding_table": "transformer.wte.weight",
        "backbone.embedding.position_embedding.embedding_table": "transformer.wpe.weight",
        "backbone.layernorm.gamma": "transformer.ln_f.weight",
        "backbone.layernorm.beta": "transformer.ln_f.bias",
    },
    "bloom": {
        "transformer.embedding.word_embedding.embedding_table": "transformer.word_embeddings.weight",
        "transformer.embedding.norm.gamma": "transformer.word_embeddings_layernorm.weight",
        "transformer.embedding.norm.beta": "transformer.word_embeddings_layernorm.bias",
        "transformer.ln_f.gamma": "transformer.ln_f.weight",
        "transformer.ln_f.beta": "transformer.ln_f.bias",
    },
}
# Of layer 1: CKPT's name -> (canonical name, what the converter does with it).
PLAIN, TURNED = (lambda array: array), (lambda array: array.T)
LAYER = {
    "gpt2": {
        "layernorm1.gamma": ("ln_1.weight", PLAIN),
        "layernorm1.beta": ("ln_1.bias", PLAIN),
        "layernorm2.gamma": ("ln_2.weight", PLAIN),
        "layernorm2.beta": ("ln_2.bias", PLAIN),
        **{
            f"attention.dense{n + 1}.weight": ("attn.c_attn.weight", lambda a, n=n: np.split(a, 3, -1)[n].T)
            for n in range(3)
        },
        **{
            f"attention.dense{n + 1}.bias": ("attn.c_attn.bias", lambda a, n=n: np.split(a, 3, -1)[n]) for n in range(3)
        },
        "attention.projection.weight": ("attn.c_proj.weight", PLAIN),
        "attention.projection.bias": ("attn.c_proj.bias", PLAIN),
        "output.mapping.weight": ("mlp.c_fc.weight", PLAIN),
        "output.mapping.bias": ("mlp.c_fc.bias", PLAIN),
        "output.projection.weight": ("mlp.c_proj.weight", PLAIN),
        "output.projection.bias": ("mlp.c_proj.bias", PLAIN),
    },
    "bloom": {
        "layernorm1.gamma": ("input_layernorm.weight", PLAIN),
        "layernorm1.beta": ("input_layernorm.bias", PLAIN),
        "layernorm2.gamma": ("post_attention_layernorm.weight", PLAIN),
        "layernorm2.beta": ("post_attention_layernorm.bias", PLAIN),
        **{
            f"attention.dense{n + 1}.weight": (
                "self_attention.query_key_value.weight",
                lambda a, n=n: a.reshape(4, 3, 8, 32)[:, n].reshape(-1, 32),
            )
            for n in range(3)
        },
        **{
            f"attention.dense{n + 1}.bias": (
                "self_attention.query_key_value.bias",
                lambda a, n=n: a.reshape(4, 3, 8)[:, n].reshape(-1),
            )
            for n in range(3)
        },
        "attention.projection.weight": ("self_attention.dense.weight", TURNED),
        "attention.projection.bias": ("self_attention.dense.bias", PLAIN),
        "output.mapping.weight": ("mlp.dense_h_to_4h.weight", TURNED),
        "output.mapping.bias": ("mlp.dense_h_to_4h.bias", PLAIN),
        "output.projection.weight": ("mlp.dense_4h_to_h.weight", TURNED),
        "output.projection.bias": ("mlp.dense_4h_to_h.bias", PLAIN),
    },
}
BLOCKS = {"gpt2": "backbone.blocks.", "bloom": "transformer.blocks."}


def converted(name, folder):
    """A model of random values as a CKPT: its description, its tensors, and the CKPT's."""
    spec = spec_from_hf(CONFIGS[name])
    source = Perturbed(spec, 3)
    write_ckpt(source, spec, folder / "model.ckpt")
    stored = StoredTensors(read_index(folder / "model.ckpt").tensors)
    return spec, source, {tensor: stored.read(tensor) for tensor in stored.tensors}


def check(spec, source, found, expected, folder):
    """A CKPT has the tensors that are expected, and is read back as what it was made of."""
    assert found.keys() == expected.keys()
    for tensor, array in expected.items():
        np.testing.assert_array_equal(found[tensor], array, err_msg=tensor)
    opened = open_weights(folder / "model.ckpt")
    check_against(spec, opened)
    for tensor in source.tensors:
        np.testing.assert_array_equal(opened.read(tensor), source.read(tensor), err_msg=tensor)


@pytest.mark.parametrize("name", LAYER)
def test_each_tensor_is_what_mindformers_converter_makes_of_it(name, tmp_path):
    spec, source, found = converted(name, tmp_path)
    expected = {theirs: source.read(ours) for theirs, ours in AROUND[name].items()}
    for layer in range(2):
        for theirs, (ours, made) in LAYER[name].items():
            expected[f"{BLOCKS[name]}{layer}.{theirs}"] = made(source.read(f"transformer.h.{layer}.{ours}"))
    check(spec, source, found, expected, tmp_path)


def test_a_chatglm_has_its_files_names_but_for_the_embedding(tmp_path):
    spec, source, found = converted("chatglm", tmp_path)
    write_hf_folder(source, spec, tmp_path / "model", bar=False)
    files = open_names(tmp_path / "model")
    assert found.keys() - files == {"transformer.embedding.embedding_weight"}
    assert files - found.keys() == {"transformer.embedding.word_embeddings.weight"}
    joined = [source.read(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qkv"]
    name = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    np.testing.assert_array_equal(found[name], np.concatenate(joined))


def open_names(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors").keys()


def write(path, arrays):
    with open(path, "wb") as file:
        writer = CkptWriter(file)
        for name, array in arrays.items():
            writer.add(name, TensorInfo(array.shape, array.dtype.name), iter([array.reshape(-1).view(np.uint8)]))
        writer.close()


def test_an_old_embeddings_name_and_trainer_state_are_read(tmp_path):
    spec, source, found = converted("chatglm", tmp_path)
    found["transformer.embedding.embedding_table"] = found.pop("transformer.embedding.embedding_weight")
    found["adam_m.transformer.output_layer.weight"] = np.zeros((2, 2), np.float32)
    write(tmp_path / "old.ckpt", found)
    opened = open_weights(tmp_path / "old.ckpt", spec)
    check_against(spec, opened)
    for tensor in source.tensors:
        np.testing.assert_array_equal(opened.read(tensor), source.read(tensor), err_msg=tensor)


def test_what_is_missing_or_of_another_shape_is_named(tmp_path):
    spec, _, found = converted("bloom", tmp_path)
    found["transformer.blocks.0.attention.dense2.weight"] = np.zeros((31, 32), np.float32)
    del found["transformer.blocks.1.output.mapping.weight"]
    write(tmp_path / "bad.ckpt", found)
    with pytest.raises(InputError) as caught:
        check_against(spec, open_weights(tmp_path / "bad.ckpt", spec))
    said = "\n".join(caught.value.problems)
    assert "'transformer.h.0.self_attention.query_key_value.weight' [96, 32] is missing" in said
    assert "'transformer.h.1.mlp.dense_h_to_4h.weight' [128, 32] is missing" in said
    assert "unexpected tensor 'transformer.blocks.0.attention.dense2.weight' [31, 32]" in said
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_parts_of_another_dtype_are_refused(dtype, tmp_path):
    """They would be written into the first one's dtype without a word, quantised ones too."""
    spec, _, found = converted("bloom", tmp_path)
    name = "transformer.blocks.0.attention.dense2.weight"
    found[name] = found[name].astype(dtype)
    write(tmp_path / "bad.ckpt", found)
    with pytest.raises(
        InputError, match=rf"query_key_value.weight' must have one dtype: .*dense2.weight {dtype.__name__}"
    ):
        open_weights(tmp_path / "bad.ckpt", spec)


def test_three_axes_of_a_state_space_are_not_told_to_be_experts(tmp_path):
    spec = spec_from_hf(CONFIGS["mamba"])
    write_ckpt(RandomWeights(spec, 0), spec, tmp_path / "x.ckpt")
    stored = StoredTensors(read_index(tmp_path / "x.ckpt", True).tensors)
    found = {name: stored.read(name) for name in stored.tensors}
    name = "backbone.layers.0.mixer.conv1d.weight"
    found[name] = np.ascontiguousarray(found[name][..., :-1])
    write(tmp_path / "bad.ckpt", found)
    with pytest.raises(InputError, match=r"conv1d.weight' has shape \[64, 1, 3\], but the config says \[64, 1, 4\]"):
        check_against(spec, open_weights(tmp_path / "bad.ckpt", spec))


def test_random_weights_stand_for_hugging_face_files_of_the_same_names():
    """A file of Hugging Face's names is not taken for a CKPT of MindFormers'."""
    from msft.convert import laid_out

    for name in ("gpt2", "bloom", "chatglm"):
        spec = spec_from_hf(CONFIGS[name])
        assert not laid_out.is_meant(RandomWeights(spec, 0).tensors, spec)
    spec = spec_from_hf(CONFIGS["chatglm"])
    assert not laid_out.is_meant({"transformer.encoder.final_layernorm.weight": None}, spec)


# T5's converter, of a layer of each stack: CKPT's name -> canonical name; it transposes .o., .wi. and .wo.
T5_STACKS = {
    "encoder": {
        "layernorm1.gamma": "layer.0.layer_norm",
        "layernorm2.gamma": "layer.1.layer_norm",
        "output.mapping.weight": "layer.1.DenseReluDense.wi",
        "output.projection.weight": "layer.1.DenseReluDense.wo",
    },
    "decoder": {
        "layernorm1.gamma": "layer.0.layer_norm",
        "cross_attention_layernorm.gamma": "layer.1.layer_norm",
        "layernorm2.gamma": "layer.2.layer_norm",
        "cross_attention.dense1.weight": "layer.1.EncDecAttention.q",
        "cross_attention.dense2.weight": "layer.1.EncDecAttention.k",
        "cross_attention.dense3.weight": "layer.1.EncDecAttention.v",
        "cross_attention.projection.weight": "layer.1.EncDecAttention.o",
        "output.mapping.weight": "layer.2.DenseReluDense.wi",
        "output.projection.weight": "layer.2.DenseReluDense.wo",
    },
}
T5_BOTH = {f"attention.dense{n}.weight": f"layer.0.SelfAttention.{leaf}" for n, leaf in enumerate("qkv", 1)}
T5_BOTH["attention.projection.weight"] = "layer.0.SelfAttention.o"
T5_AROUND = {
    "t5_model.encoder_layernorm.gamma": "encoder.final_layer_norm.weight",
    "t5_model.decoder_layernorm.gamma": "decoder.final_layer_norm.weight",
    "t5_model.tfm_embedding_lookup.embedding_table": "shared.weight",
    **{
        f"t5_model.tfm_{stack}.blocks.0.attention.bias_generator.embeddings_table": (
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        )
        for stack in ("encoder", "decoder")
    },
}


def test_t5_is_what_mindformers_converter_makes_of_it(tmp_path):
    spec, source, found = converted("t5", tmp_path)
    expected = {theirs: source.read(ours) for theirs, ours in T5_AROUND.items()}
    for stack, own in T5_STACKS.items():
        for layer in range(2):
            for theirs, ours in {**T5_BOTH, **own}.items():
                array = source.read(f"{stack}.block.{layer}.{ours}.weight")
                is_turned = ours.endswith((".o", ".wi", ".wo"))
                expected[f"t5_model.tfm_{stack}.blocks.{layer}.{theirs}"] = array.T if is_turned else array
    check(spec, source, found, expected, tmp_path)


def test_a_t5_with_gates_keeps_its_names(tmp_path):
    """MindFormers has no such model."""
    _, source, found = converted("t5, gated, with a head", tmp_path)
    assert found.keys() == set(source.tensors)
