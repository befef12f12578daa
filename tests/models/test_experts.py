"""Protects what configs say of experts: which layers have some, and values that cannot be."""

import pytest

from msft.errors import InputError
from msft.models.experts import sparse_layers
from msft.models.families import spec_from_hf
from msft.models.shapes import linear_modules, tensor_shapes
from msft.models.targets import lora_modules
from tests.conformance.families import CONFIGS


def test_the_layers_with_experts_are_transformers():
    """Each `decoder_sparse_step`-th layer, counted from 1, but those in `mlp_only_layers`."""
    assert sparse_layers(6, 1, []) == (0, 1, 2, 3, 4, 5)
    assert sparse_layers(6, 2, [3]) == (1, 5)
    spec = spec_from_hf({**CONFIGS["qwen3_moe"], "num_hidden_layers": 4, "decoder_sparse_step": 2})
    assert spec.experts.layers == (1, 3) and not spec.is_like_llama
    shapes = tensor_shapes(spec)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (48, 32)
    assert shapes["model.layers.1.mlp.experts.gate_up_proj"] == (6, 2 * 24, 32)
    assert shapes["model.layers.1.mlp.gate.weight"] == (6, 32)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok (6) is more than num_local_experts (5)"),
        ("mixtral", {"router_jitter_noise": 0.1}, "'router_jitter_noise' is 0.1; only 0 is supported"),
        ("qwen2_moe", {"num_experts": 0}, "'num_experts' must be a whole number above 0, not 0"),
        ("qwen2_moe", {"mlp_only_layers": ["0"]}, "'mlp_only_layers' must be a list of layers' numbers, not ['0']"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "'decoder_sparse_step' must be a whole number above 0, not 0"),
        ("qwen3_moe", {"num_hidden_layers": 2**39}, "'num_hidden_layers' is 549755813888, more than 10000"),
    ],
)
def test_impossible_values_are_named(name, changes, message):
    with pytest.raises(InputError) as raised:
        spec_from_hf({**CONFIGS[name], **changes})
    assert message in str(raised.value)


def test_adapters_stand_on_attention_and_where_named_on_the_shared_expert():
    spec = spec_from_hf(CONFIGS["qwen2_moe"])
    assert {module.rpartition(".")[2] for module in lora_modules(None, spec)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    named = lora_modules(".*shared_expert.*", spec)
    assert named == tuple(module for module in linear_modules(spec) if "shared_expert" in module) and len(named) == 4


def test_what_peft_reads_as_experts_takes_no_adapter():
    spec = spec_from_hf({**CONFIGS["qwen3_moe"], "mlp_only_layers": [0]})
    with pytest.raises(InputError, match="chooses model.layers.0.mlp.up_proj, whose adapter peft reads as one of exp"):
        lora_modules(["up_proj"], spec)
