"""GPT-NeoX (Pythia, RedPajama ...): attention and feed-forward in parallel, a part of each head turned."""

from dataclasses import replace

from msft.models.family import Family, FileNames
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec, Outside

KEYS = {"norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base"}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
ATTENTION = ("attention.query_key_value", "attention.dense")
FEED_FORWARD = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
# transformers has renamed the head; files keep its old name.
FILES = FileNames(renames=(("lm_head.", "embed_out."),))
OUTSIDE = Outside("gpt_neox.embed_in", "", 0, "", "gpt_neox.layers", "gpt_neox.final_layer_norm", "lm_head")


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a GPT-NeoX `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, KEYS, {"norm_eps": 1e-5})
    biased = ATTENTION if values.flag("attention_bias", True) else ()
    block = Block(
        project=ATTENTION[:1],
        is_grouped=True,
        merge=ATTENTION[1],
        expand=FEED_FORWARD[:1],
        contract=FEED_FORWARD[1],
        activation=ACTIVATIONS.get(values.get("activation", "gelu"), "gelu"),
        is_gated=False,
        is_parallel=values.flag("use_parallel_residual", True),
        biased=(*biased, *FEED_FORWARD),
    )
    spec = values.spec("gpt_neox", tuple(ACTIVATIONS), block=block, outside=OUTSIDE, norm="layer")
    return replace(spec, rotary_dim=values.partial_rotary(spec.head_dim, values.number("rotary_pct", 0.25)))


FAMILY = Family("gpt_neox", "GPTNeoXForCausalLM", spec_from_hf, ("query_key_value", "dense"), files=FILES)
