"""Phi-3 and Phi-4: Llama with queries, keys and values in one matrix, gate and up in another."""

from dataclasses import replace

from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec

DEFAULTS = {"norm_eps": 1e-5, "max_position_embeddings": 4096}


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Phi-3 `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, defaults=DEFAULTS)
    spec = values.spec("phi3", block=Block(project=("self_attn.qkv_proj",), expand=("mlp.gate_up_proj",)))
    windows = (values.get("sliding_window", 0),) * spec.num_hidden_layers
    return replace(spec, windows=windows, rotary_dim=values.partial_rotary(spec.head_dim, 1.0))


FAMILY = Family("phi3", "Phi3ForCausalLM", spec_from_hf, ("qkv_proj", "o_proj"))
