"""Which device MindSpore runs on."""

import platform

import mindspore
from mindspore import device_context

from msft.errors import InputError

KINDS = ("npu", "cuda", "cpu")
TARGETS = {"npu": "Ascend", "cuda": "GPU", "cpu": "CPU"}


def _present(kind: str) -> bool:
    if kind == "cpu":
        return True
    return {"npu": device_context.ascend, "cuda": device_context.gpu}[kind].is_available()


def pick(device: str) -> tuple[str, str]:
    """Return the device to run on (cpu, cuda, npu) and why; 'auto' takes the best one present.

    Raises InputError when the one asked for is absent.
    """
    if device == "auto":
        best = next(kind for kind in KINDS if _present(kind))
        return best, "the best device that mindspore sees here"
    if device not in KINDS:
        raise InputError(f"device: {device!r} is unknown to mindspore (cpu, cuda, npu or auto)")
    if not _present(device):
        raise InputError(f"device: '{device}' was asked for, but mindspore {mindspore.__version__} sees none here")
    return device, "asked for"


def versions() -> dict[str, str]:
    """Return the versions that decide this engine's results."""
    return {"python": platform.python_version(), "mindspore": mindspore.__version__}
