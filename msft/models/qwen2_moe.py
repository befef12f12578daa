"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with routed experts beside a shared one, times the sigmoid of its gate."""

from dataclasses import replace

from msft.models import llama
from msft.models.experts import Experts, sparse_layers
from msft.models.family import Family, FileNames
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec

KEYS = {
    "count": "num_experts",
    "chosen": "num_experts_per_tok",
    "width": "moe_intermediate_size",
    "shared_width": "shared_expert_intermediate_size",
}
DEFAULTS = {"count": 60, "chosen": 4, "width": 1408, "shared_width": 5632}
FILES = FileNames(expert=tuple(f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")))


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Qwen2-MoE `config.json`; raises InputError naming every missing or impossible value."""
    # transformers 5 writes a window of 0 for none.
    given = {**config, "sliding_window": None} if config.get("sliding_window") == 0 else config
    values = HfConfig(given, where, KEYS, DEFAULTS)
    biased = llama.ATTENTION[:3] if values.flag("qkv_bias", True) else ()
    spec = values.spec("qwen2_moe", block=Block(biased=biased))
    experts = experts_of(values, values.size("shared_width"))
    return replace(spec, windows=_windows(values), experts=experts, hf_config=config)


def experts_of(values: HfConfig, shared_width: int = 0) -> Experts:
    """Return the experts of Qwen's configs, whose other values have been checked."""
    count, chosen = values.experts()
    layers, step = values.size("num_hidden_layers"), values.size("decoder_sparse_step", 1)
    sparse = sparse_layers(layers, step, values.numbers("mlp_only_layers"))
    return Experts(count, chosen, values.size("width"), sparse, values.flag("norm_topk_prob"), shared_width)


def _windows(values: HfConfig) -> tuple[int, ...]:
    """With `use_sliding_window`, of the layers that the file says, or of every second one below `max_window_layers`."""
    layers, window = values.size("num_hidden_layers"), values.get("sliding_window", 4096)
    if not values.flag("use_sliding_window"):
        return (0,) * layers
    if values.get("layer_types") is not None:
        return values.windows()
    most = int(values.number("max_window_layers", 28))
    return tuple(0 if number % 2 or number >= most else window for number in range(layers))


FAMILY = Family(
    "qwen2_moe", "Qwen2MoeForCausalLM", spec_from_hf, llama.LORA_TARGETS, files=FILES, template="qwen-7b-chat"
)
