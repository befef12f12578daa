"""The Llama family (Llama 1 to 3, SmolLM2, TinyLlama, Vicuna, Yi ...): config and MindFormers' names.

Format: transformers' LlamaConfig and LlamaForCausalLM; MindFormers 1.3.2's LlamaConfig and checkpoint names.
"""

from msft.models.family import Family, MindFormersNames
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

# Those of all families that MindFormers builds as it builds Llama.
MINDFORMERS = MindFormersNames(
    renames=(
        ("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight"),
        (".self_attn.q_proj.", ".attention.wq."),
        (".self_attn.k_proj.", ".attention.wk."),
        (".self_attn.v_proj.", ".attention.wv."),
        (".self_attn.o_proj.", ".attention.wo."),
        (".mlp.gate_proj.", ".feed_forward.w1."),
        (".mlp.down_proj.", ".feed_forward.w2."),
        (".mlp.up_proj.", ".feed_forward.w3."),
        (".input_layernorm.", ".attention_norm."),
        (".post_attention_layernorm.", ".ffn_norm."),
        ("model.norm.", "model.norm_out."),
    ),
    leaves={
        "q_proj": "wq",
        "k_proj": "wk",
        "v_proj": "wv",
        "o_proj": "wo",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
    },
    concatenated={
        "attention.w_qkv": ATTENTION[:3],
        "feed_forward.w_gate_hidden": FEED_FORWARD[:2],
    },
)


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Llama `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where)
    biased = (ATTENTION if values.flag("attention_bias") else ()) + (FEED_FORWARD if values.flag("mlp_bias") else ())
    return values.spec("llama", block=Block(biased=biased))


FAMILY = Family("llama", "LlamaForCausalLM", spec_from_hf, LORA_TARGETS, MINDFORMERS)


def config_of(spec: ModelSpec) -> dict:
    """Return the config.json of the Llama that computes what a family like it does; biases are put in beside it."""
    scaling = {"rope_type": "default", **(spec.rope_scaling or {}), "rope_theta": spec.rope_theta}
    return {
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": scaling,
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def hf_config_from_mindformers(model_config: dict) -> dict:
    """Return the `config.json` that MindFormers' `model_config` block (LlamaConfig) describes.

    Defaults are MindFormers 1.3.2's; without `intermediate_size` the FFN is 2/3 of 4 x hidden (times
    `ffn_dim_multiplier`), rounded up to `multiple_of`. With `qkv_has_bias` it is a Qwen2, where queries, keys and
    values alone have biases.
    """
    get = model_config.get
    hidden = get("hidden_size", 4096)
    heads = get("num_heads", 32)
    scaling = get("rope_scaling")
    ffn = _mindformers_ffn_size(hidden, get("multiple_of", 256), get("ffn_dim_multiplier"))
    is_qwen = get("qkv_has_bias") is True
    return {
        "architectures": ["Qwen2ForCausalLM" if is_qwen else FAMILY.architecture],
        "model_type": "qwen2" if is_qwen else FAMILY.model_type,
        "vocab_size": get("vocab_size", 32000),
        "hidden_size": hidden,
        "intermediate_size": get("intermediate_size") or ffn,
        "num_hidden_layers": get("num_layers", 32),
        "num_attention_heads": heads,
        "num_key_value_heads": get("n_kv_heads") or heads,
        "rms_norm_eps": float(get("rms_norm_eps", 1e-5)),
        "rope_theta": float(get("theta", 10000.0)),
        **({"rope_scaling": scaling} if scaling else {}),
        "max_position_embeddings": get("max_position_embedding") or get("seq_length", 2048),
        "hidden_act": "silu",
        "tie_word_embeddings": get("tie_word_embeddings", False),
        **({} if is_qwen else {"attention_bias": False, "mlp_bias": False}),
        "initializer_range": float(get("initializer_range", 0.02)),
        "bos_token_id": get("bos_token_id", 1),
        "eos_token_id": get("eos_token_id", 2),
        "pad_token_id": get("pad_token_id", 0),
    }


def _mindformers_ffn_size(hidden: int, multiple_of: int, multiplier: float | None) -> int:
    size = 4 * hidden
    if multiplier:
        size = int((multiplier + 0.01) * size)
    size = int(2 * size / 3)
    return multiple_of * ((size + multiple_of - 1) // multiple_of)
