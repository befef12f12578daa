"""Gemma 2: Gemma with norms behind attention and feed-forward too, soft caps, and windows on every other layer."""

from dataclasses import replace

from msft.models import gemma, llama
from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec

KEYS = {"activation": "hidden_activation"}
DEFAULTS = {
    **gemma.DEFAULTS,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Gemma 2 `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, KEYS, DEFAULTS)
    block = Block(
        merged_norm="post_attention_layernorm",
        feed_norm="pre_feedforward_layernorm",
        contracted_norm="post_feedforward_layernorm",
        activation="gelu_tanh",
        biased=llama.ATTENTION if values.flag("attention_bias") else (),
    )
    spec = values.spec(
        "gemma2",
        ("gelu_pytorch_tanh",),
        block=block,
        norm_offset=1.0,
        embedding_scale=values.number("hidden_size", 0) ** 0.5,
        attention_scale=values.number("query_pre_attn_scalar") ** -0.5,
        attention_cap=_cap(values, "attn_logit_softcapping"),
        head_cap=_cap(values, "final_logit_softcapping"),
    )
    return replace(spec, windows=_windows(values))


def _cap(values: HfConfig, name: str) -> float | None:
    """A null means no cap, an absent key transformers' default."""
    return None if name in values.config and values.config[name] is None else values.number(name)


def _windows(values: HfConfig) -> tuple[int, ...]:
    if values.get("layer_types") is not None:
        return values.windows()
    window = values.get("sliding_window")
    return tuple(0 if number % 2 else window for number in range(values.get("num_hidden_layers")))


FAMILY = Family("gemma2", "Gemma2ForCausalLM", spec_from_hf, llama.LORA_TARGETS)
