"""GLM-4 9B in transformers' form: biases on queries, keys and values, half of each head turned in neighbouring pairs.

Format: transformers' GlmConfig. Releases with their own code (`model_type` chatglm) are read by `chatglm.py`.
"""

from dataclasses import replace

from msft.models import llama
from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec

DEFAULTS = {"norm_eps": 1.5625e-07, "head_dim": 128, "num_key_value_heads": 2, "max_position_embeddings": 131072}
BLOCK = Block(expand=("mlp.gate_up_proj",))


def spec_from_hf(config: dict, where: str = "config.json", family: str = "glm", block: Block = BLOCK) -> ModelSpec:
    """Read a GLM `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, defaults=DEFAULTS)
    return described(values, family, block, llama.ATTENTION[:3] if values.flag("attention_bias", True) else ())


def described(values: HfConfig, family: str, block: Block, biased: tuple[str, ...], **more) -> ModelSpec:
    """Return the ModelSpec of a family that turns heads as GLM does."""
    spec = values.spec(family, block=replace(block, biased=biased), neighbours=True, **more)
    return replace(spec, rotary_dim=values.partial_rotary(spec.head_dim, 0.5))


FAMILY = Family("glm", "GlmForCausalLM", spec_from_hf, llama.LORA_TARGETS, template="chatglm3")
