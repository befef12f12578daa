"""What names tell: which parameters weight decay leaves alone, which modules take adapters."""

from collections.abc import Iterable

from msft.backend.contract import Precision
from msft.errors import RunError
from msft.models.shapes import linear_modules
from msft.models.spec import ModelSpec

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def is_norm_or_bias(name: str) -> bool:
    """Whether a parameter is a norm's weight or a bias, which AdamW does not decay unless asked.

    Norms are called so, or ln_1, ln_2 and ln_f (GPT-2), or norm_f (Mamba). So are a state space's decays, what passes
    it by, and biases of its time steps, which its authors do not decay either. What relative positions add to scores is
    a bias too (T5).
    """
    is_norm = any(part in name for part in ("norm.", ".ln_", ".norm_f."))
    return is_norm or name.endswith((".bias", "_bias.weight", ".A_log", ".D", ".dt_bias"))


def computed_dtype(name: str, tuned: bool, precision: Precision, spec: ModelSpec) -> str:
    """Return the dtype that a parameter is computed with.

    Frozen linear weights and the head meet products in the compute dtype; a float32 compute dtype widens the others.
    """
    if tuned:
        return "float32"
    module = name.rpartition(".")[0]
    in_block = name.startswith(f"{spec.outside.layers}.") and (
        module.endswith(spec.block.modules) or _is_of_experts(name, module, spec)
    )
    in_block = in_block or (spec.encoder is not None and module in linear_modules(spec))
    return precision.compute if in_block or name == spec.head else _frozen_dtype(precision)


def _is_of_experts(name: str, module: str, spec: ModelSpec) -> bool:
    experts = spec.experts
    return experts is not None and (name.endswith(experts.tensors) or module.endswith(experts.modules))


def _frozen_dtype(precision: Precision) -> str:
    """What frozen parameters are computed with that are in no product."""
    return "float32" if precision.compute == "float32" else precision.parameters


def hidden_dtype(embedding_tuned: bool, precision: Precision) -> str:
    """Return the dtype of the hidden states between two blocks: what sums of the embedding's and the products' are."""
    embedding = "float32" if embedding_tuned else _frozen_dtype(precision)
    return embedding if embedding == precision.compute else "float32"


def check_modules(modules: Iterable[str], spec: ModelSpec) -> None:
    """Raise RunError for modules whose adapters the engines would not apply: all but the layers' linear ones."""
    known = set(linear_modules(spec))
    foreign = [module for module in modules if module not in known]
    if foreign:
        raise RunError(f"LoRA on {', '.join(foreign[:5])}: only the linear modules of the model's layers take adapters")
