"""The Llama family (Llama 1 to 3, SmolLM2, TinyLlama ...): config, tensors, MindFormers' names.

Format: transformers' LlamaConfig and LlamaForCausalLM; MindFormers 1.3.2's LlamaConfig and checkpoint names.
"""

import re

from msft.errors import InputError
from msft.models.rope import is_number
from msft.models.spec import ModelSpec

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"
DEFAULT_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

# Hugging Face's leaf module -> MindFormers' leaf cell, for the modules LoRA can tune.
MINDFORMERS_LEAF = {
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}

# MindFormers' concatenated cells (`qkv_concat: True`) -> the Hugging Face modules they hold, along axis 0.
CONCATENATED = {
    "attention.w_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feed_forward.w_gate_hidden": ("mlp.gate_proj", "mlp.up_proj"),
}

_RENAMES = (
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
)

MAX_LAYERS = 10_000
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
_SIZE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def to_mindformers(name: str) -> str:
    """Return MindFormers' parameter (or cell) name for a Hugging Face one."""
    for hugging_face, mindformers in _RENAMES:
        name = name.replace(hugging_face, mindformers)
    return name


def from_mindformers(name: str) -> str:
    """Return Hugging Face's parameter (or module) name for a MindFormers one."""
    for hugging_face, mindformers in _RENAMES:
        name = name.replace(mindformers, hugging_face)
    return name


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Llama `config.json` of transformers 4 or 5 (`rope_theta` or `rope_parameters`).

    Raises InputError naming every missing or impossible size.
    """
    problems = [f"{where}: {problem}" for problem in _impossible(config)]
    if problems:
        raise InputError(*problems)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if heads % kv_heads:
        raise InputError(f"{where}: num_attention_heads ({heads}) is no multiple of num_key_value_heads ({kv_heads})")
    if head_dim % 2:
        raise InputError(f"{where}: head_dim ({head_dim}) must be even for rotary embedding")
    theta, scaling = _rope(config)
    eos = config.get("eos_token_id")
    return ModelSpec(
        family="llama",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(_given(config, "rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=_given(config, "max_position_embeddings", 2048),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        initializer_range=float(_given(config, "initializer_range", 0.02)),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_token_id=config.get("pad_token_id"),
        hf_config=config,
    )


def _given(config: dict, key: str, default):
    """A null in a config.json counts as absent."""
    return default if config.get(key) is None else config[key]


def _impossible(config: dict) -> list[str]:
    """Say what is wrong with each value by itself."""
    problems = [
        f"'{key}' must be a whole number above 0, not {config.get(key)!r:.80}"
        for key in _SIZE_KEYS + _OPTIONAL_SIZES
        if not (config.get(key) is None and key in _OPTIONAL_SIZES) and not _is_size(config.get(key))
    ]
    if _is_size(config.get("num_hidden_layers")) and config["num_hidden_layers"] > MAX_LAYERS:
        problems.append(f"'num_hidden_layers' is {config['num_hidden_layers']}, more than {MAX_LAYERS}")
    for key in ("rms_norm_eps", "initializer_range", "rope_theta"):
        if config.get(key) is not None and not is_number(config[key]):
            problems.append(f"'{key}' must be a number, not {config[key]!r:.80} (0 or more, and finite)")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(config.get(key), bool | None):
            problems.append(f"'{key}' must be true or false, not {config[key]!r:.80}")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = config.get(key) if isinstance(config.get(key), list) and key == "eos_token_id" else [config.get(key)]
        if not all(each is None or type(each) is int and abs(each) < 2**31 for each in ids):
            problems.append(f"'{key}' must be a token's number, not {config[key]!r:.80}")
    for key in ("rope_parameters", "rope_scaling"):
        problems += _impossible_rope(key, config.get(key))
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"'hidden_act' is {config['hidden_act']!r:.80}; only 'silu' is supported")
    return problems


def _impossible_rope(key: str, rope) -> list[str]:
    """What `msft.models.rope` does not see: it checks the numbers that a kind needs."""
    if not isinstance(rope, dict | None):
        return [f"'{key}' must be an object, not {rope!r:.80}"]
    problems = []
    for name in ("rope_type", "type"):
        if rope and not isinstance(rope.get(name), str | None):
            problems.append(f"'{key}': '{name}' must be text, not {rope[name]!r:.80}")
    if rope and not (rope.get("rope_theta") is None or is_number(rope["rope_theta"])):
        problems.append(f"'{key}': 'rope_theta' must be a number of 0 or more, not {rope['rope_theta']!r:.80}")
    return problems


def _is_size(value) -> bool:
    return type(value) is int and 0 < value < 2**40


def _rope(config: dict) -> tuple[float, dict | None]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    return theta, None if kind == "default" else {"rope_type": kind, **rope}


def hf_config_from_mindformers(model_config: dict) -> dict:
    """Return the `config.json` that MindFormers' `model_config` block (LlamaConfig) describes.

    Defaults are MindFormers 1.3.2's; without `intermediate_size` the FFN is 2/3 of 4 x hidden (times
    `ffn_dim_multiplier`), rounded up to `multiple_of`.
    """
    get = model_config.get
    hidden = get("hidden_size", 4096)
    heads = get("num_heads", 32)
    scaling = get("rope_scaling")
    ffn = _mindformers_ffn_size(hidden, get("multiple_of", 256), get("ffn_dim_multiplier"))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
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
        "attention_bias": False,
        "mlp_bias": False,
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


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the model, in file order, with its shape; a tied head has no tensor of its own."""
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    shapes = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        linears = {
            "self_attn.q_proj": (queries, hidden, spec.attention_bias),
            "self_attn.k_proj": (keys, hidden, spec.attention_bias),
            "self_attn.v_proj": (keys, hidden, spec.attention_bias),
            "self_attn.o_proj": (hidden, queries, spec.attention_bias),
            "mlp.gate_proj": (ffn, hidden, spec.mlp_bias),
            "mlp.up_proj": (ffn, hidden, spec.mlp_bias),
            "mlp.down_proj": (hidden, ffn, spec.mlp_bias),
        }
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


def linear_modules(spec: ModelSpec) -> list[str]:
    """Return the paths of all linear modules that LoRA can tune, such as 'model.layers.0.self_attn.q_proj'."""
    weights = [name for name in tensor_shapes(spec) if re.search(r"\.layers\..*_proj\.weight$", name)]
    return [name.removesuffix(".weight") for name in weights]
