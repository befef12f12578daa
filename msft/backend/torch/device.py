"""Which device torch runs on."""

import platform

import torch

from msft.errors import InputError

KINDS = ("cuda", "npu", "cpu")


def _present(kind: str) -> bool:
    return kind == "cpu" or (hasattr(torch, kind) and getattr(torch, kind).is_available())


def pick(device: str) -> tuple[str, str]:
    """Return the device to run on (cpu, cuda, npu) and why; 'auto' takes the best one present.

    Raises InputError when the one asked for is absent.
    """
    if device == "auto":
        best = next(kind for kind in KINDS if _present(kind))
        return best, "the best device that torch sees here"
    if device not in KINDS:
        raise InputError(f"device: {device!r} is unknown to torch (cpu, cuda, npu or auto)")
    if not _present(device):
        raise InputError(f"device: '{device}' was asked for, but torch {torch.__version__} sees none here")
    return device, "asked for"


def versions() -> dict[str, str]:
    """Return the versions that decide this engine's results."""
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
