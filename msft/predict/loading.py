"""A model and an adapter from their files onto an engine, without a recipe."""

import importlib.util
import math
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from msft import console
from msft.backend import PACKAGES
from msft.backend.contract import Engine, Lora, Precision, Runtime, Tuning
from msft.convert import companions
from msft.convert.adapter import adapter_lora, check_adapter, read_adapter
from msft.convert.check import check_against
from msft.convert.open import open_weights
from msft.convert.rank_folder import KEY, slices_explained
from msft.data.tokenizer_files import read_json
from msft.data.tokenizers import Tokenizer, open_tokenizer
from msft.errors import InputError
from msft.models.spec import ModelSpec

# What to do with a distributed checkpoint's slices, which are not joined here.
JOINING = f"join them with msft convert_weight or merge --{KEY}"


def load_spec(model: Path) -> ModelSpec:
    """Return the sizes of the model at a path; raises InputError when nothing tells them."""
    if not model.exists():
        raise InputError(f"--model: {model} does not exist")
    return companions.load_spec(None, model)


def load_tokenizer(model: Path) -> Tokenizer:
    """Return the tokenizer of the model at a path: the folder's, the one beside a file, or what a GGUF file holds."""
    folder = model if model.is_dir() else model.parent
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")) or model.suffix != ".gguf":
        return open_tokenizer(folder)
    with TemporaryDirectory() as place:
        for name, content in companions.find(None, model).items():
            Path(place, name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return open_tokenizer(place)


def end_ids(spec: ModelSpec, model: Path | str | None) -> tuple[int, ...]:
    """Return the tokens at which a model ends: what its config.json says, and the generation_config.json beside it.

    Raises InputError for a generation_config.json that cannot be read.
    """
    if model is None:
        return spec.eos_token_ids
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    path = folder / "generation_config.json"
    given = read_json(path).get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(each) is int for each in ids):
        raise InputError(f"{path}: 'eos_token_id' must be a token's number or a list of them, not {given!r:.80}")
    return tuple(sorted({*spec.eos_token_ids, *ids}))


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
    with slices_explained(model, JOINING):
        source = open_weights(model, spec)
        check_against(spec, source)
    tuning, factors = Tuning(), {}
    if adapter:
        lora, factors = _read_adapter(adapter, spec, lora_alpha)
        tuning = Tuning(lora=lora)
    elif lora_alpha is not None:
        raise InputError("--lora_alpha: goes with --adapter")
    backend = backend or installed_backend()
    absent = [name for name in PACKAGES[backend] if importlib.util.find_spec(name) is None]
    if absent:
        raise InputError(f"--backend: {backend} needs {', '.join(absent)}: pip install 'msft[{backend}]'")
    device, why = import_module(f"msft.backend.{backend}.device").pick(device)
    if backend == "mindspore" and device == "cpu" and dtype != "float32":
        raise InputError(f"--dtype: MindSpore's CPU target has no {dtype} matrix product; use fp32 or --backend torch")
    console.note(f"{backend} on {device} ({why}), {dtype}")
    runtime = Runtime(device=device, precision=Precision(dtype, dtype))
    engine = import_module(f"msft.backend.{backend}.engine").build(spec, source, tuning, runtime)
    if factors:
        engine.load_adapter(factors)
    return engine


def _read_adapter(path: Path, spec: ModelSpec, alpha: float | None) -> tuple[Lora, dict[str, np.ndarray]]:
    with slices_explained(path, JOINING):
        config, factors = read_adapter(path, spec.family)
        lora = adapter_lora(config, factors, str(path), alpha)
        check_adapter(lora, factors, spec, str(path))
    if not math.isfinite(lora.alpha):
        raise InputError(f"{path}: does not say its alpha; give --lora_alpha")
    return lora, factors


def installed_backend() -> str:
    """Return mindspore if it is installed, else torch; raises InputError when neither is."""
    for backend in ("mindspore", "torch"):
        if importlib.util.find_spec(backend) is not None:
            return backend
    raise InputError("no engine is installed: pip install 'msft[torch]' or 'msft[mindspore]'")
