"""InternLM3: Llama with heads of their own size, and biases as its config says."""

from msft.models import llama
from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read an InternLM3 `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where)
    others = (llama.ATTENTION[3], *llama.FEED_FORWARD)
    biased = llama.ATTENTION[:3] * values.flag("qkv_bias") + others * values.flag("bias")
    return values.spec("internlm3", block=Block(biased=biased))


FAMILY = Family(
    "internlm3",
    "InternLM3ForCausalLM",
    spec_from_hf,
    llama.LORA_TARGETS,
    native=llama.config_of,
    template="Yi-34b-chat",
)
