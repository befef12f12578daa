"""Baichuan and Baichuan2: Llama with one matrix for queries, keys and values; 13B has ALiBi in place of rotation.

A config without `max_position_embeddings` (it says `model_max_length`) is that of a model with ALiBi. Baichuan2, told
by its vocabulary of 125696, divides each row of its head by the row's length.
"""

from dataclasses import replace

from msft.models import llama
from msft.models.family import Family, FileNames
from msft.models.hf_config import HfConfig
from msft.models.spec import ModelSpec

NORMED_HEAD_VOCABULARY = 125696
FILES = FileNames(fused={"self_attn.W_pack": llama.ATTENTION[:3]})


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Baichuan `config.json`; raises InputError naming every missing or impossible value."""
    has_alibi = config.get("max_position_embeddings") is None
    keys = {"max_position_embeddings": "model_max_length"} if has_alibi else {}
    spec = HfConfig(config, where, keys).spec("baichuan")
    spec = replace(spec, is_head_normed=spec.vocab_size == NORMED_HEAD_VOCABULARY)
    return replace(spec, has_alibi=True, rotary_dim=0) if has_alibi else spec


FAMILY = Family(
    "baichuan",
    "BaichuanForCausalLM",
    spec_from_hf,
    llama.LORA_TARGETS,
    llama.MINDFORMERS,
    FILES,
    llama.config_of,
    template="baichuan2-chat",
)
