"""The registry: `model_type` of a config.json -> the family."""

from msft.errors import InputError, did_you_mean
from msft.models import (
    baichuan,
    bloom,
    chatglm,
    chatglm1,
    falcon,
    gemma,
    gemma2,
    glm,
    glm4,
    gpt2,
    gpt_neox,
    internlm,
    internlm2,
    internlm3,
    llama,
    mamba,
    mamba2,
    mistral,
    mixtral,
    opt,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    t5,
)
from msft.models.family import Family
from msft.models.spec import ModelSpec

MODULES = (
    llama,
    mistral,
    qwen2,
    qwen3,
    gemma,
    gemma2,
    internlm,
    internlm2,
    internlm3,
    baichuan,
    chatglm,
    chatglm1,
    glm,
    glm4,
    phi3,
    gpt2,
    gpt_neox,
    opt,
    bloom,
    falcon,
    mixtral,
    qwen2_moe,
    qwen3_moe,
    mamba,
    mamba2,
    t5,
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in MODULES}


# What MindFormers and model cards call families, where config.json says something else.
ALIASES = {
    "yi": "llama",
    "vicuna": "llama",
    "tinyllama": "llama",
    "llama2": "llama",
    "llama3": "llama",
    "qwen1.5": "qwen2",
    "qwen2.5": "qwen2",
    "baichuan2": "baichuan",
    "chatglm2": "chatglm",
    "chatglm3": "chatglm",
    "chatglm-6b": "chatglm1",
    "glm-n": "chatglm",
    "gpt": "gpt2",
    "pythia": "gpt_neox",
    "flan-t5": "t5",
}


def named(name: str, where: str = "--model") -> Family:
    """Return the family that a user names by its `model_type` or another name for it; raises InputError as `family`."""
    return family(ALIASES.get(name, name), where)


def family(name: str, where: str = "--model") -> Family:
    """Return a model family by its `model_type`; raises InputError naming the known ones."""
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"{where}: unknown model family {name!r:.80}{did_you_mean(name, FAMILIES)} (known: {known})")
    return FAMILIES[name]


def name_of(config: dict) -> str | None:
    """Return the name of a config.json's family, None where it says none that is known.

    The first ChatGLM has a name of its own here, but the `model_type` of the later ones.
    """
    model_type = config.get("model_type")
    if model_type == "chatglm" and chatglm1.is_meant(config):
        return chatglm1.FAMILY.model_type
    return model_type if isinstance(model_type, str) and model_type in FAMILIES else None


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Return the ModelSpec of a Hugging Face config; the family is its `model_type`."""
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{where}: 'model_type' is missing, so the model family is unknown")
    return family(config["model_type"], where).spec_from_hf(config, where)
