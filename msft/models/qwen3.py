"""Qwen3: Llama whose heads of queries and keys are normed before they are turned."""

from dataclasses import replace

from msft.models import llama, qwen2
from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Qwen3 `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, defaults={"head_dim": 128})
    biased = llama.ATTENTION if values.flag("attention_bias") else ()
    spec = values.spec("qwen3", block=Block(head_norms=HEAD_NORMS, biased=biased))
    return replace(spec, windows=qwen2.windows(values))


FAMILY = Family("qwen3", "Qwen3ForCausalLM", spec_from_hf, llama.LORA_TARGETS, template="qwen-7b-chat")
