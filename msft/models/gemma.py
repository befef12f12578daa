"""Gemma: Llama with norms of 1 + weight, embeddings times the root of their size, GeGLU and a tied head."""

from msft.models import llama
from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec

DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256}
# 'gelu' is what the first releases say and did not mean, as transformers knows too.
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Gemma `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, defaults=DEFAULTS)
    biased = llama.ATTENTION if values.flag("attention_bias") else ()
    block = Block(activation="gelu_tanh", biased=biased)
    scale = values.number("hidden_size", 0) ** 0.5
    return values.spec("gemma", ACTIVATIONS, block=block, norm_offset=1.0, embedding_scale=scale)


FAMILY = Family("gemma", "GemmaForCausalLM", spec_from_hf, llama.LORA_TARGETS)
