"""InternLM2 and 2.5: Llama under other names, queries, keys and values in one matrix by key head."""

from msft.models import llama
from msft.models.family import Family, FileNames
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec

FILES = FileNames(
    renames=(
        ("model.embed_tokens.", "model.tok_embeddings."),
        (".self_attn.o_proj.", ".attention.wo."),
        (".mlp.gate_proj.", ".feed_forward.w1."),
        (".mlp.up_proj.", ".feed_forward.w3."),
        (".mlp.down_proj.", ".feed_forward.w2."),
        (".input_layernorm.", ".attention_norm."),
        (".post_attention_layernorm.", ".ffn_norm."),
        ("lm_head.", "output."),
    ),
    fused={"attention.wqkv": llama.ATTENTION[:3]},
    is_grouped=True,
)


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read an InternLM2 `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where)
    biased = llama.ATTENTION if values.flag("bias", False) else ()
    return values.spec("internlm2", block=Block(biased=biased))


FAMILY = Family(
    "internlm2",
    "InternLM2ForCausalLM",
    spec_from_hf,
    llama.LORA_TARGETS,
    llama.MINDFORMERS,
    files=FILES,
    native=llama.config_of,
    template="Yi-34b-chat",
)
