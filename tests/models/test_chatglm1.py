"""Protects ChatGLM-6B's description: told from later generations by its keys, its names in files, what is refused."""

import numpy as np
import pytest

from msft.config.layout import layout
from msft.config.load import load_recipe
from msft.convert.open import open_weights
from msft.convert.random_weights import RandomWeights
from msft.convert.weights import write_ckpt
from msft.errors import InputError
from msft.models.families import FAMILIES, name_of, named, spec_from_hf
from msft.models.sizes import config_of, published
from tests.conformance.families import CONFIGS

CONFIG = CONFIGS["chatglm1"]


def test_the_keys_of_a_chatglm_tell_its_generation():
    first, later = (
        config_of("chatglm1", published("chatglm1", "6b")),
        config_of("chatglm", published("chatglm", "2-6b")),
    )
    assert first["model_type"] == later["model_type"] == "chatglm"
    assert (spec_from_hf(first).family, spec_from_hf(later).family) == ("chatglm1", "chatglm")
    assert (name_of(first), name_of(later), name_of({"model_type": "new"}), name_of({})) == (
        "chatglm1",
        "chatglm",
        None,
        None,
    )
    assert named("chatglm-6b") is FAMILIES["chatglm1"] and named("chatglm2") is FAMILIES["chatglm"]


def test_its_numbers_are_the_releases():
    spec = spec_from_hf(config_of("chatglm1", published("chatglm1", "6b")))
    assert spec.block.residual == pytest.approx(56**0.5) and spec.attention_scale == pytest.approx(128**-0.5)
    assert (spec.rotary_dim, spec.head_dim, spec.num_key_value_heads) == (64, 128, 32)
    assert (spec.prefix.begin, spec.prefix.masks) == (130004, (130001, 130000))
    assert spec.tie_word_embeddings and not spec.is_like_llama


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_encoding_2d": False}, "'position_encoding_2d' is False; only True is supported"),
        ({"pre_seq_len": 128}, "'pre_seq_len' is 128; only 0 is supported"),
        ({"quantization_bit": 4}, "'quantization_bit' is 4; only 0 is supported"),
        ({"gmask_token_id": None}, "'gmask_token_id' must be a token's number, not None"),
        ({"num_layers": 0}, "'num_layers' must be a whole number above 0, not 0"),
        ({"num_attention_heads": 16}, "the halves of a head of 2 features cannot be turned in pairs"),
    ],
)
def test_what_is_not_built_is_refused_with_its_key(change, message):
    with pytest.raises(InputError, match=message):
        spec_from_hf(CONFIG | change)


def test_a_ckpt_has_mindformers_names_and_the_head_a_second_time(tmp_path):
    """As mindformers/models/glm/convert_weight.py names them; its head is a parameter of its own."""
    spec = spec_from_hf(CONFIG)
    source = RandomWeights(spec, 3)
    write_ckpt(source, spec, tmp_path / "model.ckpt")
    from msft.convert.ckpt import read_index

    names = read_index(tmp_path / "model.ckpt").tensors.keys()
    layer = "transformer.layers.1."
    assert {name for name in names if name.startswith(layer)} == {
        f"{layer}{name}"
        for name in (
            "input_layernorm.gamma",
            "input_layernorm.beta",
            "post_attention_layernorm.gamma",
            "post_attention_layernorm.beta",
            "attention.query_key_value.weight",
            "attention.query_key_value.bias",
            "attention.dense.weight",
            "attention.dense.bias",
            "mlp.dense_h_to_4h.weight",
            "mlp.dense_h_to_4h.bias",
            "mlp.dense_4h_to_h.weight",
            "mlp.dense_4h_to_h.bias",
        )
    }
    around = {"transformer.word_embeddings.embedding_table", "lm_head.weight"}
    around |= {"transformer.final_layernorm.gamma", "transformer.final_layernorm.beta"}
    assert {name for name in names if ".layers." not in name} == around
    opened = open_weights(tmp_path / "model.ckpt", spec)
    np.testing.assert_array_equal(opened.read("lm_head.weight"), source.read("transformer.word_embeddings.weight"))


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_layers_that_transformers_has_not_are_not_shared_out(tmp_path, strategy):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"backend: torch\nstrategy: {strategy}\nuse_parallel: true\nmodel: {{pretrained: x}}\n")
    message = f"recipe.yaml:2: strategy: {strategy}: transformers has no class for chatglm1, .*; ddp works"
    with pytest.raises(InputError, match=message):
        layout(load_recipe(recipe), spec_from_hf(CONFIG), 2)


def test_several_processes_share_its_batches_alone(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("use_parallel: true\nparallel_config: {model_parallel: 2}\nmodel: {pretrained: x}\n")
    with pytest.raises(
        InputError,
        match="2: the layers of chatglm1 are not dealt to several processes yet; data_parallel 2, model_parallel 1",
    ):
        layout(load_recipe(recipe), spec_from_hf(CONFIG), 2)
