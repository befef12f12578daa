"""Which versions, machine and data a run used, without importing the framework that is not there."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import msft

PACKAGES = ("numpy", "torch", "transformers", "peft", "mindspore", "tokenizers", "sentencepiece", "safetensors")


def collect(backend: str, device: str, world: int, data: dict[str, str]) -> dict:
    """Return what `versions.json` holds; `data` maps names of datasets to the SHA-256 of their rows."""
    return {
        "msft": msft.__version__,
        "python": platform.python_version(),
        "packages": packages(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "byte_order": sys.byteorder,
        "backend": backend,
        "device": device,
        "processes": world,
        "data_sha256": data,
    }


def packages() -> dict[str, str | None]:
    """Return the versions of the packages that decide results, None for what is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
