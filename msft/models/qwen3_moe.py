"""Qwen3-MoE: Qwen3 whose feed-forwards are routed experts."""

from dataclasses import replace

from msft.models import llama, qwen2_moe, qwen3
from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec

DEFAULTS = {"count": 128, "chosen": 8, "width": 768}


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Qwen3-MoE `config.json`; raises InputError naming every missing or impossible value."""
    # transformers 5 writes what releases call num_experts under Mixtral's name.
    count = "num_local_experts" if "num_local_experts" in config else "num_experts"
    values = HfConfig(config, where, {**qwen2_moe.KEYS, "count": count}, DEFAULTS)
    biased = llama.ATTENTION if values.flag("attention_bias") else ()
    spec = values.spec("qwen3_moe", block=Block(head_norms=qwen3.HEAD_NORMS, biased=biased))
    experts = qwen2_moe.experts_of(values)
    window = values.get("sliding_window", 4096) if values.flag("use_sliding_window") else 0
    return replace(spec, windows=(window,) * spec.num_hidden_layers, experts=experts)


FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    spec_from_hf,
    llama.LORA_TARGETS,
    files=qwen2_moe.FILES,
    template="qwen-7b-chat",
)
