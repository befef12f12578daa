"""Phi-3 and Phi-4: Llama with queries, keys and values in one matrix, gate and up in another."""

from dataclasses import replace

from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec

# What releases have called longrope.
OLD_NAMES = ("longrope", "su", "yarn")
DEFAULTS = {"norm_eps": 1e-5, "max_position_embeddings": 4096}


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Phi-3 `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, defaults=DEFAULTS)
    spec = values.spec("phi3", block=Block(project=("self_attn.qkv_proj",), expand=("mlp.gate_up_proj",)))
    windows = (values.get("sliding_window", 0),) * spec.num_hidden_layers
    rotary_dim, scaling = values.partial_rotary(spec.head_dim, 1.0), _long(values, spec.rope_scaling)
    return replace(spec, windows=windows, rotary_dim=rotary_dim, rope_scaling=scaling)


def _long(values: HfConfig, scaling: dict | None) -> dict | None:
    """Rope parameters with the length that the model was trained for, which the file says beside them."""
    if scaling is None or scaling["rope_type"] not in OLD_NAMES:
        return scaling
    original = values.get("original_max_position_embeddings", DEFAULTS["max_position_embeddings"])
    return {**scaling, "rope_type": "longrope", "original_max_position_embeddings": original}


FAMILY = Family("phi3", "Phi3ForCausalLM", spec_from_hf, ("qkv_proj", "o_proj"))
