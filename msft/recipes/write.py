"""The recipe of a published size: `base.yaml` with what the family and the size differ in."""

from pathlib import Path
from string import Template

from msft.models.catalog import parameters
from msft.models.families import named, spec_from_hf
from msft.models.sizes import config_of, published

METHODS = ("lora", "full")
FOLDER = Path(__file__).parent
LONGEST = 2048
ROWS_OF_A_STEP = 16
# Rows of a micro-batch by the number of parameters that a model stays below.
ROWS = ((3e9, 4), (20e9, 2), (float("inf"), 1))
RECOMPUTED_FROM = 3e9


def recipe(name: str, size: str, method: str, pretrained: str = "", file: str = "recipe.yaml", devices: int = 1) -> str:
    """Return the recipe's YAML; `pretrained` is the model's folder ('' = the release's name), `file` how it is called.

    Raises InputError for a family or a size that is not known.
    """
    kind = named(name)
    model_type = kind.model_type
    chosen = published(model_type, size)
    spec = spec_from_hf(config_of(model_type, chosen), chosen.release)
    count = parameters(spec)
    rows = next(rows for below, rows in ROWS if count < below)
    is_lora = method == "lora"
    targets = "|".join(f".*{leaf}$" for leaf in kind.lora_targets)
    adapters = Template(_text("adapters")).substitute(targets=targets) if is_lora else ""
    return Template(_text("base")).substitute(
        release=chosen.release,
        family=model_type,
        size=size,
        parameters=f"{count:,}",
        with_lora=" with LoRA" if is_lora else ", all weights",
        name=f"{model_type}_{size}_{method}",
        file=file,
        template=kind.template,
        pretrained=pretrained or chosen.release,
        seq_length=min(LONGEST, spec.max_position_embeddings),
        adapters=adapters,
        batch_size=rows,
        accumulation=ROWS_OF_A_STEP // rows,
        weight_decay=0.0 if is_lora else 0.1,
        learning_rate="1.e-4" if is_lora else "1.e-5",
        use_parallel=str(devices > 1).lower(),
        devices=devices,
        recompute=str(count >= RECOMPUTED_FROM).lower(),
    )


def _text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
