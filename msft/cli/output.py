"""Paths and sizes as the weight commands take and say them."""

import re
from pathlib import Path

from msft.errors import InputError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_size(word: str, option: str) -> int:
    """Read a size such as 5GB, 500MB or 2GiB in bytes; raises InputError naming the option."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", word.strip())
    if not size or size[2].upper() not in _UNITS or float(size[1]) <= 0:
        raise InputError(f"{option}: {word!r} is no size such as 5GB or 500MB")
    return max(1, int(float(size[1]) * _UNITS[size[2].upper()]))


def gigabytes(size: int) -> str:
    """Say a size in bytes with three digits: 538 MB, 13.5 GB."""
    return f"{size / 1e9:.3g} GB" if size >= 10**9 else f"{size / 1e6:.3g} MB"


def ckpt_path(path: Path, option: str) -> Path:
    """Return the CKPT to write, with `.ckpt` added as MindSpore does; raises InputError for a folder."""
    if path.is_dir():
        raise InputError(f"{option}: {path} is a folder; name the CKPT to write, such as {path / 'llama.ckpt'}")
    return path if path.suffix == ".ckpt" else path.with_name(path.name + ".ckpt")


def folder_path(path: Path, option: str) -> Path:
    """Return the folder to write; raises InputError when the path names a weight file."""
    if path.suffix in (".ckpt", ".bin", ".pt", ".pth", ".safetensors"):
        raise InputError(f"{option}: {path} looks like a file; a Hugging Face model is a folder, such as {path.stem}")
    return path
