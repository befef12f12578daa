"""What `msft list` tells of a family, as plain values."""

import math

from msft.models.families import FAMILIES, named, spec_from_hf
from msft.models.shapes import tensor_shapes
from msft.models.sizes import SIZES, Size, config_of
from msft.models.spec import ModelSpec
from msft.models.verified import checks_of


def catalog() -> list[dict]:
    """Return the entries of all families."""
    return [entry(name) for name in FAMILIES]


def entry(name: str) -> dict:
    """Return a family's entry: what describes it, its sizes, and what was verified how; raises InputError.

    `dealt` says of a size whether its layers can be dealt to several processes (tensor, pipeline, context parallel).
    """
    kind = named(name, "msft list")
    model_type = kind.model_type
    sizes = {size: _size(model_type, published) for size, published in SIZES.get(model_type, {}).items()}
    return {
        "family": model_type,
        "architecture": kind.architecture,
        "lora_targets": list(kind.lora_targets),
        "template": kind.template,
        "mindformers_names": bool(kind.mindformers.renames or kind.mindformers.layout),
        "transformers_has_it": kind.native is None and not kind.is_ported,
        "is_ported": kind.is_ported,
        "sizes": sizes,
        "verified": [check._asdict() | {"families": list(check.families)} for check in checks_of(model_type)],
    }


def parameters(spec: ModelSpec) -> int:
    """Return the number of a model's parameters; a tied head counts once."""
    return sum(math.prod(shape) for shape in tensor_shapes(spec).values())


def _size(model_type: str, size: Size) -> dict:
    spec = spec_from_hf(config_of(model_type, size), size.release)
    return {
        "release": size.release,
        "parameters": parameters(spec),
        "layers": spec.num_hidden_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_attention_heads,
        "key_heads": spec.num_key_value_heads,
        "vocabulary": spec.vocab_size,
        "longest": spec.max_position_embeddings,
        "dealt": spec.is_like_llama,
    }
