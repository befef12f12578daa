"""GPT-2: LayerNorm, learned positions, and matrices that are stored as [inputs, outputs]."""

from msft.models.ckpt_layout import NUMBER, split_layout
from msft.models.family import CkptTensor, Family, FileNames, MindFormersNames
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec, Outside

KEYS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "activation": "activation_function",
}
MODULES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
BLOCK = Block(
    attention_norm="ln_1",
    project=MODULES[:1],
    merge=MODULES[1],
    feed_norm="ln_2",
    expand=MODULES[2:3],
    contract=MODULES[3],
    activation="gelu_tanh",
    is_gated=False,
    is_transposed=True,
    biased=MODULES,
)
OUTSIDE = Outside("transformer.wte", "transformer.wpe", 0, "", "transformer.h", "transformer.ln_f", "lm_head")
# MindFormers 1.3.2, mindformers/models/gpt2/convert_weight.py.
RENAMES = (
    ("transformer.wte.weight", "backbone.embedding.word_embedding.embedding_table"),
    ("transformer.wpe.weight", "backbone.embedding.position_embedding.embedding_table"),
    ("transformer.ln_f.weight", "backbone.layernorm.gamma"),
    ("transformer.ln_f.bias", "backbone.layernorm.beta"),
    ("transformer.h.", "backbone.blocks."),
    (".ln_1.weight", ".layernorm1.gamma"),
    (".ln_1.bias", ".layernorm1.beta"),
    (".ln_2.weight", ".layernorm2.gamma"),
    (".ln_2.bias", ".layernorm2.beta"),
    (".attn.c_attn.", f".attention.dense{NUMBER}."),
    (".attn.c_proj.", ".attention.projection."),
    (".mlp.c_fc.", ".output.mapping."),
    (".mlp.c_proj.", ".output.projection."),
)


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a GPT-2 `config.json`; raises InputError naming every missing or impossible value."""
    wide = {"intermediate_size": 4 * config["n_embd"]} if type(config.get("n_embd")) is int else {}
    defaults = {"tie_word_embeddings": True, "norm_eps": 1e-5, "max_position_embeddings": 1024, **wide}
    values = HfConfig(config, where, KEYS, defaults)
    values.refuse("scale_attn_weights", True)
    values.refuse("scale_attn_by_inverse_layer_idx", False)
    values.refuse("add_cross_attention", False)
    return values.spec(
        "gpt2", ("gelu_new", "gelu_pytorch_tanh"), block=BLOCK, outside=OUTSIDE, norm="layer", rotary_dim=0
    )


def ckpt_layout(spec: ModelSpec) -> dict[str, CkptTensor]:
    """Return what MindFormers' tensors hold: queries, keys and values apart, [outputs, inputs]; others as they are."""
    return split_layout(spec, RENAMES, MODULES[:1])


MINDFORMERS = MindFormersNames(layout=ckpt_layout)
FAMILY = Family(
    "gpt2", "GPT2LMHeadModel", spec_from_hf, ("c_attn",), MINDFORMERS, FileNames(prefixes=("transformer.",))
)
