"""The two names of an adapter tensor: PEFT's in adapter files, MindFormers' (mindpet) in CKPT files.

PEFT: `base_model.model.<module>.lora_A.weight` (rank, in) and `lora_B.weight` (out, rank); MindFormers:
`<dense>.mindpet_delta_lora_a` and `_b`, with the same shapes.
"""

from msft.models.family import Family

PEFT_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": ".mindpet_delta_lora_a", ".lora_B.weight": ".mindpet_delta_lora_b"}


def peft_names(module: str) -> tuple[str, str]:
    """Return PEFT's file names of A and B for a module path such as 'model.layers.0.self_attn.q_proj'."""
    return f"{PEFT_PREFIX}{module}.lora_A.weight", f"{PEFT_PREFIX}{module}.lora_B.weight"


def is_mindformers_adapter(name: str) -> bool:
    """Whether a CKPT's tensor is MindFormers' LoRA A or B."""
    return name.endswith(tuple(_SUFFIXES.values()))


def peft_to_mindformers(name: str, family: Family) -> str:
    """Return MindFormers' name for PEFT's name of an adapter tensor."""
    for peft, mindformers in _SUFFIXES.items():
        if name.endswith(peft):
            # The dot lets the family's map see a whole module name.
            module = family.mindformers.write(name.removeprefix(PEFT_PREFIX).removesuffix(peft) + ".")
            return module.removesuffix(".") + mindformers
    raise ValueError(f"{name!r} is no adapter tensor")


def mindformers_to_peft(name: str, family: Family) -> str:
    """Return PEFT's name for MindFormers' name of an adapter tensor."""
    for peft, mindformers in _SUFFIXES.items():
        if name.endswith(mindformers):
            module = family.mindformers.read(name.removesuffix(mindformers) + ".")
            return PEFT_PREFIX + module.removesuffix(".") + peft
    raise ValueError(f"{name!r} is no adapter tensor")
