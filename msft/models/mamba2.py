"""Mamba2 (arXiv 2405.21060): states by heads, whose scan is products of matrices, and a norm behind the gate."""

import math

from msft.errors import InputError
from msft.models import mamba, state_space
from msft.models.family import Family
from msft.models.hf_config import HfConfig
from msft.models.spec import ModelSpec
from msft.models.state_space import StateSpace

SIZES = ("state_size", "conv_kernel", "num_heads", "head_dim", "n_groups")
DEFAULTS = {
    **mamba.DEFAULTS,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "state_size": 128,
    "num_heads": 128,
    "head_dim": 64,
    "n_groups": 8,
}
KEYS = {**mamba.KEYS, "head_dim": "head_dim"}


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Mamba2 `config.json`; raises InputError naming every missing or impossible value.

    `norm_before_gate` has no meaning for transformers' class, which norms behind the gate, and has none here;
    `chunk_size` changes no result.
    """
    values = HfConfig(config, where, KEYS, {**DEFAULTS, "num_attention_heads": 1, "intermediate_size": 1})
    mamba.check_sizes(values, SIZES)
    fields = mamba.common(values)
    heads, dim, groups = values.get("num_heads"), values.get("head_dim"), values.get("n_groups")
    if heads * dim != fields["intermediate_size"]:
        inner = fields["intermediate_size"]
        raise InputError(f"{where}: num_heads x head_dim ({heads} x {dim}) is not expand x hidden_size ({inner})")
    if heads % groups:
        raise InputError(f"{where}: num_heads ({heads}) is no multiple of n_groups ({groups})")
    limit = _limit(config.get("time_step_limit"), where)
    space = StateSpace(num_heads=heads, head_dim=dim, n_groups=groups, time_step_limit=limit, **fields)
    return mamba.described(values, "mamba2", space, (state_space.INPUT,))


def _limit(given, where: str) -> tuple[float, float]:
    """The least and the largest time step; transformers 5 writes an infinite one as {"__float__": "Infinity"}."""
    if given is None:
        return 0.0, math.inf
    plain = [math.inf if value == {"__float__": "Infinity"} else value for value in given] if _is_pair(given) else []
    if not all(type(value) in (int, float) for value in plain) or not plain or not 0 <= plain[0] < plain[1]:
        raise InputError(f"{where}: 'time_step_limit' must be two numbers, least and largest, not {given!r:.80}")
    return float(plain[0]), float(plain[1])


def _is_pair(given) -> bool:
    return isinstance(given, list | tuple) and len(given) == 2


FAMILY = Family("mamba2", "Mamba2ForCausalLM", spec_from_hf, ("in_proj",))
