"""Mistral: Llama with attention to the last tokens alone (`sliding_window`)."""

from dataclasses import replace

from msft.models import llama
from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import ModelSpec


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Mistral `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where)
    spec = values.spec("mistral")
    return replace(spec, windows=(values.get("sliding_window", 0),) * spec.num_hidden_layers)


FAMILY = Family(
    "mistral", "MistralForCausalLM", spec_from_hf, llama.LORA_TARGETS, llama.MINDFORMERS, template="mistral"
)
