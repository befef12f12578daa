"""InternLM: Llama with biases on attention's four modules; transformers' Llama computes it."""

from msft.models import llama
from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read an InternLM `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where)
    values.refuse("rotary", {"base": 10000, "type": "origin"}, {"base": 10000, "type": "dynamic"})
    biased = llama.ATTENTION if values.flag("bias", True) else ()
    return values.spec("internlm", block=Block(biased=biased))


FAMILY = Family(
    "internlm",
    "InternLMForCausalLM",
    spec_from_hf,
    llama.LORA_TARGETS,
    llama.MINDFORMERS,
    native=llama.config_of,
    template="internlm-chat",
)
