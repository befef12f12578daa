"""BLOOM: ALiBi, LayerNorm, a norm behind the embedding, a tied head."""

from msft.models.family import Family, FileNames
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec, Outside

MODULES = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
BLOCK = Block(
    project=MODULES[:1],
    is_grouped=True,
    merge=MODULES[1],
    expand=MODULES[2:3],
    contract=MODULES[3],
    activation="gelu_tanh",
    is_gated=False,
    biased=MODULES,
)
OUTSIDE = Outside(
    embedding="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    layers="transformer.h",
    norm="transformer.ln_f",
)


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a BLOOM `config.json`; raises InputError naming every missing or impossible value."""
    width = "hidden_size" if "hidden_size" in config else "n_embed"
    keys = {
        "hidden_size": width,
        "num_hidden_layers": "num_hidden_layers" if "num_hidden_layers" in config else "n_layer",
        "num_attention_heads": "num_attention_heads" if "num_attention_heads" in config else "n_head",
        "norm_eps": "layer_norm_epsilon",
    }
    wide = {"intermediate_size": 4 * config[width]} if type(config.get(width)) is int else {}
    values = HfConfig(config, where, keys, {"tie_word_embeddings": True, "norm_eps": 1e-5, **wide})
    values.refuse("apply_residual_connection_post_layernorm", False)
    fields = {"block": BLOCK, "outside": OUTSIDE, "norm": "layer", "rotary_dim": 0, "has_alibi": True}
    return values.spec("bloom", **fields)


FAMILY = Family(
    "bloom",
    "BloomForCausalLM",
    spec_from_hf,
    ("query_key_value",),
    files=FileNames(prefixes=("transformer.",)),
    is_walked=True,
)
