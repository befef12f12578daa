"""Which device MindSpore runs on."""

import platform

import mindspore
from mindspore import device_context

from msft.backend import devices

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
    return devices.choose(device, KINDS, _present, f"mindspore {mindspore.__version__}")


def versions() -> dict[str, str]:
    """Return the versions that decide this engine's results."""
    return {"python": platform.python_version(), "mindspore": mindspore.__version__}
