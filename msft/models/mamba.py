"""Mamba (arXiv 2312.00752): selective state spaces in place of attention and feed-forward."""

import math
from dataclasses import replace

from msft.errors import InputError
from msft.models import state_space
from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import Block, ModelSpec, Outside
from msft.models.state_space import StateSpace

OUTSIDE = Outside("backbone.embeddings", "", 0, "", "backbone.layers", "backbone.norm_f", "lm_head")
KEYS = {"norm_eps": "layer_norm_epsilon", "intermediate_size": "msft_inner", "num_attention_heads": "msft_heads"}
SIZES = ("state_size", "conv_kernel")
DEFAULTS = {
    "norm_eps": 1e-5,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    # States have no positions: no text is too long. This stands for that.
    "max_position_embeddings": 1 << 20,
}


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Mamba `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, KEYS, {**DEFAULTS, "num_attention_heads": 1, "intermediate_size": 1})
    rank = config.get("time_step_rank", "auto")
    if rank == "auto" and type(config.get("hidden_size")) is int:
        rank = math.ceil(config["hidden_size"] / 16)
    check_sizes(values, SIZES, {"time_step_rank": rank})
    space = StateSpace(
        time_step_rank=rank,
        **common(values),
    )
    modules = (state_space.INPUT, state_space.SELECT, state_space.STEP)
    return described(values, "mamba", space, modules)


def check_sizes(values: HfConfig, names: tuple[str, ...], more: dict | None = None) -> None:
    """Raise InputError for each value that is no whole number above 0."""
    found = {**{name: values.get(name) for name in names}, **(more or {})}
    problems = [
        f"{values.where}: {name!r} must be a whole number above 0, not {value!r:.80}"
        for name, value in found.items()
        if not (type(value) is int and 0 < value < 2**31)
    ]
    if problems:
        raise InputError(*problems)


def common(values: HfConfig) -> dict:
    """Return the fields of `StateSpace` that both kinds have; raises InputError for what is not built."""
    for name, only in (("rms_norm", True), ("use_bcdt_rms", False), ("mamba_proj_bias", False)):
        values.refuse(name, only)
    hidden, expand = values.get("hidden_size"), values.number("expand")
    inner = int(expand * hidden) if type(hidden) is int else 1
    given = values.config.get("intermediate_size")
    if given not in (None, inner):
        raise InputError(f"{values.where}: 'intermediate_size' is {given!r:.80}, but expand x hidden_size is {inner}")
    ranges = values.number("time_step_min", 0.001), values.number("time_step_max", 0.1)
    return {
        "state_size": values.get("state_size"),
        "conv_kernel": values.get("conv_kernel"),
        "intermediate_size": inner,
        "residual_in_fp32": values.flag("residual_in_fp32", True),
        "use_conv_bias": values.flag("use_conv_bias", True),
        "time_step_range": (*ranges, values.number("time_step_floor", 1e-4)),
        "time_step_scale": values.number("time_step_scale", 1.0),
    }


def described(values: HfConfig, family: str, space: StateSpace, modules: tuple[str, ...]) -> ModelSpec:
    """Return the spec of a model of such layers; without attention its heads, windows and positions are none."""
    both = state_space.INPUT, state_space.OUTPUT
    block = Block(
        attention_norm="norm",
        project=modules,
        merge=state_space.OUTPUT,
        feed_norm="",
        expand=(),
        contract="",
        biased=both if values.flag("use_bias") else (),
        unadapted=tuple(f"mixer.{name}" for name in state_space.WITHOUT_ADAPTERS),
    )
    fields = {"block": block, "outside": OUTSIDE, "rotary_dim": 0, "state_space": space}
    spec = values.spec(family, ("silu",), **fields)
    none = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 0)
    return replace(spec, **none, intermediate_size=space.intermediate_size, attention_scale=0.0)


FAMILY = Family("mamba", "MambaForCausalLM", spec_from_hf, ("in_proj", "x_proj"))
