"""GLM-4 of 2025 (GLM-4-0414): GLM with norms behind attention and feed-forward too."""

from dataclasses import replace

from msft.models import glm, llama
from msft.models.family import Family
from msft.models.spec import ModelSpec

BLOCK = replace(glm.BLOCK, merged_norm="post_self_attn_layernorm", contracted_norm="post_mlp_layernorm")


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a GLM-4 `config.json`; raises InputError naming every missing or impossible value."""
    return glm.spec_from_hf(config, where, "glm4", BLOCK)


FAMILY = Family("glm4", "Glm4ForCausalLM", spec_from_hf, llama.LORA_TARGETS, template="chatglm3")
