"""A model and an adapter from their files onto an engine, without a recipe."""

import importlib.util
from importlib import import_module
from pathlib import Path

from msft import console
from msft.backend.contract import Engine, Precision, Runtime, Tuning
from msft.convert import companions
from msft.convert.adapter import adapter_lora, read_adapter
from msft.convert.check import check_against
from msft.convert.open import open_weights
from msft.errors import InputError
from msft.models.spec import ModelSpec


def load_spec(model: Path) -> ModelSpec:
    """Return the sizes of the model at a path; raises InputError when nothing tells them."""
    if not model.exists():
        raise InputError(f"--model: {model} does not exist")
    return companions.load_spec(None, model)


def load_engine(
    spec: ModelSpec,
    model: Path,
    adapter: Path | None = None,
    backend: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    lora_alpha: float | None = None,
) -> Engine:
    """Return an engine with a model's weights and an adapter's, ready to generate.

    `backend` None takes mindspore if it is installed, else torch. `lora_alpha` overrules the adapter's own.
    Raises InputError for weights that do not fit and for what the device cannot do.
    """
    source = open_weights(model, spec)
    check_against(spec, source)
    tuning, factors = Tuning(), {}
    if adapter:
        config, factors = read_adapter(adapter, spec.family)
        tuning = Tuning(lora=adapter_lora(config, factors, str(adapter), lora_alpha))
    backend = backend or installed_backend()
    if importlib.util.find_spec(backend) is None:
        raise InputError(f"--backend: {backend} is not installed: pip install 'msft[{backend}]'")
    device, why = import_module(f"msft.backend.{backend}.device").pick(device)
    if backend == "mindspore" and device == "cpu" and dtype != "float32":
        raise InputError(f"--dtype: MindSpore's CPU target has no {dtype} matrix product; use fp32 or --backend torch")
    console.note(f"{backend} on {device} ({why}), {dtype}")
    runtime = Runtime(device=device, precision=Precision(dtype, dtype))
    engine = import_module(f"msft.backend.{backend}.engine").build(spec, source, tuning, runtime)
    if factors:
        engine.load_adapter(factors)
    return engine


def installed_backend() -> str:
    """Return mindspore if it is installed, else torch; raises InputError when neither is."""
    for backend in ("mindspore", "torch"):
        if importlib.util.find_spec(backend) is not None:
            return backend
    raise InputError("no engine is installed: pip install 'msft[torch]' or 'msft[mindspore]'")
