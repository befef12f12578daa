"""What kind of weights a path holds, judged by content."""

import os
from enum import Enum
from pathlib import Path

from msft.convert import hf_folder, safetensors_file
from msft.convert.stored import readable
from msft.errors import InputError


class Kind(Enum):
    """The weight formats that can be read."""

    HF = "Hugging Face folder"
    SAFETENSORS = "safetensors file"
    TORCH = "file of torch.save"
    CKPT = "MindSpore CKPT"
    META = "Meta folder"
    GGUF = "GGUF file"


# Files beside the weights that people point to when they mean the folder.
_COMPANIONS = {
    "config.json",
    "params.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "ice_text.model",
    "tokenizer_config.json",
}


def detect(path: str | os.PathLike) -> tuple[Kind, Path]:
    """Return the kind of the weights at a path, and the file to open (Meta: the folder; HF: weight file or index).

    A folder may be an HF folder, a Meta folder, or hold one CKPT or GGUF (a CKPT also under `rank_0`); a file
    beside the weights stands for its folder. Raises InputError saying what was found instead.
    """
    with readable(path):
        return _detect(Path(path))


def is_companion(path: Path) -> bool:
    """Whether a file stands for the folder it lies in: an index, a config or a tokenizer file beside the weights."""
    return path.is_file() and (path.name in _COMPANIONS or path.name.endswith(".index.json"))


def _detect(path: Path) -> tuple[Kind, Path]:
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError(f"{path}: does not exist{'' if path.parent.is_dir() else ' (nor does its folder)'}")
    if path.name.endswith(".index.json"):
        return Kind.HF, path
    if is_companion(path):
        return _folder(path.parent)
    kind = _file(path)
    index = path.parent / (hf_folder.weights_file(path.parent) or "")
    if kind in (Kind.SAFETENSORS, Kind.TORCH) and index.name.endswith(".index.json"):
        if path.name in hf_folder.read_weight_map(index).values():
            return Kind.HF, index
    if kind is Kind.TORCH and _is_meta(path.parent) and path.name.startswith("consolidated."):
        return Kind.META, path.parent
    return kind, path


def _folder(folder: Path) -> tuple[Kind, Path]:
    weights = hf_folder.weights_file(folder)
    if weights:
        return Kind.HF, weights
    if _is_meta(folder):
        return Kind.META, folder
    for pattern, kind in (
        ("*.ckpt", Kind.CKPT),
        ("rank_0/*.ckpt", Kind.CKPT),
        ("*.gguf", Kind.GGUF),
        ("*.safetensors", Kind.SAFETENSORS),
    ):
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            names = ", ".join(str(file.relative_to(folder)) for file in files[:5])
            raise InputError(f"{folder}: holds {len(files)} files of weights ({names}); name the one to read")
        if files and files[0].name != "adapter_model.safetensors":
            return kind, files[0]
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: is a LoRA adapter, not a model; give its base model here and the folder as adapter"
        )
    if (folder / "slices").is_dir():
        raise InputError(
            f"{folder}: holds the parts of a job's processes, not a model: go on from it (resume_training) to the "
            "end of the run, which writes the model"
        )
    raise InputError(
        f"{folder}: holds no weights (model.safetensors, pytorch_model.bin, their index.json, "
        "consolidated.*.pth with params.json, *.ckpt or *.gguf)"
    )


def _is_meta(folder: Path) -> bool:
    return (folder / "params.json").exists() and any(folder.glob("consolidated.*.pth"))


def _file(path: Path) -> Kind:
    with open(path, "rb") as file:
        start = file.read(32)
    if start.startswith(b"GGUF"):
        return Kind.GGUF
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02")):
        return Kind.TORCH
    if safetensors_file.looks_like(start, path.stat().st_size):
        return Kind.SAFETENSORS
    if start.startswith(b"\x0a"):
        return Kind.CKPT
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer, not the weights; fetch them with 'git lfs pull'")
    raise InputError(f"{path}: is no weight file (safetensors, torch.save, MindSpore CKPT or GGUF), or it is damaged")
