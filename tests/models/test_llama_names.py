"""The Llama family's names, shapes and config against transformers' model and MindFormers' documented values."""

import pytest

from msft.errors import InputError
from msft.models import llama
from msft.models.adapters import mindformers_to_peft, peft_names, peft_to_mindformers
from msft.models.families import family, spec_from_hf
from msft.models.shapes import linear_modules, tensor_shapes

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 11,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"num_key_value_heads": 4},
    ],
)
def test_shapes_equal_transformers(change):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**CONFIG, "num_hidden_layers": 2, **change}
    model = LlamaForCausalLM(LlamaConfig(**config))
    spec = spec_from_hf(config)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dict(sorted(tensor_shapes(spec).items())) == dict(sorted(theirs.items()))


def test_names_go_to_mindformers_and_back():
    spec = spec_from_hf({**CONFIG, "attention_bias": True})
    names = list(tensor_shapes(spec))
    theirs = [llama.MINDFORMERS.write(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [llama.MINDFORMERS.read(name) for name in theirs] == names
    assert theirs[0] == "model.tok_embeddings.embedding_weight"
    table = dict(zip(names, theirs, strict=True))
    for ours, expected in {
        "model.layers.10.self_attn.q_proj.weight": "model.layers.10.attention.wq.weight",
        "model.layers.0.self_attn.k_proj.bias": "model.layers.0.attention.wk.bias",
        "model.layers.0.self_attn.v_proj.weight": "model.layers.0.attention.wv.weight",
        "model.layers.0.self_attn.o_proj.weight": "model.layers.0.attention.wo.weight",
        "model.layers.0.mlp.gate_proj.weight": "model.layers.0.feed_forward.w1.weight",
        "model.layers.0.mlp.down_proj.weight": "model.layers.0.feed_forward.w2.weight",
        "model.layers.0.mlp.up_proj.weight": "model.layers.0.feed_forward.w3.weight",
        "model.layers.0.input_layernorm.weight": "model.layers.0.attention_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "model.layers.0.ffn_norm.weight",
        "model.norm.weight": "model.norm_out.weight",
        "lm_head.weight": "lm_head.weight",
    }.items():
        assert table[ours] == expected


def test_adapter_names_go_to_mindformers_and_back():
    spec = spec_from_hf(CONFIG)
    for module in linear_modules(spec):
        for name in peft_names(module):
            assert mindformers_to_peft(peft_to_mindformers(name, llama.FAMILY), llama.FAMILY) == name
    assert peft_names("model.layers.3.mlp.up_proj")[0] == "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"
    assert (
        peft_to_mindformers("base_model.model.model.layers.3.mlp.up_proj.lora_B.weight", llama.FAMILY)
        == "model.layers.3.feed_forward.w3.mindpet_delta_lora_b"
    )


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"hidden_size": 4096, "multiple_of": 256}, 11008),  # Llama 2 7B
        ({"hidden_size": 5120, "multiple_of": 256, "num_heads": 40}, 13824),  # 13B
        (
            {"hidden_size": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "num_heads": 64, "n_kv_heads": 8},
            28672,
        ),
        ({"hidden_size": 64, "multiple_of": 16, "num_heads": 4}, 176),
        ({"hidden_size": 64, "intermediate_size": 100, "num_heads": 4}, 100),
    ],
)
def test_mindformers_feed_forward_sizes(block, expected):
    config = llama.hf_config_from_mindformers(block)
    assert config["intermediate_size"] == expected
    assert spec_from_hf(config).intermediate_size == expected


def test_mindformers_llama_with_biases_on_queries_keys_and_values_is_a_qwen2():
    block = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 100, "num_layers": 1, "theta": 1e6}
    spec = spec_from_hf(llama.hf_config_from_mindformers({**block, "qkv_has_bias": True}))
    plain = spec_from_hf(llama.hf_config_from_mindformers({**block, "qkv_has_bias": False}))
    assert (spec.family, plain.family) == ("qwen2", "llama") and not plain.block.biased
    biases = [name for name in tensor_shapes(spec) if name.endswith(".bias")]
    written = [family("qwen2").mindformers.write(name) for name in biases]
    assert written == [f"model.layers.0.attention.{cell}.bias" for cell in ("wq", "wk", "wv")]


def test_every_impossible_size_is_named_at_once():
    with pytest.raises(InputError) as error:
        spec_from_hf({"model_type": "llama", "vocab_size": 0, "hidden_size": "64"}, "here.json")
    text = str(error.value)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert f"here.json: '{key}'" in text


@pytest.mark.parametrize(
    ("change", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            5e5,
            {"rope_type": "llama3", "factor": 8.0},
        ),
    ],
)
def test_rope_of_transformers_4_and_5(change, theta, scaling):
    spec = spec_from_hf({**CONFIG, **change})
    assert (spec.rope_theta, spec.rope_scaling) == (theta, scaling)


def test_unknown_families_are_named():
    with pytest.raises(InputError, match="unknown model family 'lama', did you mean 'llama'"):
        spec_from_hf({"model_type": "lama"})
    with pytest.raises(InputError, match="'model_type' is missing"):
        spec_from_hf({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; only 'silu' is supported"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000, more than 10000"),
        ({"num_key_value_heads": "2"}, "'num_key_value_heads' must be a whole number above 0, not '2'"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is no multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' must be a number, not 'small'"),
        ({"rope_scaling": "linear"}, "'rope_scaling' must be an object, not 'linear'"),
        ({"rms_norm_eps": 10**400}, "'rms_norm_eps' must be a number, not 1000"),
        ({"rope_theta": float("nan")}, "'rope_theta' must be a number, not nan"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' must be true or false, not 'false'"),
        ({"eos_token_id": [2, "x"]}, r"'eos_token_id' must be a token's number, not \[2, 'x'\]"),
        ({"pad_token_id": {}}, "'pad_token_id' must be a token's number, not {}"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"'rope_scaling': 'rope_type' must be text, not \['linear'\]"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "'rope_parameters': 'rope_theta' must be a number"),
    ],
)
def test_configs_that_would_give_another_model_are_refused(change, message):
    with pytest.raises(InputError, match=f"here.json: {message}"):
        spec_from_hf({**CONFIG, **change}, "here.json")


def test_nulls_count_as_absent():
    spec = spec_from_hf({**CONFIG, "rms_norm_eps": None, "initializer_range": None, "max_position_embeddings": None})
    assert (spec.norm_eps, spec.initializer_range, spec.max_position_embeddings) == (1e-6, 0.02, 2048)
