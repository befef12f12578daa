"""Canonical names: how adapters are called in PEFT's files, and which tensors weight decay leaves alone."""

LORA_PREFIX = "base_model.model."


def lora_a_name(module: str) -> str:
    """Return the name of a module's lora_A in `adapter_model.safetensors`."""
    return f"{LORA_PREFIX}{module}.lora_A.weight"


def lora_b_name(module: str) -> str:
    """Return the name of a module's lora_B in `adapter_model.safetensors`."""
    return f"{LORA_PREFIX}{module}.lora_B.weight"


def is_norm_or_bias(name: str) -> bool:
    """Whether a parameter is a norm's weight or a bias, which AdamW does not decay unless asked."""
    return name.endswith(".bias") or "norm." in name
