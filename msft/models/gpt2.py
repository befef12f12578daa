"""GPT-2: LayerNorm, learned positions, and matrices that are stored as [inputs, outputs]."""

from msft.models.family import Family, FileNames, MindFormersNames
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
MINDFORMERS = MindFormersNames()


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


FAMILY = Family(
    "gpt2", "GPT2LMHeadModel", spec_from_hf, ("c_attn",), MINDFORMERS, FileNames(prefixes=("transformer.",))
)
