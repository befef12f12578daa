"""Falcon: attention and feed-forward in parallel, few key heads. Falcon-RW (ALiBi of its own kind) is not."""

from dataclasses import replace

from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec, Outside

KEYS = {
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "ffn_hidden_size",
    "norm_eps": "layer_norm_epsilon",
    "activation": "activation",
}
MODULES = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
OUTSIDE = Outside(embedding="transformer.word_embeddings", layers="transformer.h", norm="transformer.ln_f")


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Falcon `config.json`; raises InputError naming every missing or impossible value."""
    wide = {"intermediate_size": 4 * config["hidden_size"]} if type(config.get("hidden_size")) is int else {}
    values = HfConfig(config, where, KEYS, {"tie_word_embeddings": True, "norm_eps": 1e-5, **wide})
    values.refuse("alibi", False)
    is_new, is_parallel = values.flag("new_decoder_architecture"), values.flag("parallel_attn", True)
    if not is_new and values.flag("multi_query", True):
        values.defaults["num_key_value_heads"], values.config = 1, {**config, "num_kv_heads": 1}
    norms = {"attention_norm": "input_layernorm", "feed_norm": "post_attention_layernorm"}
    if is_new and values.get("num_ln_in_parallel_attn", 2) == 2:
        norms = {"attention_norm": "ln_attn", "feed_norm": "ln_mlp"}
    elif is_new or is_parallel:
        norms["feed_norm"] = "input_layernorm"
    block = Block(
        **norms,
        project=MODULES[:1],
        is_grouped=True,
        merge=MODULES[1],
        expand=MODULES[2:3],
        contract=MODULES[3],
        activation="gelu",
        is_gated=False,
        is_parallel=is_new or is_parallel,
        biased=MODULES if values.flag("bias") else (),
    )
    spec = values.spec("falcon", ("gelu",), block=block, outside=OUTSIDE, norm="layer")
    return replace(spec, hf_config=config)


FAMILY = Family(
    "falcon", "FalconForCausalLM", spec_from_hf, ("query_key_value", "dense"), is_walked=True, template="falcon"
)
