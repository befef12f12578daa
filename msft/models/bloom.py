"""BLOOM: ALiBi, LayerNorm, a norm behind the embedding, a tied head."""

from msft.models.ckpt_layout import NUMBER, split_layout
from msft.models.family import CkptTensor, Family, FileNames, MindFormersNames
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
# MindFormers 1.3.2, mindformers/models/bloom/convert_weight.py.
RENAMES = (
    (".word_embeddings.weight", ".embedding.word_embedding.embedding_table"),
    (".word_embeddings_layernorm.weight", ".embedding.norm.gamma"),
    (".word_embeddings_layernorm.bias", ".embedding.norm.beta"),
    (".ln_f.weight", ".ln_f.gamma"),
    (".ln_f.bias", ".ln_f.beta"),
    ("transformer.h.", "transformer.blocks."),
    (".input_layernorm.weight", ".layernorm1.gamma"),
    (".input_layernorm.bias", ".layernorm1.beta"),
    (".post_attention_layernorm.weight", ".layernorm2.gamma"),
    (".post_attention_layernorm.bias", ".layernorm2.beta"),
    (".self_attention.query_key_value.", f".attention.dense{NUMBER}."),
    (".self_attention.dense.", ".attention.projection."),
    (".mlp.dense_h_to_4h.", ".output.mapping."),
    (".mlp.dense_4h_to_h.", ".output.projection."),
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


def ckpt_layout(spec: ModelSpec) -> dict[str, CkptTensor]:
    """Return what MindFormers' tensors hold: queries, keys and values apart, other matrices [inputs, outputs]."""
    return split_layout(spec, RENAMES, MODULES[1:])


MINDFORMERS = MindFormersNames(layout=ckpt_layout)
FAMILY = Family(
    "bloom",
    "BloomForCausalLM",
    spec_from_hf,
    ("query_key_value",),
    MINDFORMERS,
    FileNames(prefixes=("transformer.",)),
    is_walked=True,
)
