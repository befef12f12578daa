"""Which device torch runs on."""

import platform

import torch

from msft.backend import devices

KINDS = ("cuda", "npu", "cpu")


def _present(kind: str) -> bool:
    return kind == "cpu" or (hasattr(torch, kind) and getattr(torch, kind).is_available())


def pick(device: str) -> tuple[str, str]:
    """Return the device to run on (cpu, cuda, npu) and why; 'auto' takes the best one present.

    Raises InputError when the one asked for is absent.
    """
    return devices.choose(device, KINDS, _present, f"torch {torch.__version__}")


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
