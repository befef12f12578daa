"""What both toolkits say of LoRA, in the recipe's patterns."""

import re

from msft.config.importers.translation import Translation


def target_patterns(names: list[str]) -> list[str]:
    """Return the patterns for the modules that PEFT finds by these names: a module's last name, or the end of its path.

    `all` is every linear module but the head.
    """
    if names == ["all"]:
        return [".*"]
    return [rf"(.*\.)?{re.escape(name)}$" for name in names]


def put_adapter(translation: Translation, targets: list[str], rank: int, alpha: float, dropout: float) -> None:
    """Write a pet_config."""
    put = translation.put
    put("model.pet_config.pet_type", "lora", "finetuning_type")
    put("model.pet_config.lora_rank", rank, "lora_rank")
    put("model.pet_config.lora_alpha", alpha, "lora_alpha")
    put("model.pet_config.lora_dropout", dropout, "lora_dropout")
    put("model.pet_config.target_modules", target_patterns(targets), "lora_target")


def put_frozen_dtype(translation: Translation) -> None:
    """Frozen weights have the dtype that is computed in."""
    model = translation.document.data["model"]
    if "compute_dtype" in model:
        translation.put("model.param_init_type", model["compute_dtype"], "bf16" if translation.keys.bf16 else "fp16")
