"""LoRA adapters: PEFT's folders read and written without peft, MindFormers' CKPT files read.

Format: peft's `adapter_config.json` and `adapter_model.safetensors`.
"""

import math
import os
import re
from pathlib import Path

import numpy as np

from msft.backend.contract import Lora
from msft.convert import ckpt, rank_folder, safetensors_file
from msft.convert.detect import Kind, detect
from msft.convert.dtypes import FLOATS, Cast
from msft.convert.hf_folder import read_json
from msft.convert.joined import JoinedTensors
from msft.convert.source import TensorInfo, TensorSource
from msft.convert.stored import Stored, StoredTensors, readable
from msft.errors import InputError, did_you_mean
from msft.files import atomic_path, write_json
from msft.models.adapters import PEFT_PREFIX, is_mindformers_adapter, mindformers_to_peft, peft_names
from msft.models.families import family
from msft.models.shapes import linear_modules, tensor_shapes
from msft.models.spec import ModelSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(re.escape(PEFT_PREFIX) + r"(.+)\.lora_([AB])\.weight")


def read_adapter(
    path: str | os.PathLike, family_name: str = "llama", strategy: Path | None = None
) -> tuple[dict, dict[str, np.ndarray]]:
    """Return an adapter's config and its tensors under PEFT's file names.

    `path` is a PEFT folder, or a CKPT of MindFormers (or a folder with one) that holds LoRA tensors, with or without
    the base model's; a CKPT knows no alpha, so `lora_alpha` is None in its config. With `strategy` (as in
    `open_weights`) it is the parent of `rank_0`, `rank_1`, ... Raises InputError.
    """
    path = Path(path)
    with readable(path):
        if (path / CONFIG).is_file():
            config, source = read_json(path / CONFIG), StoredTensors(_read_peft_index(path))
        else:
            config, source = _open_ckpt(path, family_name, strategy)
    weights = {name: source.read(name) for name in source.tensors}
    adapter_lora(config, weights, str(path))
    return config, weights


def adapter_lora(config: dict, weights: dict[str, np.ndarray], where: str, alpha: float | None = None) -> Lora:
    """Return what an adapter's config and tensors say as a `Lora`; `alpha` overrules the config's.

    Alpha is NaN when neither says it (a CKPT). rsLoRA's scaling alpha / sqrt(rank) is folded into alpha. Raises
    InputError for what is not plain LoRA: other PEFT types, DoRA, trained biases or modules, ranks or alphas that
    differ between modules, A without B.
    """
    _refuse_unsupported(config, where)
    modules = _modules(weights, where)
    ranks = {int(weights[peft_names(module)[0]].shape[0]) for module in modules}
    if len(ranks) != 1:
        raise InputError(f"{where}: the modules have different ranks ({sorted(ranks)}), which is not supported")
    rank = ranks.pop()
    if config.get("r") not in (None, rank):
        raise InputError(f"{where}: the config says rank {config['r']!r:.80}, but the tensors have rank {rank}")
    value = config.get("lora_alpha") if alpha is None else alpha
    value = math.nan if value is None else float(value)
    if config.get("use_rslora") and alpha is None:
        value *= math.sqrt(rank)
    return Lora(rank, value, float(config.get("lora_dropout") or 0.0), modules)


def check_adapter(lora: Lora, weights: dict[str, np.ndarray], spec: ModelSpec, where: str) -> None:
    """Raise InputError for modules that engines cannot tune in this model, and for factors of other sizes."""
    shapes, modules = tensor_shapes(spec), linear_modules(spec)
    problems = []
    for module in lora.modules:
        if f"{module}.weight" in shapes and module not in modules:
            problems.append(f"{where}: tunes {module}, which works only when it is merged into the model (msft merge)")
        elif module not in modules:
            hint = did_you_mean(module, modules)
            problems.append(f"{where}: tunes {module!r}, which the model does not have{hint}")
        else:
            first, second = (weights[name].shape for name in peft_names(module))
            size, expected = [second[0], first[1]], list(shapes[f"{module}.weight"])
            expected = expected[::-1] if spec.block.is_transposed else expected
            if size != expected:
                problems.append(f"{where}: {module}: B A is {size}, but the model's weight is {expected}")
    if problems:
        raise InputError(*problems[:20])


def write_adapter(
    directory: str | os.PathLike,
    lora: Lora,
    weights: dict[str, np.ndarray],
    base_model: str,
    spec: ModelSpec | None = None,
) -> None:
    """Write a PEFT folder that `peft.PeftModel.from_pretrained` loads; a new folder appears by one rename.

    `weights` are float arrays under PEFT's file names. With `spec`, `target_modules` are leaf names where these select
    exactly `lora.modules`; otherwise full paths. In an existing folder each file appears by one rename.
    """
    directory = Path(directory)
    expected = {name for module in lora.modules for name in peft_names(module)}
    if expected != weights.keys():
        raise ValueError(f"tensors do not fit the modules: {sorted(expected ^ weights.keys())[:4]}")
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if spec is not None and spec.encoder else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _target_modules(lora, spec),
        "bias": "none",
        "fan_in_fan_out": spec is not None and spec.block.is_transposed,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    if directory.is_dir():
        _write_files(directory, config, weights)
        return
    with atomic_path(directory) as temporary:
        temporary.mkdir()
        _write_files(temporary, config, weights)


