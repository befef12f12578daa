"""ChatGLM-6B, the first generation: a context read in both directions, two positions, DeepNorm's residuals.

Its config.json has ChatGLM2's `model_type`; the keys tell which one it is.
"""

from dataclasses import replace

from msft.errors import InputError
from msft.models.family import Family, MindFormersNames
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec, Outside, Prefix

MODULES = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
OUTSIDE = Outside("transformer.word_embeddings", "", 0, "", "transformer.layers", "transformer.final_layernorm")
KEYS = {
    "intermediate_size": "inner_hidden_size",
    "num_hidden_layers": "num_layers",
    "max_position_embeddings": "max_sequence_length",
    "norm_eps": "layernorm_epsilon",
}
# The release says nothing of its head, which transformers then tied; 6,173,286,400 parameters count it so.
DEFAULTS = {"norm_eps": 1e-5, "tie_word_embeddings": True}
# The names of norms alone change: a bias there is a `beta`.
NORMS = ("input_layernorm", "post_attention_layernorm", "final_layernorm")
LEAVES = (("weight", "gamma"), ("bias", "beta"))
MINDFORMERS = MindFormersNames(
    renames=(
        ("word_embeddings.weight", "word_embeddings.embedding_table"),
        *((f"{norm}.{ours}", f"{norm}.{theirs}") for norm in NORMS for ours, theirs in LEAVES),
    ),
    leaves={name: name for name in ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")},
    repeats_head=True,
)


def is_meant(config: dict) -> bool:
    """Whether the config.json of a ChatGLM is the first generation's."""
    return "position_encoding_2d" in config or "inner_hidden_size" in config


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read ChatGLM-6B's `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, KEYS, DEFAULTS)
    values.refuse("position_encoding_2d", True)
    values.refuse("pre_seq_len", 0)
    values.refuse("quantization_bit", 0)
    begin, *masks = (_token(values, name) for name in ("bos_token_id", "gmask_token_id", "mask_token_id"))
    layers = values.get("num_hidden_layers")
    block = Block(
        project=MODULES[:1],
        is_grouped=True,
        merge=MODULES[1],
        expand=MODULES[2:3],
        contract=MODULES[3],
        activation="gelu_tanh",
        is_gated=False,
        residual=(2 * layers) ** 0.5 if type(layers) is int and layers > 0 else 0.0,
        biased=MODULES,
    )
    fields = {"block": block, "outside": OUTSIDE, "norm": "layer", "prefix": Prefix(begin, tuple(masks))}
    spec = values.spec("chatglm1", **fields, rope_scaling={"rope_type": "half_precision"})
    if spec.head_dim % 4:
        raise InputError(f"{where}: the halves of a head of {spec.head_dim} features cannot be turned in pairs")
    return replace(spec, rotary_dim=spec.head_dim // 2)


def _token(values: HfConfig, name: str) -> int:
    found = values.get(name)
    if type(found) is not int or not 0 <= found < 2**31:
        raise InputError(f"{values.where}: '{name}' must be a token's number, not {found!r:.80}")
    return found


FAMILY = Family(
    "chatglm1",
    "ChatGLMModel",
    spec_from_hf,
    ("query_key_value",),
    mindformers=MINDFORMERS,
    is_ported=True,
    template="chatglm",
)
