"""OPT: LayerNorm, learned positions from the third row on, ReLU. 350M (norms behind, another width outside) is not."""

from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec, Outside

KEYS = {"intermediate_size": "ffn_dim", "activation": "activation_function", "initializer_range": "init_std"}
PROJECT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MODULES = (*PROJECT, "self_attn.out_proj", "fc1", "fc2")
OUTSIDE = Outside(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    first_position=2,
    layers="model.decoder.layers",
    norm="model.decoder.final_layer_norm",
)


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read an OPT `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, KEYS, {"tie_word_embeddings": True})
    values.refuse("do_layer_norm_before", True)
    values.refuse("_remove_final_layer_norm", False)
    values.refuse("layer_norm_elementwise_affine", True)
    values.refuse("word_embed_proj_dim", config.get("hidden_size"))
    block = Block(
        attention_norm="self_attn_layer_norm",
        project=PROJECT,
        merge="self_attn.out_proj",
        feed_norm="final_layer_norm",
        expand=("fc1",),
        contract="fc2",
        activation="relu",
        is_gated=False,
        biased=MODULES if values.flag("enable_bias", True) else (),
    )
    fields = {"block": block, "outside": OUTSIDE, "norm": "layer", "norm_eps": 1e-5, "rotary_dim": 0}
    return values.spec("opt", ("relu",), **fields)


FAMILY = Family("opt", "OPTForCausalLM", spec_from_hf, ("q_proj", "v_proj"))
