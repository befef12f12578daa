"""The engine-neutral description of a decoder."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """Everything an engine needs to build a decoder; sizes are counts, names are Hugging Face's.

    `rope_scaling` is Hugging Face's rope parameters without `rope_theta` (None = plain rotary embedding).
    `hf_config` is the whole `config.json`, kept to be written back beside exported weights.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    hf_config: dict