def _write_files(directory: Path, config: dict, weights: dict[str, np.ndarray]) -> None:
    keep = Cast(None)
    tensors = {name: TensorInfo(array.shape, array.dtype.name) for name, array in sorted(weights.items())}
    with atomic_path(directory / WEIGHTS) as temporary, open(temporary, "wb") as file:
        writer = safetensors_file.SafetensorsWriter(file, tensors)
        for name in tensors:
            writer.add(name, keep.pieces(name, weights[name]))
        writer.close()
    write_json(directory / CONFIG, config)


def _target_modules(lora: Lora, spec: ModelSpec | None) -> list[str]:
    leaves = {module.rsplit(".", 1)[-1] for module in lora.modules}
    if spec is not None:
        selected = {module for module in linear_modules(spec) if module.rsplit(".", 1)[-1] in leaves}
        if selected == set(lora.modules):
            return sorted(leaves)
    return list(lora.modules)


def _read_peft_index(folder: Path) -> dict[str, Stored]:
    if (folder / WEIGHTS).is_file():
        return safetensors_file.read_index(folder / WEIGHTS)
    if (folder / "adapter_model.bin").is_file():
        from msft.convert import torch_file

        return torch_file.read_index(folder / "adapter_model.bin")
    raise InputError(f"{folder}: has {CONFIG} but no {WEIGHTS}")


def _open_ckpt(path: Path, family_name: str, strategy: Path | None) -> tuple[dict, TensorSource]:
    if strategy is not None:
        file, entries = path, rank_folder.read_index(rank_folder.files(path), strategy)
    else:
        kind, file = detect(path)
        if kind is not Kind.CKPT:
            raise InputError(f"{path}: is no LoRA adapter (a PEFT folder with {CONFIG}, or a CKPT with LoRA tensors)")
        entries = ckpt.read_index(file).tensors
    model = family(family_name)
    stored = {
        mindformers_to_peft(name, model): entry
        for name, entry in entries.items()
        if is_mindformers_adapter(name) and not name.startswith(("adam_m.", "adam_v."))
    }
    if not stored:
        raise InputError(f"{file}: holds no LoRA tensors (mindpet_delta_lora_a and _b)")
    modules = sorted({_FACTOR.fullmatch(name)[1].rsplit(".", 1)[-1] for name in stored})
    config = {"peft_type": "LORA", "r": None, "lora_alpha": None, "lora_dropout": 0.0, "target_modules": modules}
    return config, JoinedTensors(stored)


def _refuse_unsupported(config: dict, where: str) -> None:
    problems = []
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(f"{where}: is a {_word(config['peft_type'])} adapter; only LORA is supported")
    for key in (
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
    ):
        if config.get(key):
            problems.append(f"{where}: {key} = {config[key]!r:.80} is not supported")
    if config.get("bias", "none") != "none":
        problems.append(f"{where}: bias = {config['bias']!r:.80} is not supported (known: 'none')")
    if not isinstance(config.get("use_rslora"), bool | None):
        problems.append(f"{where}: use_rslora must be true or false, not {config['use_rslora']!r:.80}")
    for key, end in (("lora_alpha", 2**64), ("lora_dropout", 1)):
        value = config.get(key)
        if value is not None and not (type(value) in (int, float) and 0 <= value < end):
            problems.append(f"{where}: {key} must be a number from 0 to below {end}, not {value!r:.80}")
    if problems:
        raise InputError(*problems)


def _word(value) -> str:
    return value if isinstance(value, str) and value.isidentifier() else f"{value!r:.80}"


def _modules(weights: dict[str, np.ndarray], where: str) -> tuple[str, ...]:
    if not weights:
        raise InputError(f"{where}: holds no tensors")
    problems, modules = [], {}
    for name, array in weights.items():
        factor = _FACTOR.fullmatch(name)
        if not factor or array.ndim != 2 or array.dtype.name not in FLOATS:
            problems.append(f"{where}: tensor {name!r} {list(array.shape)} is no LoRA factor")
        else:
            modules[factor[1]] = None
    for module in modules:
        first, second = peft_names(module)
        if first not in weights or second not in weights:
            problems.append(f"{where}: {module} lacks {'lora_A' if first not in weights else 'lora_B'}")
        elif not problems and weights[first].shape[0] != weights[second].shape[1]:
            problems.append(f"{where}: {module}: lora_A and lora_B have different ranks")
    if problems:
        raise InputError(*problems[:20])
    return tuple(modules)
