"""Qwen1.5, Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from dataclasses import replace

from msft.models import llama
from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Qwen2 `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where)
    spec = values.spec("qwen2", block=Block(biased=llama.ATTENTION[:3]))
    return replace(spec, windows=windows(values))


def windows(values: HfConfig) -> tuple[int, ...]:
    """Return each layer's window: with `use_sliding_window`, of the layers from `max_window_layers` on."""
    layers, window = values.get("num_hidden_layers"), values.get("sliding_window", 4096)
    if not values.flag("use_sliding_window"):
        return (0,) * layers
    if values.get("layer_types") is not None:
        return values.windows()
    whole = min(int(values.number("max_window_layers", 28)), layers)
    return (0,) * whole + (window,) * (layers - whole)


FAMILY = Family(
    "qwen2", "Qwen2ForCausalLM", spec_from_hf, llama.LORA_TARGETS, llama.MINDFORMERS, template="qwen-7b-chat"
)
