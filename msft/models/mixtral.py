"""Mixtral (arXiv 2401.04088): Mistral whose feed-forwards are routed experts."""

from dataclasses import replace

from msft.models import llama
from msft.models.experts import Experts
from msft.models.family import Family, FileNames, MindFormersNames
from msft.models.hf_config import HfConfig
from msft.models.spec import ModelSpec

KEYS = {"count": "num_local_experts", "chosen": "num_experts_per_tok"}
DEFAULTS = {"norm_eps": 1e-5, "rope_theta": 1000000.0, "count": 8, "chosen": 2}


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a Mixtral `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, KEYS, DEFAULTS)
    values.refuse("router_jitter_noise", 0)
    spec = values.spec("mixtral")
    experts = Experts(*values.experts(), spec.intermediate_size, tuple(range(spec.num_hidden_layers)))
    windows = (values.get("sliding_window", 0),) * spec.num_hidden_layers
    return replace(spec, windows=windows, experts=experts)


FILES = FileNames(
    renames=((".mlp.gate.", ".block_sparse_moe.gate."),),
    expert=tuple(f"block_sparse_moe.experts.{{}}.{matrix}.weight" for matrix in ("w1", "w3", "w2")),
)
MINDFORMERS = MindFormersNames(
    renames=(*llama.MINDFORMERS.renames, (".mlp.gate.", ".feed_forward.router.dense.")),
    leaves={name: cell for name, cell in llama.MINDFORMERS.leaves.items() if name in llama.LORA_TARGETS},
    concatenated={"attention.w_qkv": llama.ATTENTION[:3]},
    stacked=tuple(f"feed_forward.ffn.{matrix}.weight" for matrix in ("w1", "w3", "w2")),
)
FAMILY = Family(
    "mixtral", "MixtralForCausalLM", spec_from_hf, llama.LORA_TARGETS, MINDFORMERS, FILES, template="mistral"
)
